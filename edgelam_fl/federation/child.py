"""Starts, watches and ends child processes, which end with their parent, and keeps their logs short.

Knows neither Flower nor nodes nor what the processes say to each other.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from edgelam_fl.addresses import answers
from edgelam_fl.errors import EnvironmentProblem, RunFailed
from edgelam_fl.federation.environment import child_environment
from edgelam_fl.federation.template import ForkedProcess, can_fork

GRACE_S = 5.0  # between SIGTERM and SIGKILL
_LOOK_S = 0.1  # between two looks at whether a process has ended
# Has the kernel send a signal when the process that started it ends, even by kill -9, then becomes the command. A program of
# its own and no preexec_fn: with one, Python forks, and gRPC threads that wake in the fork abort it before it is the command.
_END_WITH_PARENT = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, int(sys.argv[1]))  # 1: PR_SET_PDEATHSIG
if os.getppid() == int(sys.argv[2]):
    os.execvp(sys.argv[3], sys.argv[3:])
"""
_COLOUR = re.compile("\x1b\\[[0-9;]*m")  # Flower's logs have some


class Child:
    """One process in a session of its own, its output in a log file."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        environment: dict[str, str] | None = None,
        forked: bool = False,
        hosts: Sequence[str] = (),
    ) -> None:
        """Starts `command` with an environment of its own and what `environment` adds; appends its output to `log`.

        forked: for `python -m MODULE ...` only: forks it from the template, which has its own `environment`, if this system
        can. hosts: machines that it reaches directly, whatever proxies are set.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        self.name, self.log = name, log
        self.again = partial(Child, name, tuple(command), log, environment, forked, tuple(hosts))
        """Starts another process like this one."""
        self._process: subprocess.Popen[bytes] | ForkedProcess
        shorten(log)
        if forked and can_fork():
            _python, _m, module, *arguments = command
            log.touch()
            self._process = ForkedProcess(module, arguments, log)
            return
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                ending_with_this(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C reaches the parent alone, which ends its children in order
                env={**child_environment(*hosts), **(environment or {})},
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ended(self) -> str:
        """Returns the exit status and the end of the log, as one line; empty while the process runs."""
        status = self._status()
        return "" if status is None else f"{self.name} ended with status {status}: {log_tail(self.log)}"

    def _status(self) -> int | None:
        """Returns the exit status, None while running. Kills leftovers of the session on exit, before the pid can be reused."""
        if self._process.returncode is None and self._process.poll() is not None:
            self._signal(signal.SIGKILL)
        return self._process.returncode

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def ask_to_end(self) -> None:
        """Sends SIGTERM to the process and its own children."""
        if self._status() is None:
            self._signal(signal.SIGTERM)

    def make_end(self, grace_s: float = GRACE_S) -> None:
        """Waits `grace_s` for the process to end, then kills it and its own children."""
        end = time.monotonic() + grace_s
        while self._status() is None and time.monotonic() < end:
            time.sleep(0.02)
        if self._status() is None:
            self._signal(signal.SIGKILL)
            self._process.wait()


def ending_with_this(command: Sequence[str], number: signal.Signals = signal.SIGTERM) -> list[str]:
    """Returns a command that becomes `command` and gets the signal `number` when the thread of this process that started it
    ends, on Linux; elsewhere `command` itself.
    """
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", "-c", _END_WITH_PARENT, str(int(number)), str(os.getpid()), *command]


def end_all(children: Sequence[Child], grace_s: float = GRACE_S) -> None:
    """Ends all processes, which share one grace period."""
    for child in children:
        child.ask_to_end()
    end = time.monotonic() + grace_s
    for child in children:
        child.make_end(max(0.1, end - time.monotonic()))


def pause(seconds: float, children: Iterable[Child]) -> None:
    """Waits `seconds`, or until one of the processes has ended: whoever watches over them starts it again at once."""
    watched, end = list(children), time.monotonic() + seconds
    while not any(child.ended() for child in watched) and (left_s := end - time.monotonic()) > 0:
        time.sleep(min(_LOOK_S, left_s))


def await_answer(child: Child, host: str, port: int, deadline_s: float = 180.0) -> None:
    """Waits until the process answers at its port. Ends the process and raises EnvironmentProblem if it does not."""
    end = time.monotonic() + deadline_s
    while not answers(host, port, 0.5):
        if child.ended() or time.monotonic() > end:
            problem = child.ended() or f"no answer within {deadline_s:.0f} s"
            end_all([child])
            raise EnvironmentProblem(f"the {child.name} did not start: {problem}")
        time.sleep(0.1)


class Restarts:
    """Counts the restarts of a group of processes, to give up on one that keeps ending."""

    def __init__(self, most: int = 3, within_s: float = 120.0) -> None:
        self._most, self._within_s = most, within_s
        self._moments: list[float] = []

    def note(self, problem: str) -> None:
        """Counts one restart. Raises RunFailed if there were more than `most` within the last `within_s` seconds."""
        now = time.monotonic()
        self._moments = [moment for moment in self._moments if now - moment < self._within_s] + [now]
        if len(self._moments) > self._most:
            raise RunFailed(f"{problem} (restart {len(self._moments)} within {self._within_s:.0f} s)")


# ---------------------------------------------------------------- logs


def log_tail(log: Path, lines: int = 3) -> str:
    """Returns the last lines of a log that are not empty, as one line."""
    with contextlib.suppress(OSError), log.open(encoding="utf-8", errors="replace") as file:
        kept = deque((_COLOUR.sub("", line).strip() for line in file if line.strip()), maxlen=lines)
        return " | ".join(kept) or "no output"
    return "it left no log"


def shorten(log: Path, most_bytes: int = 4 << 20, kept_bytes: int = 256 << 10) -> None:
    """Cuts a log that is longer than `most_bytes` down to whole lines of its last `kept_bytes`, while others append.

    A board's card is small, and a node may run for years. A disk that fails costs the log, and nothing else.
    """
    with contextlib.suppress(OSError):
        if not log.exists() or log.stat().st_size <= most_bytes:
            return
        with log.open("rb") as old:
            old.seek(-kept_bytes, os.SEEK_END)
            kept = old.read().partition(b"\n")[2]
        os.truncate(log, 0)  # in place: its writers have it open
        with log.open("ab") as new:
            new.write(kept)
