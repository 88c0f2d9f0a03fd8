"""Starts, watches and ends child processes, which end with their parent.

Knows nothing of what the processes say to each other.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from edgelam_fl.addresses import answers
from edgelam_fl.errors import EnvironmentProblem, RunFailed

_GRACE_S = 5.0
_START_DEADLINE_S = 180.0
_RESTARTS, _RESTARTS_WITHIN_S = 3, 120.0
_PR_SET_PDEATHSIG = 1
_COLOUR = re.compile("\x1b\\[[0-9;]*m")  # Flower's logs have some
_MOST_LOG_BYTES, _KEPT_LOG_BYTES = 4 << 20, 256 << 10  # a board's card is small, and a node may run for years


class Child:
    """One process in a session of its own, its output in a log file."""

    def __init__(self, name: str, command: Sequence[str], log: Path, environment: dict[str, str] | None = None) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.name, self.log = name, log
        shorten(log)
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C reaches the parent alone, which ends its children in order
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
                env={**tool_environment(), **(environment or {})},
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ended(self) -> str:
        """Empty while it runs; else its exit status and the end of its log."""
        status = self._status()
        return "" if status is None else f"{self.name} ended with status {status}: {log_tail(self.log)}"

    def _status(self) -> int | None:
        """None while it runs. What an ended one left behind in its session ends at once: later its number may be another's."""
        if self._process.returncode is None and self._process.poll() is not None:
            self._signal(signal.SIGKILL)
        return self._process.returncode

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def ask_to_end(self) -> None:
        if self._status() is None:
            self._signal(signal.SIGTERM)

    def make_end(self, grace_s: float = _GRACE_S) -> None:
        end = time.monotonic() + grace_s
        while self._status() is None and time.monotonic() < end:
            time.sleep(0.02)
        if self._status() is None:
            self._signal(signal.SIGKILL)
            self._process.wait()


def tool_environment() -> dict[str, str]:
    """This process's environment with this Python's console scripts on PATH: Flower's own start each other by name."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}


def _end_with_parent() -> None:
    # However the parent ends, kill -9 included, the kernel then sends SIGTERM here.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def end_all(children: Sequence[Child]) -> None:
    for child in children:
        child.ask_to_end()
    end = time.monotonic() + _GRACE_S
    for child in children:
        child.make_end(max(0.1, end - time.monotonic()))


def log_tail(log: Path, lines: int = 3) -> str:
    with contextlib.suppress(OSError), log.open(encoding="utf-8", errors="replace") as file:
        kept = deque((_COLOUR.sub("", line).strip() for line in file if line.strip()), maxlen=lines)
        return " | ".join(kept) or "it said nothing"
    return "it left no log"


def shorten(log: Path) -> None:
    """Leaves the end of a log that has grown long. Its writers, which append, go on behind that."""
    if not log.exists() or log.stat().st_size <= _MOST_LOG_BYTES:
        return
    with log.open("rb") as old:
        old.seek(-_KEPT_LOG_BYTES, os.SEEK_END)
        kept = old.read().partition(b"\n")[2]
    os.truncate(log, 0)  # in place: its writers have it open
    with log.open("ab") as new:
        new.write(kept)


def _await_answer(child: Child, host: str, port: int) -> None:
    end = time.monotonic() + _START_DEADLINE_S
    while not answers(host, port, 0.5):
        if child.ended() or time.monotonic() > end:
            problem = child.ended() or f"no answer within {_START_DEADLINE_S:.0f} s"
            end_all([child])
            raise EnvironmentProblem(f"the {child.name} did not start: {problem}")
        time.sleep(0.1)


def _note_restart(restarts: list[float], problem: str) -> None:
    """Adds one to `restarts`. Raises RunFailed where there are too many in a short time."""
    now = time.monotonic()
    restarts[:] = [moment for moment in restarts if now - moment < _RESTARTS_WITHIN_S] + [now]
    if len(restarts) > _RESTARTS:
        raise RunFailed(f"{problem} (for the {len(restarts)}th time in {_RESTARTS_WITHIN_S:.0f} s)")
