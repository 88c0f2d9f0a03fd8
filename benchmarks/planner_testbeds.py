"""Compares the planner's predictions with measurements on five different testbeds, and its plan with equal cuts on one of them.

Needs a Docker engine. Each testbed has a server, edge servers and devices as containers, each with its share of a core, its memory
limit and `tc` rates both ways; together they use at most 0.9 of this machine's cores, with one torch thread each. The planner
places the layers (split.hosts = split.cuts = "auto"). The first testbed has CPUs of 1.0, 0.4 and 0.2 and links of 100, 20
and 5 Mbit/s (two edge servers, and the device with the data); the same containers run it a second time with equal cuts.

These are compared over three training rounds (`benchmarks.planner.compared`):

    step      `step_s` of the plans of rounds 2 and 3, with the slowest device's training time per step, from its JobReport
    memory    `memory_bytes`, the predicted peak of the stage host's process, with its peak_rss_bytes

A plan uses the times of earlier rounds. The first round's prediction, from profiles alone, is shown too, without a bar.
Containers and the ServerApp start with all cores; times are measured only after each has its share.
This measures time: run it on a machine that does nothing else. The output shows how many cores other programs used meanwhile,
and how many the hypervisor took (steal). A testbed that is finished in runs/benchmark-planner-testbeds is not run again:
remove its folder there to repeat it. --smoke: the first testbed, one step per round, no bars.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.big_llama import CONFIG, write_llama
from benchmarks.common import Figure, main
from benchmarks.links import write_pairs
from benchmarks.planner import compared, predicted_first, speed_up
from edgelam_fl.tasks.docstrings import write_device_files
from testbed.__main__ import IMAGE, started, train
from testbed.compose import RUNS, SERVER, cpu_limit
from testbed.engine import Project, build, check_engine
from testbed.shapes import MachineShape, Testbed, TestbedNode

PROJECT = "edgelam-planner"
LLAMA = "/models/llama"
# Takes much compute per transferred byte, so that hosts matter and not only links.
MODEL = {
    **CONFIG, "vocab_size": 300, "hidden_size": 512, "intermediate_size": 6144, "num_hidden_layers": 22,
    "num_attention_heads": 8, "num_key_value_heads": 2,
}  # fmt: skip
SERVER_CPUS = 0.2
_FINISHED = "finished.json"
RUN = """\
[model]
name = "{model}"
[split]
front = {ends}
back = {ends}
hosts = "auto"
cuts = "auto"
micro_batches = {micro_batches}
window = {micro_batches}
[federation]
rounds = {rounds}
local_steps = {steps}
evaluate_every = {rounds}
batch_size = {batch}
join_deadline_s = 600
step_deadline_s = 600
[task]
max_tokens = {tokens}
[data]
held_out = 0.05
"""


@dataclass(frozen=True)
class Machine:
    cpus: float
    mbps: float
    memory: str = "4 GiB"


@dataclass(frozen=True)
class Bed:
    """One testbed and the run on it."""

    name: str
    edges: Sequence[Machine]
    devices: Sequence[Machine]
    micro_batches: int
    tokens: int
    rows: int = 1  # per micro-batch
    steps: int = 2
    model: str = LLAMA
    ends: int = 1  # layers at each end of a device
    rounds: int = 3

    @property
    def run_file(self) -> str:
        batch = self.rows * self.micro_batches
        return RUN.format(
            model=self.model, ends=self.ends, micro_batches=self.micro_batches, steps=self.steps, batch=batch,
            tokens=self.tokens, rounds=self.rounds,
        )  # fmt: skip

    def testbed(self) -> Testbed:
        machines = {f"edge-{n}": machine for n, machine in enumerate(self.edges, 1)}
        machines |= {f"device-{n}": machine for n, machine in enumerate(self.devices, 1)}
        shapes = {
            name: MachineShape(memory=m.memory, cpus=m.cpus, up=f"{m.mbps:g} Mbit/s", down=f"{m.mbps:g} Mbit/s")
            for name, m in machines.items()
        }
        nodes = tuple(
            TestbedNode(shape=name, name=name, role="edge" if "edge" in name else "device") for name in machines
        )
        server = {"server": MachineShape(memory="2 GiB", cpus=SERVER_CPUS)}
        return Testbed(shapes=shapes | server, server="server", nodes=nodes)


BEDS = (
    Bed("unlike", [Machine(1.0, 100), Machine(0.4, 20)], [Machine(0.2, 5)], micro_batches=8, tokens=64, steps=1),
    Bed(
        "alike", [Machine(0.5, 100), Machine(0.5, 100)], [Machine(0.6, 100)], micro_batches=4, tokens=64, rows=2,
        model="smollm2-135m", ends=2,
    ),
    Bed("slow-link", [Machine(0.6, 100), Machine(0.5, 100)], [Machine(0.4, 2)], micro_batches=6, tokens=32),
    Bed(
        "short-memory", [Machine(0.8, 100, "1280 MiB"), Machine(0.4, 100)], [Machine(0.4, 100)], micro_batches=4,
        tokens=64,
    ),
    Bed(
        "two-devices", [Machine(0.6, 100), Machine(0.4, 100)], [Machine(0.3, 20), Machine(0.3, 100)], micro_batches=3,
        tokens=64,
    ),
)  # fmt: skip


def measure(smoke: bool, options: argparse.Namespace) -> tuple[dict[str, Any], list[Figure]]:
    out = Path("runs").absolute() / ("benchmark-planner-testbeds" + ("-smoke" if smoke else ""))
    if smoke:
        shutil.rmtree(out, ignore_errors=True)
    beds = [replace(BEDS[0], steps=1)] if smoke else BEDS
    beds = [bed for bed in beds if not options.finished or (out / bed.name / _FINISHED).exists()]
    if not options.finished:
        check_engine()
        build(IMAGE)
    model = write_llama(out.parent / "benchmark-llama-wide", MODEL)
    figures, took_s = list[Figure](), 0.0
    for bed in beds:
        equal = bed.name == BEDS[0].name
        if not (out / bed.name / _FINISHED).exists():
            shutil.rmtree(out / bed.name, ignore_errors=True)
            run_bed(bed, out / bed.name, model, equal=equal)
        figures += of_bed(out / bed.name, equal=equal)
        took_s += json.loads((out / bed.name / _FINISHED).read_text(encoding="utf-8"))["seconds"]
    figures.append(Figure(f"{len(beds)} testbeds of {len(BEDS)} together", round(took_s, 1), "s"))
    if smoke:
        figures = [replace(figure, bar=None, holds=None) for figure in figures]
    Console().print(table(figures))
    settings = {
        "beds": {bed.name: {"edges": list(map(str, bed.edges)), "devices": list(map(str, bed.devices)), "run": bed.run_file}
                 for bed in BEDS},
        "server_cpus": SERVER_CPUS, "cores": os.cpu_count(), "model": MODEL,
    }  # fmt: skip
    return settings, figures


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--finished", action="store_true", help="report the finished testbeds; run none")


def table(figures: Sequence[Figure]) -> Table:
    shown = Table(box=None)
    for column in ("figure", "value", "asked", "holds"):
        shown.add_column(column)
    for figure in figures:
        held = "" if figure.holds is None else "yes" if figure.holds else "MISSED"
        shown.add_row(figure.name, f"{figure.value:g} {figure.unit}", figure.bar or "", held)
    return shown


def of_bed(folder: Path, *, equal: bool) -> list[Figure]:
    """Returns the figures of a finished testbed."""
    finished = json.loads((folder / _FINISHED).read_text(encoding="utf-8"))
    figures = [*compared(folder / folder.name), predicted_first(folder / folder.name)]
    for key, words in (("others", "others used meanwhile"), ("stolen", "were stolen meanwhile")):
        figures.append(Figure(f"{folder.name}: cores that {words}", round(max(finished[key]), 2), ""))
    return [*figures, speed_up(folder / folder.name, folder / "equal")] if equal else figures


def run_bed(bed: Bed, folder: Path, model: Path, *, equal: bool) -> None:
    began = time.monotonic()
    with bed_started(bed, folder, model) as containers:
        runs = [train_bed(bed, containers, folder / bed.name)]
        if equal:
            cuts = ["split.cuts=equal", f"split.hosts={len(bed.edges)}"]
            runs.append(train_bed(bed, containers, folder / "equal", cuts))
    finished = {**{key: [run[key] for run in runs] for key in runs[0]}, "seconds": time.monotonic() - began}
    (folder / _FINISHED).write_text(json.dumps(finished) + "\n", encoding="utf-8")


@contextmanager
def bed_started(bed: Bed, folder: Path, model: Path) -> Iterator[Project]:
    """Makes a new folder, starts the testbed's containers with it, yields them and removes them."""
    folder.mkdir(parents=True)
    mounts = {} if bed.model != LLAMA else {str(model): LLAMA}
    with started(bed.testbed(), folder, PROJECT, Console(), _data(bed, folder), mounts, lend=True) as containers:
        yield containers


