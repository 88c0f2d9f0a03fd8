"""The queue of a server's runs: one run at a time uses the nodes, the others wait in the order in which they came.

Each run has a ticket, a file that its ServerApp keeps locked. The system unlocks the file of a process that ends, however it
ends, so nobody waits for a run that is gone. Knows neither nodes nor rounds; a server of Flower's own has no queue.
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from edgelam_fl.errors import Busy
from edgelam_fl.telemetry.events import Emit, RunWaits

_PATTERN = "[0-9]" * 8  # of a ticket's name: its number


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueTiming:
    """The clock, waits and pauses of a run that waits for its turn."""

    poll_s: float = 1.0
    """Between two looks at the queue."""
    sign_s: float = 10.0
    """Between two signs of life."""
    sign_part: float = 1 / 60
    """Of the time waited: the pause between two signs, once that is longer than `sign_s`. A run may wait for days."""
    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


@dataclass(frozen=True, slots=True)
class Ahead:
    """A run that is before another in the queue."""

    run: str
    nodes: tuple[str, ...]
    """The nodes that it uses, as it said; () before its first round."""
    job: str = ""
    """The job that these nodes play; "" before its first round."""


class Ticket:
    """One run's place in the queue, kept until `leave` or the end of the process."""

    def __init__(self, folder: Path, run: str) -> None:
        """Takes the last place. `folder`: the queue's, which is made if need be. `run`: what others are told of this one."""
        folder.mkdir(parents=True, exist_ok=True)
        self.left_over: tuple[str, ...] = ()
        """Jobs that nobody leads any more, of earlier runs whose processes were killed; known once nobody is ahead."""
        self._folder, self._run = folder, run
        with self._alone():
            numbers = [int(file.name) for file in folder.glob(_PATTERN)]
            self._path = folder / f"{max(numbers, default=0) + 1:08d}"
            self._file = self._path.open("x", encoding="utf-8")
            fcntl.flock(self._file, fcntl.LOCK_EX)
            self._write((), "")

    def uses(self, nodes: Iterable[str], job: str) -> None:
        """Says which nodes the run uses now, and for which job. A full disk is no reason to end a run: then nobody hears of it."""
        with suppress(OSError), self._alone():
            self._write(sorted(nodes), job)

    def ahead(self) -> list[Ahead]:
        """Returns the runs before this one, the oldest first. Once there are none, removes the tickets of killed processes."""
        with self._alone():
            before = sorted(path for path in self._folder.glob(_PATTERN) if path.name < self._path.name)
            read = {path: _read(path) for path in before}
            alive = [run for run, is_alive in read.values() if is_alive]
            if not alive and before:
                self.left_over += tuple(run.job for run, _ in read.values() if run.job)
                for path in before:
                    path.unlink()
            return alive

    def leave(self) -> None:
        """Gives the ticket up."""
        with self._alone():
            self._path.unlink(missing_ok=True)
            self._file.close()

    def _write(self, nodes: Iterable[str], job: str) -> None:
        """Writes in place: another file would not be locked."""
        self._file.seek(0)
        self._file.truncate()
        self._file.write(json.dumps({"run": self._run, "nodes": list(nodes), "job": job}))
        self._file.flush()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keeps all others from changing the queue."""
        with (self._folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _read(path: Path) -> tuple[Ahead, bool]:
    """Returns what a ticket says, and whether its process lives."""
    with path.open(encoding="utf-8") as file:
        found, is_alive = Ahead("?", ()), False
        with suppress(ValueError, KeyError):  # it could not be written whole
            content = json.loads(file.read())
            found = Ahead(content["run"], tuple(content["nodes"]), content["job"])
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            is_alive = True
        return found, is_alive


@contextmanager
def turn(queue: str, run: str, emit: Emit, timing: QueueTiming = QueueTiming()) -> Iterator[Ticket | None]:
    """Waits until all earlier runs of this server have ended, with signs of life, then yields the run's ticket; leaves it after the
    block. `queue`: the folder; "": the server has none, so that nobody knows of other runs, and None is yielded at once.
    """
    with _ticket(queue, run) as ticket:
        if ticket is not None:
            _await_turn(ticket, emit, timing)
        yield ticket


@contextmanager
def turn_now(queue: str, run: str) -> Iterator[Ticket | None]:
    """Yields a ticket as `turn`, but raises Busy if another run is before this one: for a caller who does not wait."""
    with _ticket(queue, run) as ticket:
        if ticket is not None and (ahead := ticket.ahead()):
            waits = _waits(ahead, 0.0)
            raise Busy(f"the nodes of this server are busy: this {waits.words()}. Try again when that has ended")
        yield ticket


@contextmanager
def _ticket(queue: str, run: str) -> Iterator[Ticket | None]:
    if not queue:
        yield None
        return
    ticket = Ticket(Path(queue), run)
    try:
        yield ticket
    finally:
        ticket.leave()


def _await_turn(ticket: Ticket, emit: Emit, timing: QueueTiming) -> None:
    began = next_sign = timing.now()
    while ahead := ticket.ahead():
        waited_s = timing.now() - began
        if timing.now() >= next_sign:
            next_sign = timing.now() + max(timing.sign_s, timing.sign_part * waited_s)
            emit(_waits(ahead, waited_s))
        timing.sleep(timing.poll_s)


def _waits(ahead: Sequence[Ahead], waited_s: float) -> RunWaits:
    first = ahead[0]
    return RunWaits(run=first.run, nodes=first.nodes, runs_ahead=len(ahead), seconds=round(waited_s, 1))
