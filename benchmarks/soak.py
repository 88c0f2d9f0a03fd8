"""Measures whether anything grows: memory, threads, open files and the time of a round, over many rounds with joins and departures.

--rounds N (1000): one host and three devices in processes of their own, over gRPC with TLS, take plans as from a server; at random,
two of the devices leave by kill -9 and come back. --flower N (60): rounds through real commands with TLS (`edgelam server`, `client`, `run`),
after which each process, the events and the logs are looked at. Either may be 0: its figures are then those of the last result. Bars: resident memory of a process in the last
quarter is at most 5 % over that of the second; a round takes at most 1.15 times as long; events.jsonl takes at most 3 kB per round
and device. --smoke: 8 rounds, two devices, no Flower, no bars.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.chaos.course import Course
from benchmarks.chaos.federation import Federation
from benchmarks.chaos.processes import processes
from benchmarks.chaos.trial import settings as run_settings
from benchmarks.common import RESULTS, Figure, main
from edgelam_fl.model.source import find_model
from edgelam_fl.trust.authority import Authority
from edgelam_fl.wire import edgelam_pb2 as pb
from tests.fleet import joined
from tests.fuzz import resident_bytes
from tests.parity.daemons import Daemon, running
from tests.parity.test_grpc_processes import fleet_of
from tests.support import run_config, write_data_files, write_tiny_llama

STEPS = 4
LEAVES = 0.05  # a round's chance that a device leaves; it comes back three rounds later
AWAY_ROUNDS = 3
DIRECTLY, THROUGH_FLOWER = "stage hosts directly", "through Flower"
MEMORY_BAR, TIME_BAR, EVENT_BYTES_BAR = 1.05, 1.15, 3000
FLOWER_S = 1800.0


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=1000, help="against stage hosts directly")
    parser.add_argument("--flower", type=int, default=60, help="rounds through Flower")
    parser.add_argument("--seed", type=int, default=1, help="of departures")


@dataclass(frozen=True)
class Look:
    """What a process has at one moment."""

    resident_bytes: int
    threads: int
    files: int


def look(pid: int) -> Look | None:
    """Returns None for a process that has ended."""
    with suppress(OSError):
        threads, files = (len(os.listdir(f"/proc/{pid}/{kind}")) for kind in ("task", "fd"))
        return Look(resident_bytes(pid), threads, files)
    return None


class Looks:
    """Looks at processes over time, by name; a process that was started again has a history of its own."""

    def __init__(self) -> None:
        self.of: dict[tuple[str, int], list[Look]] = defaultdict(list)
        self.round_s: list[float] = []

    def add(self, pids: Mapping[str, int]) -> None:
        for name, pid in pids.items():
            if seen := look(pid):
                self.of[name, pid].append(seen)

    def longest(self) -> dict[str, list[Look]]:
        """Returns the longest history of each name."""
        found: dict[str, list[Look]] = {}
        for (name, _), seen in self.of.items():
            if len(seen) > len(found.get(name, [])):
                found[name] = seen
        return found


def growth(values: Sequence[float]) -> float:
    """Returns the median of the last quarter over that of the second."""
    quarter = max(1, len(values) // 4)
    return statistics.median(values[-quarter:]) / max(1e-9, statistics.median(values[quarter : 2 * quarter] or values))


def measure(smoke: bool, options: argparse.Namespace) -> tuple[dict[str, Any], list[Figure]]:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    rounds, devices = (8, 2) if smoke else (options.rounds, 3)
    figures: list[Figure] = []
    settings: dict[str, Any] = {"rounds": rounds, "seed": options.seed, "steps_of_a_round": STEPS}
    with tempfile.TemporaryDirectory() as name:
        if rounds:
            looks, left = _directly(Path(name), rounds, devices, options.seed)
            figures += _figures(DIRECTLY, looks, not smoke)
            figures.append(Figure(f"{DIRECTLY}: departures by kill -9", left, ""))
        else:
            settings["rounds"] = _before()["settings"]["rounds"]
            figures += _figures_before(DIRECTLY)
        if options.flower and not smoke:
            settings["flower_rounds"] = options.flower
            figures += _through_flower(Path(name) / "flower", options.flower)
        elif not smoke:
            settings["flower_rounds"] = _before()["settings"]["flower_rounds"]
            figures += _figures_before(THROUGH_FLOWER)
    return settings, figures


def _before() -> dict[str, Any]:
    """Returns the last result."""
    found: dict[str, Any] = json.loads((RESULTS / "soak.json").read_text(encoding="utf-8"))
    return found


def _figures_before(where: str) -> list[Figure]:
    return [Figure(**figure) for figure in _before()["figures"] if figure["name"].startswith(where)]


# ---------------------------------------------------------------- stage hosts directly


def _directly(folder: Path, rounds: int, devices: int, seed: int) -> tuple[Looks, int]:
    """Does rounds, from which now and then a device is away; returns what was seen, and how often one left."""
    chance, looks, left = random.Random(seed), Looks(), 0
    files, authority = write_data_files(folder)[:devices], Authority.open(folder / "trust")
    model = find_model(str(write_tiny_llama(folder / "tiny")))
    with running(["edge-1"], files, folder / "daemons", authority) as daemons:
        fleet, adapter = fleet_of(daemons, "soak", model, run_config(model.name, "federation.local_steps=4"), devices)
        everyone, away = dict(fleet.devices), dict[str, int]()
        for number in range(1, rounds + 1):
            for name, back in list(away.items()):
                if number >= back:
                    daemons[name] = everyone[name] = _again(daemons[name])
                    del away[name]
            here = [
                name for name in everyone if name not in away and name != "device-1"
            ]  # which stays, to be looked at
            if here and chance.random() < LEAVES:
                name = chance.choice(here)
                os.kill(daemons[name].child.pid, signal.SIGKILL)
                away[name], left = number + AWAY_ROUNDS, left + 1
            fleet.devices = {name: node for name, node in everyone.items() if name not in away}
            began = time.monotonic()
            reports = fleet.run(adapter, STEPS)
            looks.round_s.append((time.monotonic() - began) / len(fleet.devices))
            adapter = {**adapter, **joined(_done(reports))}
            looks.add({name: daemon.child.pid for name, daemon in daemons.items() if name not in away})
            if number % 50 == 0:
                print(f"round {number} of {rounds}, {left} departures, {looks.round_s[-1]:.2f} s a device", flush=True)
    return looks, left


def _again(gone: Daemon) -> Daemon:
    """Starts a killed stage host again, with its state."""
    gone.close()
    return gone.again()


def _done(reports: dict[str, pb.JobReport]) -> dict[str, pb.JobReport]:
    problems = {name: report.error for name, report in reports.items() if report.state != "done"}
    assert not problems, problems
    return reports


# ---------------------------------------------------------------- through Flower


def _through_flower(folder: Path, rounds: int) -> list[Figure]:
    federation, looks = Federation(folder, ["edge-1"]), Looks()
    try:
        federation.start()
        course = Course(federation.start_run("soak", run_settings(str(federation.model), rounds)))
        end, seen = time.monotonic() + FLOWER_S, 0
        while not course.ended:
            if time.monotonic() > end:
                raise TimeoutError(
                    f"{rounds} rounds took longer than {FLOWER_S:.0f} s: {federation.said('run')[-500:]}"
                )
            time.sleep(0.5)
            course.look()
            if len(course.rounds) > seen:
                seen = len(course.rounds)
                looks.round_s.append(course.rounds[-1].seconds)
                looks.add({str(one): one.pid for one in processes(federation.mark)})
                if seen % 10 == 0:
                    print(f"round {seen} of {rounds} through Flower, {looks.round_s[-1]:.1f} s", flush=True)
        events = course.folder / "events.jsonl"
        size = sum(file.stat().st_size for file in course.folder.glob(f"{events.name}*"))
        per_round = size / (rounds * len(federation.devices))
    finally:
        left = federation.stop()
    return [
        *_figures(THROUGH_FLOWER, looks, bars=True),
        Figure(f"{THROUGH_FLOWER}: events.jsonl, per round and device", round(per_round), "B",
               f"at most {EVENT_BYTES_BAR}", per_round <= EVENT_BYTES_BAR),
        *(Figure(f"{THROUGH_FLOWER}: left behind, {what}", len(things), "", "none", not things) for what, things in left.items()),
    ]  # fmt: skip


# ---------------------------------------------------------------- what has grown


def _figures(where: str, looks: Looks, bars: bool) -> list[Figure]:
    """Returns a figure per process, of those that lived through at least half of the rounds."""
    found = []
    enough = len(looks.round_s) / 2
    for name, seen in sorted(looks.longest().items()):
        if len(seen) < enough and bars:
            continue
        memory = growth([one.resident_bytes for one in seen])
        found += [
            Figure(f"{where}: {name}, resident memory, last quarter over second", round(memory, 3), "",
                   f"at most {MEMORY_BAR:g}" if bars else None, memory <= MEMORY_BAR if bars else None),
            Figure(f"{where}: {name}, resident memory at the end", seen[-1].resident_bytes, "B"),
            *(_level(f"{where}: {name}, {what}", [getattr(one, what) for one in seen], bars) for what in ("threads", "files")),
        ]  # fmt: skip
    drift = growth(looks.round_s)
    return [
        *found,
        Figure(f"{where}: rounds", len(looks.round_s), ""),
        Figure(f"{where}: a round, median", round(statistics.median(looks.round_s), 3), "s"),
        Figure(f"{where}: a round's time, last quarter over second", round(drift, 3), "",
               f"at most {TIME_BAR:g}" if bars else None, drift <= TIME_BAR if bars else None),
    ]  # fmt: skip


def _level(name: str, counts: Sequence[int], bars: bool) -> Figure:
    """Returns how many more there are in the last quarter than in the second, by the medians."""
    quarter = max(1, len(counts) // 4)
    more = statistics.median(counts[-quarter:]) - statistics.median(counts[quarter : 2 * quarter] or counts)
    return Figure(
        f"{name}, more in the last quarter than in the second",
        more,
        "",
        "at most 1" if bars else None,
        more <= 1 if bars else None,
    )


if __name__ == "__main__":
    main("soak", measure, add_options)
