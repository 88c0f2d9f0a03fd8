"""A node's snapshots on its disk: what a restarted node, or a new attempt of a round, goes on from.

    snapshots/RUN/rounds/000003.snap                   at the end of a round: tensors held, and the optimizers' moments
    snapshots/RUN/steps/000003/000001/ends/8-8.snap    after 8 steps of attempt 1 of round 3: the device's own layers

A state that holds for several numbers of steps, since no step of this source lies between, is kept once: 8-12. Files are written
whole and brought to the disk by a thread of their own, so that training does not wait. They are read as what they may be: a file
whose digest does not fit is ignored, and an event says so. A disk that is full costs snapshots, never a part of a round.

Knows files and names; knows nothing about what a state holds (`split.snapshot`).
"""

from __future__ import annotations

import contextlib
import queue
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from urllib.parse import quote

from google.protobuf.message import DecodeError

from edgelam_fl.errors import Refused
from edgelam_fl.files import write_private
from edgelam_fl.plan.reading import part_id
from edgelam_fl.plan.resuming import keeps_steps, work_key
from edgelam_fl.split.snapshot import NO_KEEPER, Damaged, Keeper, SourceState
from edgelam_fl.telemetry.events import Emit, SnapshotIgnored, SnapshotLost
from edgelam_fl.wire import edgelam_pb2 as pb

FOLDER = "snapshots"  # below a node's state
_RUNS_KEPT, _ROUNDS_KEPT = 2, 2
_STEPS_KEPT = 4  # per source: nodes of a site are up to a few steps apart, and all need the same one
_PATIENCE_S = 10.0  # with a disk that does not take what waits
_STEPS_FILE = re.compile(r"(\d+)-(\d+)\.snap")

Write = Callable[[Path, bytes], None]
Leave = Callable[[str, tuple[int, int], bytes], None]  # source, first and last number of steps, state


def _write(path: Path, data: bytes) -> None:
    write_private(path, data, durable=True)


