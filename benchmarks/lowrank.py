"""Measures what gradients of `lora.rank` numbers per token cost in quality and save in bytes (wire.gradients = "lowrank").

The demo's data, steps and model over real processes, with three seeds: the low-rank payload, beside the devices' back alone
(nothing learns on hosts, no gradient travels), and beside all places with full gradients. Bytes are those that the nodes
counted on their links, with framing, of the same short training with both payloads. Runs stay in runs/benchmark-lowrank; a
second call takes those that are done. --smoke: one short round of one device with the low-rank payload, of a tiny random model.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.common import Figure, main
from edgelam_fl.config import parse_run_file
from edgelam_fl.errors import RunFailed
from edgelam_fl.federation.demo_text import RUN_FILE
from edgelam_fl.federation.local import run_local
from edgelam_fl.model.source import find_model
from edgelam_fl.tasks.docstrings import write_device_files
from edgelam_fl.telemetry.events import Event, RoundDone, of_kind, read_events
from edgelam_fl.telemetry.summary import build_summary
from tests.support import write_tiny_llama

ARMS = {
    "low-rank": ("wire.gradients=lowrank", "lora.train=back"),
    "back alone": ("lora.train=back",),
    "everywhere": (),
}
SAME_PLACES = {
    "low-rank": ARMS["low-rank"],
    "full": ("lora.train=['hosts','back']",),
}  # gradients on the exit link alone
SEEDS = (1, 2, 3)
HIGH_RATE = "optimizer.lr=0.01"  # five times the demo's; one seed, of the two arms that learn little
ENDS_ALONE = "federation.evaluate_every=1000"  # the start is measured, and the result always is
SHORT = ("federation.rounds=1", "federation.local_steps=2", "data.held_out=0.01")
MOST_BYTES = 1.05  # times rank / hidden


def measure(smoke: bool) -> tuple[dict[str, Any], list[Figure]]:
    return _smoke() if smoke else _measure(Path("runs/benchmark-lowrank"))


def _smoke() -> tuple[dict[str, Any], list[Figure]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = f"model.name={write_tiny_llama(folder / 'tiny')}"
        events = trained(folder / "run", [model, *ARMS["low-rank"], *SHORT], write_device_files(folder / "data", 1))
    return {"smoke": True}, [Figure("bytes of gradients, low-rank", _gradient_bytes(events), "bytes")]


def _measure(runs: Path) -> tuple[dict[str, Any], list[Figure]]:
    files = write_device_files(runs / "data", 3)
    figures = []
    before, after = dict[str, list[float]](), dict[str, list[float]]()
    for seed, arm in product(SEEDS, ARMS):
        overrides = [*ARMS[arm], ENDS_ALONE, f"run.seed={seed}"]
        summary = build_summary(trained(runs / f"{arm}-{seed}".replace(" ", "-"), overrides, files))
        before.setdefault(arm, []).append(mean(device.perplexity_before or 0.0 for device in summary.devices))
        after.setdefault(arm, []).append(mean(device.perplexity_after or 0.0 for device in summary.devices))
    figures.append(Figure("held-out perplexity before", round(mean(before["low-rank"]), 2), ""))
    for arm, values in after.items():
        figures.append(Figure(f"held-out perplexity, {arm}", round(mean(values), 2), "mean of seeds"))
        figures += [Figure(f"{arm}, seed {seed}", round(v, 2), "") for seed, v in zip(SEEDS, values, strict=True)]
        figures.append(Figure(f"{arm}, standard deviation over seeds", round(stdev(values), 2), ""))
    for arm in ("low-rank", "back alone"):
        overrides = [*ARMS[arm], ENDS_ALONE, f"run.seed={SEEDS[0]}", HIGH_RATE]
        summary = build_summary(trained(runs / f"{arm}-lr-{SEEDS[0]}".replace(" ", "-"), overrides, files))
        value = mean(device.perplexity_after or 0.0 for device in summary.devices)
        figures.append(Figure(f"{arm}, learning rate 0.01, seed {SEEDS[0]}", round(value, 2), ""))
    figures += _bytes(runs, files)
    return {"demo": RUN_FILE, "arms": ARMS, "same_places": SAME_PLACES, "seeds": SEEDS, "high_rate": HIGH_RATE}, figures


def _bytes(runs: Path, files: Sequence[Path]) -> list[Figure]:
    """Returns the bytes of the gradients of one short training with each payload, and their quotient."""
    sent = {}
    for arm, settings in SAME_PLACES.items():
        sent[arm] = _gradient_bytes(trained(runs / f"bytes-{arm}", [*settings, ENDS_ALONE, *SHORT], files))
    config = parse_run_file(RUN_FILE, source="the demo's run file", overrides=[])
    share = config.lora.rank / find_model(config.model.name).hidden_size
    quotient = sent["low-rank"] / sent["full"] / share
    return [
        *(Figure(f"bytes of gradients, {arm}", size, "bytes") for arm, size in sent.items()),
        Figure("rank / hidden", round(share, 5), ""),
        Figure(
            "low-rank bytes by rank / hidden of the full bytes", round(quotient, 4), "times", f"at most {MOST_BYTES}",
            quotient <= MOST_BYTES,
        ),
    ]  # fmt: skip


def _gradient_bytes(events: Sequence[Event]) -> int:
    return sum(done.bytes_by_kind.get("GRAD", 0) for done in of_kind(events, RoundDone))


def trained(folder: Path, overrides: Sequence[str], files: Sequence[Path]) -> list[Event]:
    """Returns the events of a run, which is made unless it is there already. Raises RunFailed if it was not done."""
    if not (folder / "summary.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        config = parse_run_file(RUN_FILE, source="the demo's run file", overrides=list(overrides))
        for event in run_local(config, files, folder):
            print(folder.name, type(event).__name__, flush=True)
    if not (folder / "summary.json").exists():
        raise RunFailed(f"{folder} holds a run that did not end well")
    return list(read_events(folder / "events.jsonl"))


if __name__ == "__main__":
    main("lowrank", measure)
