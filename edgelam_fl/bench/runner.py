"""Runs the cells of a matrix on one SuperLink and one fabric; a finished cell is one line of a file.

What is finished is skipped the next time; a cell that fails leaves its reason, and the others go on.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import json
import os
import queue
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

import psutil

from edgelam_fl.addresses import free_port
from edgelam_fl.bench import datasets
from edgelam_fl.bench.matrix import Axes, Cell, Matrix
from edgelam_fl.config import RunConfig
from edgelam_fl.errors import ConfigError, EdgelamError, EnvironmentProblem, RunFailed
from edgelam_fl.federation.child import Child, end_all
from edgelam_fl.federation.flower_app import app_module
from edgelam_fl.federation.submission import Submission, Timing
from edgelam_fl.federation.superlink import start_superlink
from edgelam_fl.telemetry.events import (
    DeviceResult,
    Event,
    NodeJoined,
    NodeLost,
    NodeResult,
    PlanMade,
    RoundDone,
    RunFailure,
    of_kind,
)
from edgelam_fl.telemetry.human import total
from edgelam_fl.wire.control import FABRIC_SEPARATOR

_POLL_S = 0.1
_TIMING = Timing(poll_s=_POLL_S, silence_s=60.0)
_START_S = 180.0
_DONE = "done"  # an empty file in the folder of a cell that came through


def check_extra() -> None:
    """Raises EnvironmentProblem where Flower's simulation engine is not installed."""
    for module in ("ray", "sklearn"):
        if importlib.util.find_spec(module) is None:
            raise EnvironmentProblem(
                f"edgelam bench needs the package {module}, which is not here: pip install 'edgelam-fl[bench]' "
                f"(in a checkout: make setup)"
            )


def check_cells(matrix: Matrix, classes: tuple[str, ...]) -> dict[str, RunConfig]:
    """The run file of each cell, by its name; what is wrong in any is said before the first one starts."""
    check = app_module("server.checks").check_config
    configs = {}
    for cell in matrix.cells():
        configs[cell.name] = matrix.config(cell, classes)
        check(configs[cell.name])
    return configs


# ---------------------------------------------------------------- what is finished


