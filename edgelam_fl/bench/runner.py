"""Runs the cells of a matrix on one SuperLink and some fabrics; a finished cell is one line of a file.

The next run of the same matrix skips finished cells; a cell that fails leaves its reason, and the others go on. Knows
neither the terminal nor how results are compared.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import json
import math
import os
import queue
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from edgelam_fl.addresses import free_port
from edgelam_fl.bench import datasets
from edgelam_fl.bench.matrix import Axes, Cell, Matrix
from edgelam_fl.config import RunConfig
from edgelam_fl.errors import ConfigError, EdgelamError, EnvironmentProblem, RunFailed
from edgelam_fl.federation.child import Child, end_all
from edgelam_fl.federation.flower_app import app_module
from edgelam_fl.federation.local import bounds_of_a_local_run
from edgelam_fl.federation.operator import Operator, operator_folder
from edgelam_fl.federation.submission import FollowTiming, Submission
from edgelam_fl.federation.superlink import start_superlink
from edgelam_fl.telemetry.events import (
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
from edgelam_fl.telemetry.measures import MEASURES, shown_value
from edgelam_fl.telemetry.summary import pooled
from edgelam_fl.wire.control import FABRIC_SEPARATOR

_POLL_S = 0.1
_TIMING = FollowTiming(poll_s=_POLL_S, silence_s=60.0)
_START_S = 180.0
FAILED = "failed"  # the folder beside the results with what is left of cells that failed
_LOG_BYTES = 200_000  # that are kept of a fabric's log, which all its cells share
_DONE = "done"  # an empty file in the folder of a cell that finished


def check_extra(find_module: Callable[[str], object] = importlib.util.find_spec) -> None:
    """Raises EnvironmentProblem if a package of the extra is not installed."""
    for module in ("ray", "sklearn"):
        if find_module(module) is None:
            raise EnvironmentProblem(
                f"edgelam bench needs the package {module}, which is not installed: pip install 'edgelam-fl[bench]' "
                f"(in a checkout: make setup)"
            )


def check_cells(matrix: Matrix, classes: tuple[str, ...]) -> dict[str, RunConfig]:
    """Returns the run file of each cell, by its name. Raises UsageError for a wrong one, before the first cell starts."""
    check = app_module("server.checks").check_config
    configs = {}
    for cell in matrix.cells():
        configs[cell.name] = matrix.config(cell, classes)
        check(configs[cell.name], bounds_of_a_local_run())
    return configs


# ---------------------------------------------------------------- what is finished


class Results:
    """The file cells.jsonl in the out folder: one line per cell that ended."""

    def __init__(self, out: Path, matrix: Matrix) -> None:
        """Raises ConfigError if the folder holds the cells of another matrix."""
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / "cells.jsonl"
        mark, of_matrix = out / "matrix.sha256", _digest(matrix)
        if mark.exists() and mark.read_bytes().strip() != of_matrix.encode():
            raise ConfigError(
                f"{out} holds cells of another matrix ([bench] or [base] differ); choose another --out, or remove {out}"
            )
        mark.write_text(of_matrix + "\n", encoding="utf-8")

    def lines(self) -> dict[str, Any]:
        """Returns the newest line of each cell, by the cell's name."""
        if not self.path.exists():
            return {}
        found = {}
        for text in self.path.read_bytes().splitlines():
            # The last line of a command that was killed; such a cell is computed again.
            with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
                line = json.loads(text.decode())
                found[line["name"]] = line
        return found

    def add(self, line: Mapping[str, Any]) -> None:
        """Appends the line of a cell that ended."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _digest(matrix: Matrix) -> str:
    """Hashes the settings that all cells have in common: a matrix with more values on an axis is still the same one."""
    shared = {"bench": matrix.bench.model_dump(mode="json"), "base": matrix.base}
    if matrix.tune.keys:  # a change of what may be chosen changes the tries and the cells
        shared["tune"] = matrix.tune.model_dump(mode="json")
    return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- the processes


@dataclass
class Engine:
    """The processes that all cells use: a SuperLink and the fabrics, each of which plays the nodes of one cell."""

    operator: Operator
    children: list[Child]
    idle: queue.SimpleQueue[Path]  # the folders of the fabrics that no cell uses

    def check(self) -> None:
        """Raises RunFailed if a process has ended."""
        for child in self.children:
            if child.ended():
                raise RunFailed(child.ended())

    @contextlib.contextmanager
    def fabric(self) -> Iterator[Path]:
        """Lends a fabric to one cell, once one is idle; gives its folder."""
        fabric = self.idle.get()
        try:
            yield fabric
        finally:
            self.idle.put(fabric)


@contextlib.contextmanager
def engine(state: Path, cells: int) -> Iterator[Engine]:
    """Starts a SuperLink with Flower's simulation engine and a fabric per cell at a time; ends them after the block.

    Each fabric is a process; together as many nodes compute at a time as there are cores: two nodes in one process wait
    for Python's lock, and ran at the speed of 1.4 cores.
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
        children.append(start_superlink("127.0.0.1", port, state, quiet, bounds=bounds_of_a_local_run()))
        for child, fabric in zip(children[:cells], fabrics, strict=True):
            _await(child, (fabric / "endpoint.json").exists)
            idle.put(fabric)
        yield Engine(Operator(f"127.0.0.1:{port}", operator_folder(state)), children, idle)
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
    """Runs one federation and returns its events; `feed` receives each as it comes. Raises RunFailed with its reason."""
    submission = Submission(engine.operator)
    # One worker of Flower's is enough: it passes jobs and reports on, the fabric computes.
    simulation = f"num-supernodes={nodes} client-resources-num-cpus=1 init-args-num-cpus=1"
    submission.submit(config, folder / "run", fabric=f"{fabric}{FABRIC_SEPARATOR}{folder}", simulation=simulation)
    events: list[Event] = []
    try:
        for event in submission.events(meanwhile=engine.check, timing=_TIMING):
            feed(event)
            events.append(event)
            if isinstance(event, RunFailure):
                raise RunFailed(event.reason, event.exit_code)
    except RunFailed:
        with contextlib.suppress(RunFailed, OSError):  # the reason matters more than its log
            (folder / "flower.log").write_text(submission.printed(), encoding="utf-8")
        raise
    return events


