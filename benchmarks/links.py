"""Compares a round under `equalise` with a round under `uniform` in a real federation on paced links.

A SuperLink, an edge server and three devices run as processes. The model is a random Llama that takes next to no compute;
answers have lengths that make the devices send 1 : 2 : 6. Devices share wire.capacity, and links keep to their shares. The
first round is not counted, because its shares are estimates; later shares are computed from measurements. The run moves the
same tensors under both rules. Seconds are those of the whole round, with Flower's messages.
--smoke: short answers, two rounds under `equalise`, no bars.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.common import Figure, main
from edgelam_fl.config import RunConfig, parse_run_file
from edgelam_fl.telemetry.events import Event, PlanMade, RoundDone, of_kind
from edgelam_fl.telemetry.summary import is_training_round
from strategies.api import Demand
from strategies.bandwidth.links import delay_of, needs_of
from tests.integration.federation import Federation
from tests.support import write_tiny_llama

RATIOS = {"device-1": 1, "device-2": 2, "device-3": 6}
RULES = ("uniform", "equalise")
BAR = 0.85
SAME = 0.1  # percent: control frames differ, and there may be a retry
EXAMPLES = 20
QUESTION = "Who?"
AROUND = len("<user></s><assistant></s>") - 2 * len("</s>") + 2  # tokens that the chat template adds; </s> is one token
SETTINGS = {
    "federation.local_steps": 4, "federation.batch_size": 4, "federation.min_nodes": 3, "federation.expect_nodes": 3,
    "task.max_tokens": 512, "data.held_out": 0.05,
}  # fmt: skip

Events = Sequence[Event]


def measure(smoke: bool, federation: Federation | None = None) -> tuple[dict[str, Any], list[Figure]]:
    """Returns settings and figures of runs over `federation`, which has these three devices and any data; None: starts its own."""
    tokens, rounds, capacity = (24, 2, "20 Mbit/s") if smoke else (48, 3, "2 Mbit/s")
    out = Path("runs").absolute() / ("benchmark-links-smoke" if smoke else "benchmark-links")
    shutil.rmtree(out, ignore_errors=True)
    model = write_tiny_llama(out / "model")
    data = [write_pairs(out / f"{name}.jsonl", tokens * ratio) for name, ratio in RATIOS.items()]
    settings = {**SETTINGS, "federation.rounds": rounds, "wire.capacity": capacity}
    with nullcontext(federation) if federation is not None else _started(out, data) as running:
        events = {
            rule: running.run(f"links-{rule}", _config(model, rule, settings)).events
            for rule in (RULES[1:] if smoke else RULES)
        }
    capacity_bps = parse_run_file("", source="the benchmark", overrides=_set(settings)).wire.capacity_bps
    figures = [figure for rule, found in events.items() for figure in of_rule(rule, found, capacity_bps)]
    return {**settings, "tokens": tokens, "payloads": RATIOS}, figures + (
        [] if smoke else compared(events, capacity_bps)
    )


def write_pairs(file: Path, tokens: int) -> Path:
    """Writes different examples of exactly `tokens` tokens each (bytes and special tokens) and returns the file."""
    length = tokens - AROUND - len(QUESTION)
    lines = [json.dumps({"question": QUESTION, "answer": f"{n:02}".ljust(length, ".")}) for n in range(EXAMPLES)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


# ---------------------------------------------------------------- figures from events


def of_rule(rule: str, events: Events, capacity_bps: float) -> Iterator[Figure]:
    """Yields the seconds per round under a rule, and each device's bytes, compute and share."""
    counted = rounds(events)
    for name in RATIOS:
        devices = [device for r in counted for device in r.devices if device.name == name]
        moved = fmean(device.bytes_up + device.bytes_down for device in devices)
        yield Figure(f"{rule}, {name} moves in a round, both ways", round(moved), "bytes")
        yield Figure(f"{rule}, {name} computes in a round", round(fmean(d.compute_seconds for d in devices), 3), "s")
        yield Figure(f"{rule}, share of {name}", round(_shares(events)[counted[-1].round][name], 4), "")
    yield Figure(f"{rule}, a round", round(round_s(events), 2), "s")
    yield Figure(f"{rule}, the slowest device's part of it", round(slowest_s(events), 2), "s")
    yield Figure(f"{rule}, the same by the formula", round(formula_s(events, capacity_bps), 2), "s")


def compared(events: Mapping[str, Events], capacity_bps: float) -> list[Figure]:
    """Returns the figures of `equalise` relative to `uniform`."""
    fixed, equal = (events[rule] for rule in RULES)
    ratio = round_s(equal) / round_s(fixed)
    moved = [r.bytes_by_kind["ACT"] + r.bytes_by_kind["GRAD"] for r in rounds(fixed) + rounds(equal)]
    apart = 100 * (max(moved) / min(moved) - 1)
    by_formula = formula_s(equal, capacity_bps) / formula_s(fixed, capacity_bps)
    return [
        Figure("a round's tensors, most over least", round(apart, 4), "%", f"at most {SAME} %", apart <= SAME),
        Figure("equalise over uniform, a round", round(ratio, 3), "", f"at most {BAR}", ratio <= BAR),
        Figure("equalise over uniform, the slowest device's part", round(slowest_s(equal) / slowest_s(fixed), 3), ""),
        Figure("equalise over uniform, by the formula", round(by_formula, 3), ""),
    ]


def rounds(events: Events) -> list[RoundDone]:
    """Returns the training rounds without the first, whose shares are estimates."""
    return [done for done in of_kind(events, RoundDone) if done.round > 1 and is_training_round(done)]


def round_s(events: Events) -> float:
    return fmean(r.seconds for r in rounds(events))


def slowest_s(events: Events) -> float:
    return fmean(max(d.eval_seconds + d.train_seconds for d in r.devices) for r in rounds(events))


def formula_s(events: Events, capacity_bps: float) -> float:
    """Returns the mean over rounds of c + S / (b C) of the slowest device, with each round's measured c and S and its shares b.

    S counts both directions, as the schedulers do. If both directions are busy at once, as with a window of several
    micro-batches, the result is an upper bound, in the same way for all rules.
    """
    delays = []
    for found in rounds(events):
        devices = found.devices
        demands = [Demand(d.name, d.bytes_up + d.bytes_down, d.compute_seconds) for d in devices]
        shares = np.array([_shares(events)[found.round][d.name] for d in devices])
        delays.append(float(np.max(delay_of(needs_of(demands, capacity_bps), shares))))
    return fmean(delays)


def _shares(events: Events) -> dict[int, Mapping[str, float]]:
    return {plan.round: plan.shares for plan in of_kind(events, PlanMade)}


# ---------------------------------------------------------------- processes


@contextmanager
def _started(out: Path, data: Sequence[Path]) -> Iterator[Federation]:
    """Starts the processes of a federation in the folder `out`; ends all of them afterwards."""
    federation = Federation(out, {file.stem: file for file in data})
    try:
        federation.start()
        yield federation
    finally:
        federation.stop()


def _config(model: Path, rule: str, settings: dict[str, Any]) -> RunConfig:
    overrides = [*_set(settings), f"model.name={model}", f"strategy.bandwidth={rule}"]
    return parse_run_file("", source="the benchmark", overrides=overrides)


def _set(settings: dict[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in settings.items()]


if __name__ == "__main__":
    main("links", measure)