def _data(bed: Bed, folder: Path) -> list[Path]:
    if bed.model != LLAMA:
        return list(write_device_files(folder / "data", len(bed.devices)))
    return [write_pairs(folder / f"device-{n}.jsonl", bed.tokens) for n in range(1, len(bed.devices) + 1)]


def train_bed(bed: Bed, containers: Project, folder: Path, overrides: Sequence[str] = ()) -> dict[str, float]:
    """Runs the testbed; returns how many cores other programs used meanwhile, and how many were stolen."""
    testbed, run_file = bed.testbed(), folder.with_name("run.toml")
    run_file.write_text(bed.run_file, encoding="utf-8")
    began, ours_s, busy_s, stolen_s = time.monotonic(), _computed_s(containers, testbed), *_busy_s()
    with _server_lent_cores(containers, testbed, f"{RUNS}/{folder.name}/events.jsonl"):
        train(containers, testbed, folder, run_file, overrides, name=folder.name)
    ours_s = _computed_s(containers, testbed) - ours_s
    busy_later_s, stolen_later_s = _busy_s()
    took_s = time.monotonic() - began
    return {"others": (busy_later_s - busy_s - ours_s) / took_s, "stolen": (stolen_later_s - stolen_s) / took_s}


def _computed_s(containers: Project, testbed: Testbed) -> float:
    return sum(containers.cpu_seconds(service) or 0.0 for service, _ in testbed.services())


