"""Measures what survival costs a run that nothing happens to: runs by this code and by an earlier checkout, in turn.

`git worktree add /tmp/before REV`, then `python -m benchmarks.chaos.cost --before /tmp/before`. Each code has a federation of its
own: `edgelam server`, an edge server and three `edgelam client`s with TLS. One trains while the other has no run. --pairs (5),
--rounds of a run (3), --model (smollm2-135m; "tiny": a random one). Bars: tokens per second at least 0.97, bytes at most 1.01.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.chaos.course import Course
from benchmarks.chaos.federation import Federation
from benchmarks.chaos.processes import processes
from benchmarks.common import Figure, main
from tests.support import cpu_seconds

RUN_S = 1200.0
SPEED_BAR, BYTES_BAR = 0.97, 1.01


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--before", type=Path, required=True, metavar="DIR", help="a checkout of the earlier code")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3, help="of each run")
    parser.add_argument("--steps", type=int, default=10, help="of each round")
    parser.add_argument("--model", default="smollm2-135m", help="'tiny': a random one")


@dataclass
class Cost:
    """The cost of one run."""

    tokens_per_s: float
    """Over its rounds, all that the server does between included."""
    tokens_per_train_s: float
    """By the devices' clocks."""
    wire_bytes: int
    """On the devices' links and for their adapters."""
    cpu_s: float
    """Of all processes that live longer than a run, per 1,000 tokens."""
    event_bytes: int


def measure(smoke: bool, options: argparse.Namespace) -> tuple[dict[str, Any], list[Figure]]:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    trees = {"before": options.before.absolute(), "after": Path(__file__).parents[2]}
    costs: dict[str, list[Cost]] = {kind: [] for kind in trees}
    pairs, rounds = (1, 1) if smoke else (options.pairs, options.rounds)
    with tempfile.TemporaryDirectory() as name:
        federations = {kind: Federation(Path(name) / kind, ["edge-1"], tree=tree) for kind, tree in trees.items()}
        try:
            for kind, federation in federations.items():
                print(f"{kind}: up after {federation.start():.0f} s", flush=True)
                _run(federation, "warm", options, 1)
            for pair in range(pairs):
                for kind in ("before", "after") if pair % 2 else ("after", "before"):
                    cost = _run(federations[kind], f"run-{pair}", options, rounds)
                    costs[kind].append(cost)
                    print(f"pair {pair + 1} of {pairs}, {kind}: {cost}", flush=True)
            memory = {kind: _memory(federation) for kind, federation in federations.items()}
        finally:
            for federation in federations.values():
                federation.stop()
    revisions = {kind: revision(tree) for kind, tree in trees.items()}
    settings = {
        "model": options.model,
        "pairs": pairs,
        "rounds": rounds,
        "steps": options.steps,
        "revisions": revisions,
    }
    return settings, _figures(costs, memory, smoke)


def _run(federation: Federation, name: str, options: argparse.Namespace, rounds: int) -> Cost:
    model = str(federation.model) if options.model == "tiny" else options.model
    settings = [
        f"model.name={model}", f"federation.rounds={rounds}", f"federation.local_steps={options.steps}", "federation.batch_size=4",
        "federation.expect_nodes=3", "federation.min_nodes=3", f"federation.evaluate_every={rounds}", "task.max_tokens=96",
        "data.held_out=0.1",
    ]  # fmt: skip
    pids = [one.pid for one in processes(federation.mark)]
    before = sum(map(cpu_seconds, pids))
    course, end = Course(federation.start_run(name, settings)), time.monotonic() + RUN_S
    while not course.ended and time.monotonic() < end:
        time.sleep(0.3)
        course.look()
    federation.commands["run"].wait(60)
    if not course.ended or course.failed:
        raise RuntimeError(f"{name}: {course.failed or federation.said('run')[-600:]}")
    devices = [device for done in course.rounds for device in done.devices]
    tokens = sum(device.tokens or 0 for device in devices)
    on_the_wire = sum(
        (device.bytes_up or 0)
        + (device.bytes_down or 0)
        + (device.adapter_bytes_up or 0)
        + (device.adapter_bytes_down or 0)
        for device in devices
    )
    return Cost(
        tokens / sum(done.seconds for done in course.rounds),
        tokens / sum(max(device.train_seconds or 0 for device in done.devices) for done in course.rounds),
        on_the_wire,
        1000 * (sum(_cpu_seconds(pid) for pid in pids) - before) / tokens,
        (course.folder / "events.jsonl").stat().st_size,
    )


def _cpu_seconds(pid: int) -> float:
    with suppress(OSError):
        return cpu_seconds(pid)
    return 0.0


def _memory(federation: Federation) -> dict[str, int]:
    """Returns the resident memory of each process in bytes, without the pages that it shares with others."""
    found = {}
    for one in processes(federation.mark):
        with suppress(OSError):
            lines = Path(f"/proc/{one.pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
            found[str(one)] = 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
    return found


def revision(tree: Path) -> str:
    """Returns the commit of a checkout, or what its file REV says."""
    noted = tree / "REV"
    if noted.exists():
        return noted.read_text(encoding="utf-8").strip()
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=tree, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def _figures(costs: dict[str, list[Cost]], memory: dict[str, dict[str, int]], smoke: bool) -> list[Figure]:
    def ratios(what: str) -> list[float]:
        return [getattr(a, what) / getattr(b, what) for a, b in zip(costs["after"], costs["before"], strict=True)]

    speed, wire = statistics.median(ratios("tokens_per_s")), statistics.median(ratios("wire_bytes"))
    found = [
        Figure("tokens per second, over before, median of the pairs", round(speed, 3), "",
               None if smoke else f"at least {SPEED_BAR:g}", None if smoke else speed >= SPEED_BAR),
        Figure("the same, lowest and highest pair apart", round(max(ratios("tokens_per_s")) - min(ratios("tokens_per_s")), 3), ""),
        Figure("tokens per second of training, over before, median of the pairs", round(statistics.median(ratios("tokens_per_train_s")), 3), ""),
        Figure("bytes, over before, median of the pairs", round(wire, 4), "",
               None if smoke else f"at most {BYTES_BAR:g}", None if smoke else wire <= BYTES_BAR),
        Figure("processor time per token, over before, median of the pairs", round(statistics.median(ratios("cpu_s")), 3), ""),
        Figure("events.jsonl, over before, median of the pairs", round(statistics.median(ratios("event_bytes")), 3), ""),
        Figure("tokens per second before", round(statistics.median(cost.tokens_per_s for cost in costs["before"]), 1), ""),
        Figure("tokens per second", round(statistics.median(cost.tokens_per_s for cost in costs["after"]), 1), ""),
    ]  # fmt: skip
    for kind, when in (("before", " before"), ("after", "")):
        found += [Figure(f"memory of {name}{when}", size, "B") for name, size in sorted(memory[kind].items())]
    return found


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main("survival_cost", measure, add_options, command="python -m benchmarks.chaos.cost --before DIR")
