"""Measures three devices over one host beside an earlier checkout, one worker, and transformers with peft alone, on this machine's cores.

`git worktree add /tmp/before d19f339`, then `python -m benchmarks.overlap --before /tmp/before`, on a machine that does nothing else. All sides
are processes of their own that train the demo's micro-batches of SmolLM2-135M in turn, --repeats (5) times --steps (4); figures are medians of the
pairs' ratios. Without --before its side is left out. --smoke: one step of a tiny random model, without it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.chaos.cost import revision
from benchmarks.common import Figure, main
from edgelam_fl.tasks.docstrings import write_device_files
from tests.support import write_data_files, write_tiny_llama

ROOT = Path(__file__).parents[2]
DEVICES = 3
DEMO = ["federation.batch_size=4", "task.max_tokens=80", "data.held_out=0.002", "optimizer.lr=2e-3"]
AFTER, ONE, BEFORE = "this code", "this code with one worker", "before"
PIECES, WHOLE = "peft in the same pieces", "peft on whole batches"
BARS = {BEFORE: 1.7, PIECES: 1.3, WHOLE: 1.0}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--before", type=Path, metavar="DIR", help="a checkout of the earlier code")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)


class Side:
    """A side of the comparison, in a process of its own."""

    def __init__(self, tree: Path, **settings: Any) -> None:
        environment = {
            **os.environ, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE",
        }  # fmt: skip
        if tree != ROOT:  # another revision writes other descriptions of a model into its cache
            environment["EDGELAM_CACHE"] = settings["folder"] + "-cache"
        environment.pop("OMP_NUM_THREADS", None)
        command = [sys.executable, "-P", str(Path(__file__).with_name("side.py")), json.dumps(settings)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=tree
        )
        self.rows: list[dict[str, Any]] = []

    def run(self, steps: int) -> dict[str, Any]:
        """Trains so many steps; returns what they took."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a side ended with status {self._process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(120)


def measure(smoke: bool, options: argparse.Namespace) -> tuple[dict[str, Any], list[Figure]]:
    repeats, steps = (1, 1) if smoke else (options.repeats, options.steps)
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_data_files(folder) if smoke else write_device_files(folder, DEVICES)
        model = str(write_tiny_llama(folder / "tiny")) if smoke else "smollm2-135m"
        both = {"model": model, "overrides": DEMO, "files": [str(file) for file in files], "host_threads": cores}
        made = {
            AFTER: (ROOT, {"workers": 0}), ONE: (ROOT, {"workers": 1}), PIECES: (ROOT, {"plain": 2}), WHOLE: (ROOT, {"plain": 1}),
        }  # fmt: skip
        if options.before and not smoke:
            made[BEFORE] = (options.before.absolute(), {"workers": 0})
        sides = {
            kind: Side(tree, folder=str(folder / f"side-{number}"), **both, **own)
            for number, (kind, (tree, own)) in enumerate(made.items())
        }
        try:
            for side in sides.values():
                side.run(1)  # loads the model
            for repeat in range(repeats):
                for kind, side in list(sides.items())[:: -1 if repeat % 2 else 1]:
                    side.rows.append(side.run(steps))
                    print(f"repeat {repeat + 1} of {repeats}, {kind}: {side.rows[-1]}", flush=True)
        finally:
            for side in sides.values():
                side.close()
    settings = {
        "model": model, "devices": DEVICES, "overrides": DEMO, "host_threads": cores, "repeats": repeats, "steps": steps,
        "before": revision(options.before) if BEFORE in sides else "",
    }  # fmt: skip
    return settings, list(_figures(sides, smoke))


def _figures(sides: dict[str, Side], smoke: bool) -> list[Figure]:
    speeds = {kind: [row["tokens"] / row["seconds"] for row in side.rows] for kind, side in sides.items()}
    work = {kind: [1000 * sum(r["cpu_s"].values()) / r["tokens"] for r in side.rows] for kind, side in sides.items()}
    busy = {kind: [sum(r["cpu_s"].values()) / r["seconds"] for r in side.rows] for kind, side in sides.items()}
    found = []
    for kind in sides:
        found.append(Figure(f"{kind}, tokens per second", round(median(speeds[kind]), 1), "tokens/s"))
        found.append(Figure(f"{kind}, CPU per token", round(median(work[kind]), 2), "ms"))
        found.append(Figure(f"{kind}, cores busy", round(median(busy[kind]), 2), ""))
    for kind in (ONE, BEFORE, PIECES, WHOLE):
        if kind in sides:
            times, bar = _ratio(speeds[AFTER], speeds[kind]), BARS.get(kind)
            words, holds = (f"at least {bar}", times >= bar) if bar and not smoke else (None, None)
            found.append(Figure(f"tokens per second over {kind}", round(times, 3), "", words, holds))
    for kind in (AFTER, ONE):
        peak = max(row["host_peak_bytes"] for row in sides[kind].rows)
        found.append(Figure(f"{kind}, peak of the host's memory", round(peak / 1e6), "MB"))
    return found


def _ratio(ours: list[float], theirs: list[float]) -> float:
    return median(one / other for one, other in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    main("overlap", measure, add_options)
