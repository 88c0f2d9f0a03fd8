"""Processes that train step by step when they are told to, and are timed. Knows nothing of how they train.

They are forked from the template of nodes' processes (`edgelam_fl.federation.template`), so that a way to train is not slower
because its libraries were started in another way.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from edgelam_fl.federation.template import warm_template

WAIT_S = 240.0
Trains = Callable[[int], int]  # makes the step of this number; returns the tokens that it trained


@dataclass(frozen=True)
class Step:
    """One training step of a way."""

    wall_s: float
    cpu_s: float  # of all its processes
    tokens: int

    @property
    def per_s(self) -> float:
        return self.tokens / self.wall_s

    @property
    def per_cpu_s(self) -> float:
        return self.tokens / self.cpu_s


class Way(Protocol):
    """One way to train, ready to make steps."""

    def step(self, number: int) -> Step: ...

    def peak_bytes(self) -> list[int]:
        """Returns the peak of resident memory of each of its processes."""


class Workers:
    """A way whose processes make each step together; its time is from the call to the last answer."""

    def __init__(self, processes: Sequence[Worker], *, all_tokens: bool = False) -> None:
        """`all_tokens`: whether each process trains tokens of its own; else all train the same, as the stages of a pipeline do."""
        self._workers, self._all_tokens = processes, all_tokens

    def step(self, number: int) -> Step:
        began = time.monotonic()
        for one in self._workers:
            one.send(number)
        answers = [one.answer() for one in self._workers]
        each = [tokens for _, tokens in answers]
        tokens = sum(each) if self._all_tokens else max(each)
        return Step(time.monotonic() - began, sum(cpu_s for cpu_s, _ in answers), tokens)

    def peak_bytes(self) -> list[int]:
        return [peak_bytes(one.pid) for one in self._workers]


class Worker:
    """One process: makes what `make` returns, says what that wants to be known, and makes steps."""

    def __init__(
        self, make: Callable[..., tuple[Trains, Any]], *arguments: Any, environment: Mapping[str, str] = {}
    ) -> None:
        warm_template()
        self._connection, there = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("forkserver").Process(
            target=_serve, args=(there, make, arguments, dict(environment)), daemon=True
        )
        self._process.start()
        there.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def send(self, number: int) -> None:
        self._connection.send(number)

    def answer(self) -> Any:
        """Returns the next thing that the process says. Raises RuntimeError if it has ended or says nothing."""
        if not self._connection.poll(WAIT_S):
            raise RuntimeError(f"a process has not answered within {WAIT_S:.0f} s")
        try:
            return self._connection.recv()
        except EOFError as error:
            raise RuntimeError("a process has ended early; its output says why") from error

    def close(self) -> None:
        self._connection.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()


def _serve(
    connection: Connection, make: Callable[..., tuple[Trains, Any]], arguments: Sequence[Any], environment: dict[str, str]
) -> None:  # fmt: skip
    os.environ.update(environment)
    trains, news = make(*arguments)
    connection.send(news)
    while True:
        try:
            number = connection.recv()
        except EOFError:
            return
        before = time.process_time()
        tokens = trains(number)
        connection.send((time.process_time() - before, tokens))


@contextmanager
def started(make: Callable[..., tuple[Trains, Any]], *arguments: Any, **settings: Any) -> Iterator[tuple[Worker, Any]]:
    """Starts one worker and waits until it can make steps; yields it and what it wants to be known."""
    with ExitStack() as stack:
        worker = Worker(make, *arguments, **settings)
        stack.callback(worker.close)
        yield worker, worker.answer()


def peak_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM:"))
