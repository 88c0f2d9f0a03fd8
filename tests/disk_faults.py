"""Disks that fail, and processes that are killed, at a chosen operation on files: in this process, so that a test can try them all."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

# C functions that change the disk, by the name that Python's profiler sees; reading ones are left alone.
_WRITES = {"write", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir", "ftruncate", "truncate", "open"}
_NEED_ROOM = {"write", "fsync", "mkdir", "ftruncate", "truncate"}  # what a full disk can refuse


class Killed(BaseException):
    """Stands for a kill -9."""


def operations(act: Callable[[], object]) -> int:
    """Returns how many operations on files `act` does that a kill could come before."""
    counter = _Counter(_WRITES, lambda count: None)
    counter.watch(act)
    return counter.count


def kill_at(number: int, act: Callable[[], object]) -> bool:
    """Runs `act` and kills it before its file operation `number`, from 1; returns whether it came that far.

    From then on no operation is carried out any more: what `act` would do to clean up does not happen.
    """

    def kill(count: int) -> None:
        if count >= number:
            raise Killed

    try:
        _Counter(_WRITES, kill).watch(act)
    except Killed:
        return True
    return False


def fill_at(number: int, act: Callable[[], object]) -> bool:
    """Runs `act` on a disk that is full for its write `number`, from 1, and has room again after it; returns whether it came
    that far. Raises what `act` makes of it.
    """
    reached = False

    def fill(count: int) -> None:
        nonlocal reached
        if count == number:
            reached = True
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    _Counter(_NEED_ROOM, fill).watch(act)
    return reached


class _Counter:
    def __init__(self, names: set[str], at: Callable[[int], None]) -> None:
        self._names, self._at, self.count = names, at, 0

    def watch(self, act: Callable[[], object]) -> None:
        before = sys.getprofile()
        sys.setprofile(self._on_event)
        try:
            act()
        finally:
            sys.setprofile(before)

    def _on_event(self, frame: FrameType, event: str, called: Any) -> None:
        if event != "c_call" or called.__name__ not in self._names:
            return
        owner = getattr(called, "__self__", None)
        if called.__name__ == "write" and owner in (sys.stdout, sys.stderr):
            return
        self.count += 1
        self._at(self.count)