# ---------------------------------------------------------------- one cell


def play(
    engine: Engine, matrix: Matrix, cells: Sequence[Cell], config: RunConfig, data: datasets.Data, out: Path,
    feed: Callable[[Event], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """Trains the first of `cells` and replays its time for the others; returns a line per cell, with results or a reason."""
    cell = cells[0]
    folder = out / "work" / cell.name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(out / FAILED / cell.name, ignore_errors=True)
    began = time.monotonic()
    fabric: Path | None = None
    hosts = config.split.least_hosts * config.split.sites if config.split.host_on == "edge" else 0
    try:
        datasets.write_cell(folder, data, matrix.bench, cell, hosts)
        with engine.fabric() as fabric:
            events = run_cell(engine, fabric, config, folder, hosts + matrix.bench.devices, feed)
        check_complete(events, matrix.bench.devices, cell.values["attack"] == "none")
        ends = [{"state": "done", **outcome(_replayed(events, config, cell, each))} for each in cells]
    except EdgelamError as error:
        engine.check()  # without its processes every other cell would fail too
        logs = keep_failed(folder, out / FAILED / cell.name, fabric.with_suffix(".log") if fabric else None)
        ends = [{"state": "failed", "reason": str(error), "logs": f"{logs.relative_to(out)}"} for _ in cells]
    if ends[0]["state"] == "done":
        for older in _finished(folder.parent):  # without this one, whose ServerApp still writes its report
            shutil.rmtree(older, ignore_errors=True)
        (folder / _DONE).touch()
    ends[0]["seconds"] = round(time.monotonic() - began, 1)
    for end in ends[1:]:
        end |= {"seconds": 0.0, "trained": cell.name}
    named = [{"name": each.name, "cell": {axis: each.values[axis] for axis in Axes.model_fields}} for each in cells]
    return [{**name, **end} for name, end in zip(named, ends, strict=True)]


def keep_failed(folder: Path, kept: Path, log: Path | None) -> Path:
    """Moves the folder of a cell that failed out of the way of the others, with the end of its fabric's log; returns its new place."""
    folder.mkdir(parents=True, exist_ok=True)
    if log is not None and log.is_file():
        (folder / log.name).write_bytes(log.read_bytes()[-_LOG_BYTES:])
    kept.parent.mkdir(parents=True, exist_ok=True)
    return folder.replace(kept)


def check_complete(events: list[Event], devices: int, honest: bool) -> None:
    """Raises RunFailed if devices did not join or one was lost, as on a machine that is far too busy.

    honest: no device attacks. To lose an attacker, or a device that [wireless] drops, is part of the measurement.
    """
    joined = {event.node for event in of_kind(events, NodeJoined) if event.role == "device"}
    lost = list(of_kind(events, NodeLost))
    if len(joined) < devices:
        raise RunFailed(
            f"{len(joined)} of {devices} devices answered: this machine may be too busy; run the command again"
        )
    if lost and honest:
        raise RunFailed(f"{lost[0].node} was lost in round {lost[0].round} ({lost[0].reason}): run the command again")


def _replayed(events: list[Event], config: RunConfig, trained: Cell, cell: Cell) -> list[Event]:
    """Returns the events of the cell that was trained, in the virtual time of `cell`'s bandwidth strategy."""
    if cell is trained:
        return events
    replay = app_module("server.virtual.replay").replay
    rounds = iter(replay(events, config, cell.values["bandwidth"], bounds_of_a_local_run()))
    return [
        replace(event, virtual=next(rounds)) if isinstance(event, RoundDone) and event.virtual else event
        for event in events
    ]


def _finished(work: Path) -> list[Path]:
    return [mark.parent for mark in work.glob(f"*/{_DONE}")]


def outcome(events: Sequence[Event]) -> dict[str, Any]:
    """Sums up a run's events: the quality over bytes, rounds and virtual time, and the last value of each.

    Raises RunFailed if a device's held-out loss overflowed: no mean over seeds could be made of it.
    """
    curve: list[dict[str, Any]] = []
    spent = {"bytes": 0, "virtual_seconds": 0.0, "joules": 0.0}
    errors = []
    personal = any(plan.personal for plan in of_kind(events, PlanMade))
    for done in of_kind(events, RoundDone):
        quality = pooled(done.devices)
        if math.inf in quality.values():
            raise RunFailed(
                f"its held-out {next(iter(quality))} after round {done.round - 1} is beyond all numbers: training diverged"
            )
        if quality:
            shown = {name: shown_value(name, value) for name, value in quality.items()}
            curve.append({"round": done.round - 1, **shown, **spent})
        if not done.steps:
            continue  # the measurement after the last round is not a cost of learning
        spent["bytes"] += sum(_bytes(node) for node in (*done.devices, *done.hosts))
        spent["virtual_seconds"] += done.virtual.seconds if done.virtual else 0.0
        spent["joules"] += done.virtual.joules if done.virtual else 0.0
        errors.append(done.aggregation_error)
    known = [error for error in errors if error is not None]
    last = curve[-1] if curve else {}
    measured = {name: last[name] for name in MEASURES if name in last}
    return {
        "accuracy": None, "perplexity": None, **measured, **spent, "personal": personal,
        "aggregation_error": sum(known) / len(known) if known else None, "data": _data_counts(events), "curve": curve,
    }  # fmt: skip


def _data_counts(events: Sequence[Event]) -> dict[str, int]:
    """Returns the examples of all devices, and how many of them were cut or left out."""
    joined = {event.node: event for event in of_kind(events, NodeJoined)}.values()
    return {
        "examples": sum(each.examples + each.held_out for each in joined),
        "cut": sum(each.cut for each in joined),
        "left_out": sum(each.skipped + each.bad for each in joined),
    }


def _bytes(node: NodeResult) -> int:
    return int(total((node.bytes_up, node.bytes_down, node.adapter_bytes_up, node.adapter_bytes_down)) or 0)