class Results:
    """cells.jsonl in the out folder: a line a cell that ended."""

    def __init__(self, out: Path, matrix: Matrix) -> None:
        """Raises ConfigError where the folder holds the cells of another matrix."""
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / "cells.jsonl"
        mark, of_matrix = out / "matrix.sha256", _digest(matrix)
        if mark.exists() and mark.read_text(encoding="utf-8").strip() != of_matrix:
            raise ConfigError(
                f"{out} holds cells of another matrix ([bench] or [base] differ); choose another --out, or remove {out}"
            )
        mark.write_text(of_matrix + "\n", encoding="utf-8")

    def lines(self) -> dict[str, Any]:
        """The newest line of each cell, by the cell's name."""
        if not self.path.exists():
            return {}
        found = {}
        for text in self.path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # the last one, of a command that was killed
                line = json.loads(text)
                found[line["name"]] = line
        return found

    def add(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _digest(matrix: Matrix) -> str:
    """Of what all cells share: more values on an axis are the same matrix, continued."""
    shared = {"bench": matrix.bench.model_dump(mode="json"), "base": matrix.base}
    return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- the processes


@dataclass
class Engine:
    """The processes that all cells share."""

    server: str
    children: list[Child]
    idle: queue.SimpleQueue[Path]  # the fabrics that no cell has

    def check(self) -> None:
        for child in self.children:
            if child.ended():
                raise RunFailed(child.ended())

    @contextlib.contextmanager
    def fabric(self) -> Iterator[Path]:
        """One for a cell alone."""
        fabric = self.idle.get()
        try:
            yield fabric
        finally:
            self.idle.put(fabric)


@contextlib.contextmanager
def engine(state: Path, cells: int) -> Iterator[Engine]:
    """A SuperLink with Flower's simulation engine, and a fabric for each of so many cells at a time.

    A process each, together with as many nodes computing as there are cores: two nodes in one process wait for Python's
    lock, and ran at the speed of 1.4 cores.
    """
    children: list[Child] = []
    idle: queue.SimpleQueue[Path] = queue.SimpleQueue()
    port, seats = free_port(), -(-(os.cpu_count() or 1) // cells)
    try:
        fabrics = [state / f"fabric-{number}" for number in range(1, cells + 1)]
        for fabric in fabrics:
            children.append(_start_fabric(fabric, seats))
        quiet = {
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "RAY_worker_niceness": "0",  # Ray's 15 starves the nodes' messages where anything else computes
            "OMP_NUM_THREADS": "1",
        }
        children.append(start_superlink("127.0.0.1", port, state, quiet))
        for child, fabric in zip(children[:cells], fabrics, strict=True):
            _await(child, (fabric / "endpoint.json").exists)
            idle.put(fabric)
        yield Engine(f"127.0.0.1:{port}", children, idle)
    finally:
        left = [process for child in children for process in _descendants(child)]
        end_all(children[::-1])
        for process in left:  # Flower's simulations and their Rays outlive the SuperLink that started them
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def _start_fabric(folder: Path, seats: int) -> Child:
    (folder / "endpoint.json").unlink(missing_ok=True)
    command = [sys.executable, "-m", "edgelam_fl.simulation.daemon", "--state", str(folder), "--seats", str(seats)]
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1")}
    return Child(folder.name, command, folder.with_suffix(".log"), environment)


def _descendants(child: Child) -> list[psutil.Process]:
    try:
        return psutil.Process(child.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _await(child: Child, ready: Callable[[], bool]) -> None:
    end = time.monotonic() + _START_S
    while not ready():
        if child.ended() or time.monotonic() > end:
            raise EnvironmentProblem(
                child.ended() or f"{child.name} did not start within {_START_S:.0f} s: {child.log}"
            )
        time.sleep(_POLL_S)


def run_cell(
    engine: Engine, fabric: Path, config: RunConfig, folder: Path, nodes: int, feed: Callable[[Event], None]
) -> list[Event]:
    """One federation from submission to its last event; `feed` sees each event as it comes. Raises RunFailed."""
    submission = Submission(engine.server, folder / "flwr")
    # one worker of Flower's is enough: it hands jobs over and brings reports, the fabric computes
    simulation = f"num-supernodes={nodes} client-resources-num-cpus=1 init-args-num-cpus=1"
    submission.submit(config, folder / "run", fabric=f"{fabric}{FABRIC_SEPARATOR}{folder}", simulation=simulation)
    events: list[Event] = []
    for event in submission.events(meanwhile=engine.check, timing=_TIMING):
        feed(event)
        events.append(event)
        if isinstance(event, RunFailure):
            raise RunFailed(event.reason)
    return events


# ---------------------------------------------------------------- one cell


def play(
    engine: Engine, matrix: Matrix, cells: Sequence[Cell], config: RunConfig, data: datasets.Data, out: Path,
    feed: Callable[[Event], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """Trains the first of `cells` and replays its time for the others: a line each, what it came to or why it failed."""
    cell = cells[0]
    folder = out / "work" / cell.name
    shutil.rmtree(folder, ignore_errors=True)
    began = time.monotonic()
    hosts = config.split.least_hosts * config.split.sites if config.split.host_on == "edge" else 0
    try:
        datasets.write_cell(folder, data, matrix.bench, cell, hosts)
        with engine.fabric() as fabric:
            events = run_cell(engine, fabric, config, folder, hosts + matrix.bench.devices, feed)
        check_complete(events, matrix.bench.devices, cell.values["attack"] == "none")
        ends = [{"state": "done", **outcome(_replayed(events, config, cell, each))} for each in cells]
    except EdgelamError as error:
        engine.check()  # without its processes no other cell would fare better
        ends = [{"state": "failed", "reason": str(error)} for _ in cells]
    if ends[0]["state"] == "done":
        for older in _finished(folder.parent):  # but this one: its ServerApp still writes its report
            shutil.rmtree(older, ignore_errors=True)
        (folder / _DONE).touch()
    ends[0]["seconds"] = round(time.monotonic() - began, 1)
    for end in ends[1:]:
        end |= {"seconds": 0.0, "trained": cell.name}
    named = [{"name": each.name, "cell": {axis: each.values[axis] for axis in Axes.model_fields}} for each in cells]
    return [{**name, **end} for name, end in zip(named, ends, strict=True)]


def check_complete(events: list[Event], devices: int, honest: bool) -> None:
    """Raises RunFailed where fewer devices came than the matrix has, or one was lost, as on a machine that is far too busy.

    Losing one that attacks, or dropping out with `[wireless]`, is part of what is measured.
    """
    joined = {event.node for event in of_kind(events, NodeJoined) if event.role == "device"}
    lost = list(of_kind(events, NodeLost))
    if len(joined) < devices:
        raise RunFailed(
            f"{len(joined)} of {devices} devices answered: this machine was too busy; run the command again"
        )
    if lost and honest:
        raise RunFailed(f"{lost[0].node} was lost in round {lost[0].round} ({lost[0].reason}): run the command again")


def _replayed(events: list[Event], config: RunConfig, trained: Cell, cell: Cell) -> list[Event]:
    """The events of the cell that was trained, in the virtual time of another's bandwidth strategy."""
    if cell is trained:
        return events
    replay = app_module("server.virtual.replay").replay
    rounds = iter(replay(events, config, cell.values["bandwidth"]))
    return [
        replace(event, virtual=next(rounds)) if isinstance(event, RoundDone) and event.virtual else event
        for event in events
    ]


def _finished(work: Path) -> list[Path]:
    return [mark.parent for mark in work.glob(f"*/{_DONE}")]


def outcome(events: Sequence[Event]) -> dict[str, Any]:
    """Sums up a run's events: the quality over bytes, rounds and virtual time, and the end of each."""
    curve: list[dict[str, Any]] = []
    spent = {"bytes": 0, "virtual_seconds": 0.0, "joules": 0.0}
    errors = []
    personal = any(plan.personal for plan in of_kind(events, PlanMade))
    for done in of_kind(events, RoundDone):
        quality = _quality(done.devices)
        if quality:
            curve.append({"round": done.round - 1, **quality, **spent})
        if not done.steps:
            continue  # the measurement after the last round costs the federation nothing that it had not learned for
        spent["bytes"] += sum(_bytes(node) for node in (*done.devices, *done.hosts))
        spent["virtual_seconds"] += done.virtual.seconds if done.virtual else 0.0
        spent["joules"] += done.virtual.joules if done.virtual else 0.0
        errors.append(done.aggregation_error)
    known = [error for error in errors if error is not None]
    last = curve[-1] if curve else {}
    return {
        "accuracy": last.get("accuracy"), "perplexity": last.get("perplexity"), **spent, "personal": personal,
        "aggregation_error": sum(known) / len(known) if known else None, "curve": curve,
    }  # fmt: skip


def _quality(devices: Iterable[DeviceResult]) -> dict[str, float]:
    """Averages over all devices that measured, each with its equal part of the test set."""
    accuracies = [accuracy for device in devices if (accuracy := device.metrics.get("accuracy")) is not None]
    perplexities = [device.perplexity for device in devices if device.perplexity]
    if accuracies:
        return {"accuracy": fmean(accuracies)}
    return {"perplexity": geometric_mean(perplexities)} if perplexities else {}


def _bytes(node: NodeResult) -> int:
    return int(total((node.bytes_up, node.bytes_down, node.adapter_bytes_up, node.adapter_bytes_down)) or 0)