class Snapshots:
    """The snapshots of one node."""

    def __init__(self, state: Path | None, emit: Emit, write: Write = _write) -> None:
        """`state`: the node's folder; None: nothing is kept. `write`: replaces a file, and returns when it is on the disk."""
        self._folder = None if state is None else state / FOLDER
        self._emit, self._write_file = emit, write
        self._waiting: queue.Queue[tuple[str, Path, Callable[[], None]]] = queue.Queue(maxsize=2)
        self._writer: threading.Thread | None = None
        self._leaving = threading.Condition()  # guards the next
        self._to_leave: dict[str, tuple[str, Callable[[bytes], None], SourceState]] = {}  # by source
        self._leaver: threading.Thread | None = None

    # ---------------------------------------------------------------- within a round

    def begin(self, plan: pb.Plan) -> None:
        """Removes what no attempt of the plan's round can go on from, and the snapshots of runs that are over."""
        self.flush()
        if self._folder is None or not self._folder.is_dir():
            return
        own = self._run(plan.run)
        runs = [run for run in self._folder.iterdir() if run != own]
        for old in sorted(runs, key=_changed)[: max(0, len(runs) - _RUNS_KEPT + 1)]:
            shutil.rmtree(old, ignore_errors=True)
        for round_ in (own / "steps").glob("*"):
            if round_.name != _number(plan.round):
                shutil.rmtree(round_, ignore_errors=True)
        for attempt in self._round(plan.run, plan.round).glob("*"):
            if not plan.first_step or attempt.name != _number(plan.resume_attempt):
                shutil.rmtree(attempt, ignore_errors=True)
                continue
            for file, (first, last) in [found for source in attempt.iterdir() for found in _steps_in(source)]:
                if not first <= plan.first_step <= last:
                    file.unlink(missing_ok=True)

    def keeper(self, plan: pb.Plan, moments: str, leave: Leave | None = None) -> Keeper:
        """Returns what keeps the states of a plan's sources after every `snapshot_every` steps.

        `moments`: as in the report. `leave`: leaves those after every `kept_every` steps at the hub; None: they stay here.
        """
        if not (plan.snapshot_every and keeps_steps(plan)):
            return NO_KEEPER

        def take(source: str, steps: Sequence[int], state: SourceState) -> None:
            state = SourceState(state.arrays, {**state.numbers, "work": _work(plan)}, state.report)
            state.report.moments = moments
            if self._folder is not None:
                folder = self._attempt(plan.run, plan.round, plan.attempt) / quote(source, safe="")
                self._put(folder / f"{steps[0]}-{steps[-1]}.snap", state, part_id(plan), _STEPS_KEPT)
            at_hub = [number for number in steps if plan.kept_every and number % plan.kept_every == 0]
            if leave is not None and at_hub:
                self._leave(plan, source, partial(leave, source, (at_hub[0], at_hub[-1])), state)

        def drop(source: str) -> None:
            if self._folder is not None:
                folder = self._attempt(plan.run, plan.round, plan.attempt) / quote(source, safe="")
                self._hand_over(part_id(plan), folder, lambda: shutil.rmtree(folder, ignore_errors=True))

        return Keeper(plan.snapshot_every, take, drop)

    def steps(self, run: str, round_: int) -> list[pb.StepSnapshot]:
        """Lists the snapshots of a round, oldest first: those that all sources of this node have."""
        self.flush()
        with contextlib.suppress(OSError):  # a new attempt removes them at this moment
            return self._listed(run, round_) if self._folder is not None else []
        return []

    def _listed(self, run: str, round_: int) -> list[pb.StepSnapshot]:
        found: list[tuple[int, int]] = []
        for attempt in self._round(run, round_).glob("*"):
            sources = [_steps_covered(source) for source in attempt.iterdir()]
            found += [(int(attempt.name), steps) for steps in set.intersection(*sources)] if sources else []
        return [pb.StepSnapshot(attempt=attempt, steps=steps) for attempt, steps in sorted(found)]

    def resumed(self, plan: pb.Plan, sources: Sequence[str], given: bytes = b"") -> dict[str, SourceState]:
        """Returns the states of a plan's sources after its `first_step`. Raises Refused if one is missing or not the plan's.

        `given`: KeptStates, of the host whose place this node takes; empty: the node has its own.
        """
        self.flush()
        try:
            kept = pb.KeptStates.FromString(given)
            lent = {source: SourceState.from_bytes(data) for source, data in kept.states.items()}
        except (DecodeError, Damaged) as error:
            raise Refused(f"node {plan.node} was given a snapshot that is damaged: {error}") from error
        return {source: self._resumed(plan, source, lent.get(source)) for source in sources}

    def _resumed(self, plan: pb.Plan, source: str, lent: SourceState | None) -> SourceState:
        if lent is not None and lent.numbers.get("work") == _work(plan):
            return lent
        folder = self._attempt(plan.run, plan.round, plan.resume_attempt) / quote(source, safe="")
        for file, (first, last) in _steps_in(folder) if self._folder is not None else []:
            if first <= plan.first_step <= last and (state := self._read(file)) is not None:
                if state.numbers.get("work") != _work(plan):
                    raise Refused(f"node {plan.node} has a snapshot of step {plan.first_step} of another plan")
                return state
        raise Refused(
            f"node {plan.node} has no snapshot of {source} after {plan.first_step} steps of attempt {plan.resume_attempt}"
        )

    def _leave(self, plan: pb.Plan, source: str, leave: Callable[[bytes], None], state: SourceState) -> None:
        """Has a state left at the hub; of a source whose older one still waits, the newest alone."""
        with self._leaving:
            self._to_leave[source] = part_id(plan), leave, state
            self._leaving.notify()
            if self._leaver is None:
                self._leaver = threading.Thread(target=self._leave_all, name="left snapshots", daemon=True)
                self._leaver.start()

    def _leave_all(self) -> None:
        while True:
            with self._leaving:
                while not self._to_leave:
                    self._leaving.wait()
                source = next(iter(self._to_leave))
                job, leave, state = self._to_leave.pop(source)
            try:
                leave(state.to_bytes())
            except Exception as error:  # noqa: BLE001 - a hub that is gone, full or older costs its copy, whatever it raises
                self._emit(SnapshotLost(job=job, file=f"{source} at the hub", reason=type(error).__name__))

    # ---------------------------------------------------------------- between rounds

    def keep_round(self, plan: pb.Plan, state: SourceState) -> None:
        """Keeps what the node holds at the end of a round; returns when it is on the disk, or cannot be."""
        if self._folder is not None:
            self._put(
                self._run(plan.run) / "rounds" / f"{_number(plan.round)}.snap", state, part_id(plan), _ROUNDS_KEPT
            )
            self.flush()

    def rounds(self, run: str) -> Iterator[SourceState]:
        """Yields what was kept at the end of rounds, newest first."""
        if self._folder is not None:
            self.flush()
            for file in sorted((self._run(run) / "rounds").glob("*.snap"), reverse=True):
                if (state := self._read(file)) is not None:
                    yield state

    # ---------------------------------------------------------------- files

    def _run(self, run: str) -> Path:
        assert self._folder is not None
        return self._folder / f"run-{quote(run, safe='')}"

    def _round(self, run: str, round_: int) -> Path:
        return self._run(run) / "steps" / _number(round_)

    def _attempt(self, run: str, round_: int, attempt: int) -> Path:
        return self._round(run, round_) / _number(attempt)

    def _read(self, file: Path) -> SourceState | None:
        """Returns what a file holds; None if it is damaged, which an event says, and then it is removed."""
        try:
            return SourceState.from_bytes(file.read_bytes())
        except (Damaged, OSError) as error:
            self._emit(SnapshotIgnored(file=file.name, reason=str(error)))
            with contextlib.suppress(OSError):
                file.unlink()
            return None

    def _put(self, file: Path, state: SourceState, job: str, most: int) -> None:
        """Has a state written. `most`: files of the folder that stay, the newest."""

        def write() -> None:
            self._write_file(file, state.to_bytes())
            for old in sorted(file.parent.glob("*.snap"), key=_first_number)[:-most]:
                old.unlink(missing_ok=True)

        self._hand_over(job, file, write)

    def _hand_over(self, job: str, path: Path, work: Callable[[], None]) -> None:
        """Has the writer do something about a file or a folder, after all that it was given before."""
        if self._writer is None:
            self._writer = threading.Thread(target=self._write_all, name="snapshots", daemon=True)
            self._writer.start()
        try:
            self._waiting.put((job, path, work), timeout=_PATIENCE_S)
        except queue.Full:
            self._emit(
                SnapshotLost(job=job, file=path.name, reason=f"the disk takes nothing since {_PATIENCE_S:.0f} s")
            )

    def flush(self) -> None:
        """Waits until all that was handed over is on the disk, as long as the disk takes some of it every few seconds."""
        with self._waiting.all_tasks_done:
            while self._waiting.unfinished_tasks:
                before = self._waiting.unfinished_tasks
                self._waiting.all_tasks_done.wait(_PATIENCE_S)
                if self._waiting.unfinished_tasks == before:
                    return

    def _write_all(self) -> None:
        while True:
            job, path, work = self._waiting.get()
            try:
                work()
            except OSError as error:
                self._emit(SnapshotLost(job=job, file=path.name, reason=error.strerror or type(error).__name__))
            finally:
                self._waiting.task_done()


def _work(plan: pb.Plan) -> str:
    """Returns what must be the same in an attempt that goes on from this one: the work, and what the round starts from."""
    return f"{work_key(plan)} {plan.adapter_digest}"


def _number(number: int) -> str:
    return f"{number:06d}"


def _first_number(file: Path) -> int:
    return int(file.name.split("-")[0].removesuffix(".snap"))


def _changed(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0


def _steps_in(folder: Path) -> list[tuple[Path, tuple[int, int]]]:
    """Lists the files of a source, with the first and the last number of steps that each is the state after."""
    named = [(file, _STEPS_FILE.fullmatch(file.name)) for file in sorted(folder.glob("*.snap"))]
    return [(file, (int(match[1]), int(match[2]))) for file, match in named if match]


def _steps_covered(folder: Path) -> set[int]:
    return {step for _, (first, last) in _steps_in(folder) for step in range(first, last + 1)}