def _busy_s() -> tuple[float, float]:
    """Returns the seconds, summed over all cores of this machine, spent computing and stolen."""
    times = psutil.cpu_times()
    stolen_s = getattr(times, "steal", 0.0)
    return sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0) - stolen_s, stolen_s


@contextmanager
def _server_lent_cores(containers: Project, testbed: Testbed, events: str) -> Iterator[None]:
    """Gives the server all cores until its ServerApp has loaded, so until the run's first event."""
    own = testbed.shapes[testbed.server].cpus
    containers.limit_cpus(SERVER, **cpu_limit(float(os.cpu_count() or 1)))
    with once(containers, f"test -s {events}", lambda _: containers.limit_cpus(SERVER, **cpu_limit(own))):
        yield


@contextmanager
def once(containers: Project, test: str, act: Callable[[bool], None]) -> Iterator[None]:
    """Tries a shell command on the server every second; calls `act(True)` once it succeeds, or `act(False)` at the end."""
    stop = threading.Event()

    def wait() -> None:
        held = False
        while not held and not stop.wait(1.0):
            held = bool(containers.ask(SERVER, f"{test} && echo yes"))
        act(held)

    waiter = threading.Thread(target=wait, daemon=True)
    waiter.start()
    try:
        yield
    finally:
        stop.set()
        waiter.join()


if __name__ == "__main__":
    main("planner_testbeds", measure, add_options)
