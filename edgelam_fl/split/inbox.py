"""The inbox that the one compute thread of a job works from.

Knows neither what a frame means nor who sent it. Neighbours: `wire.link` fills it, `split.route` and `split.host` empty it.
"""

from __future__ import annotations

import queue
import time
from dataclasses import dataclass

from edgelam_fl.errors import PeerLost, RunFailed
from edgelam_fl.wire.link import Frame, Link


@dataclass(frozen=True)
class Lost:
    """A link has ended."""

    reason: str


@dataclass(frozen=True)
class Cancelled:
    """The job is not to go on."""

    reason: str


class Inbox:
    """All that arrives on the links of a job, in order. Transport threads fill it, the compute thread empties it."""

    def __init__(self, round_s: float) -> None:
        """Starts the clock: `round_s` seconds from now, `get` raises PeerLost."""
        self._queue: queue.SimpleQueue[tuple[Link | None, Frame | Lost | Cancelled]] = queue.SimpleQueue()
        self._end = time.monotonic() + round_s

    def on_frame(self, link: Link, frame: Frame) -> None:
        """Puts in a frame; for `LinkTerms.on_frame`."""
        self._queue.put((link, frame))

    def on_lost(self, link: Link, reason: str) -> None:
        """Puts in the end of a link; for `LinkTerms.on_lost`."""
        self._queue.put((link, Lost(reason)))

    def cancel(self, reason: str) -> None:
        """Ends the job, on any thread: `get` raises RunFailed with the reason."""
        self._queue.put((None, Cancelled(reason)))

    def empty(self) -> bool:
        """Returns whether nothing has arrived that `get` has not returned yet."""
        return self._queue.empty()

    def get(self, timeout_s: float) -> tuple[Link, Frame | Lost] | None:
        """Returns the next arrival, or None if nothing comes for `timeout_s` seconds.

        Raises RunFailed if the job is cancelled, and its subclass PeerLost if the round's deadline has passed.
        """
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
