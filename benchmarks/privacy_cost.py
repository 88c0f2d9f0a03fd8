"""Measures what differential privacy adds to a step on this machine's CPU, for SmolLM2 over stage hosts in one process.

Rounds with and without it take turns, in pairs; the figures are medians over the pairs, of the whole round's CPU seconds and of
its time. `central`: a host's shared layers, where the host clips and adds noise in each step. `device`: whole models on the
devices, each of which clips and adds noise once a round. Where the server clips, nodes do nothing more than always. --smoke: one
pair of rounds of one step, of a tiny random model.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.common import Figure, main
from edgelam_fl.model import adapter as adapters
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.plan.making import RoundPrivacy
from tests.fleet import Fleet, check_done, memory_fleet
from tests.support import run_config, write_data_files, write_tiny_llama

DEVICES = 2
BAR_PERCENT = 5.0
CENTRAL = RoundPrivacy(clip=1.0, noise=1.0, devices=DEVICES)
DEVICE = RoundPrivacy(clip=1.0, noise=1.0, devices=DEVICES, device_clips=True, device_noise=True)
MODES: dict[str, tuple[RoundPrivacy, tuple[str, ...]]] = {
    "central, joint": (CENTRAL, ("split.host_mode=joint",)),
    "central, sequential": (CENTRAL, ("split.host_mode=sequential",)),
    "device": (DEVICE, ("split.hosts=0",)),
}


@dataclass(frozen=True)
class Cost:
    """The cost of one round."""

    cpu_s: float
    wall_s: float


def measure(smoke: bool) -> tuple[dict[str, Any], list[Figure]]:
    pairs, steps = (1, 1) if smoke else (5, 2)
    torch.set_num_threads(1)  # stage hosts on threads of one process
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_data_files(folder)[:DEVICES]
        model = find_model(str(write_tiny_llama(folder / "tiny")) if smoke else "smollm2-135m")
        for mode, (privacy, overrides) in MODES.items():
            figures += _figures(mode, _pairs(model, files, privacy, overrides, pairs, steps), steps, smoke)
    return {"model": model.name, "devices": DEVICES, "pairs": pairs, "steps_per_round": steps, "threads": 1}, figures


def _pairs(
    model: ModelSource, files: list[Path], privacy: RoundPrivacy, overrides: tuple[str, ...], pairs: int, steps: int
) -> list[tuple[Cost, Cost]]:
    """Returns the cost of rounds without and with privacy, which take turns; which of them is first takes turns, too."""
    config = run_config(model.name, "federation.evaluate_every=1000", *overrides)
    start = adapters.initial_adapter(model, config.lora.targets, config.lora.rank, config.run.seed)
    found = []
    with memory_fleet(model, config, files) as fleet:
        _round(fleet, start, None, 1)  # loads the slices
        for number in range(pairs):
            order = (None, privacy) if number % 2 else (privacy, None)
            costs = {one is not None: _round(fleet, start, one, steps) for one in order}
            found.append((costs[False], costs[True]))
    return found


def _round(fleet: Fleet, start: adapters.Adapter, privacy: RoundPrivacy | None, steps: int) -> Cost:
    fleet.privacy = privacy
    began, cpu = time.monotonic(), time.process_time()
    check_done(fleet.run(start, steps))
    return Cost(time.process_time() - cpu, time.monotonic() - began)


def _figures(mode: str, pairs: list[tuple[Cost, Cost]], steps: int, smoke: bool) -> list[Figure]:
    cpu_percent = 100 * (median(private.cpu_s / plain.cpu_s for plain, private in pairs) - 1)
    wall_percent = 100 * (median(private.wall_s / plain.wall_s for plain, private in pairs) - 1)
    bar = None if smoke else f"at most {BAR_PERCENT:g} %"
    holds = None if smoke else cpu_percent <= BAR_PERCENT
    return [
        Figure(f"{mode}: a step without privacy", round(median(p.cpu_s for p, _ in pairs) / steps, 3), "CPU s"),
        Figure(f"{mode}: a step", round(median(p.cpu_s for _, p in pairs) / steps, 3), "CPU s"),
        Figure(f"{mode}: added to a step's CPU seconds", round(cpu_percent, 2), "%", bar, holds),
        Figure(f"{mode}: added to a step's time", round(wall_percent, 2), "%"),
    ]


if __name__ == "__main__":
    main("privacy_cost", measure)
