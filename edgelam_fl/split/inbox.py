"""The inbox that a job's one compute thread works from."""

from __future__ import annotations

import queue
import time
from dataclasses import dataclass

from edgelam_fl.errors import PeerLost, RunFailed
from edgelam_fl.wire.link import Frame, Link


@dataclass(frozen=True)
class Lost:
    reason: str


@dataclass(frozen=True)
class Cancelled:
    reason: str


class Inbox:
    """What arrived on any link of a job, in order; filled by transport threads, emptied by the compute thread."""

    def __init__(self, round_s: float) -> None:
        self._queue: queue.SimpleQueue[tuple[Link | None, Frame | Lost | Cancelled]] = queue.SimpleQueue()
        self._end = time.monotonic() + round_s

    def on_frame(self, link: Link, frame: Frame) -> None:
        self._queue.put((link, frame))

    def on_lost(self, link: Link, reason: str) -> None:
        self._queue.put((link, Lost(reason)))

    def cancel(self, reason: str) -> None:
        self._queue.put((None, Cancelled(reason)))

    def empty(self) -> bool:
        return self._queue.empty()

    def get(self, timeout_s: float) -> tuple[Link, Frame | Lost] | None:
        """The next arrival, or None after `timeout_s`. Raises RunFailed when the job is cancelled or out of time."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise PeerLost("the round's deadline has passed (federation.round_deadline_s)")
        try:
            link, item = self._queue.get(timeout=max(0.0, min(timeout_s, left)))
        except queue.Empty:
            return None
        if isinstance(item, Cancelled):
            raise RunFailed(item.reason)
        assert link is not None  # only Cancelled comes without a link
        return link, item
