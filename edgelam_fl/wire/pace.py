"""Enforces a share of the bandwidth: a token bucket on bytes, shared by links that send in the same direction.

Senders book bytes and get the moment at which these may leave; the more is booked, the further ahead the moment. Knows
nothing about links, frames or urgency: a sender with an urgent message books it and ignores the moment.
Neighbour: `wire.outbox`, which waits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

BURST_S = 0.02  # how much of its share an idle link saves up; short, because others use the medium meanwhile


class Pace:
    """A rate limit: at most `bytes_per_s` over any time that is long against a chunk. Safe to call from any thread."""

    def __init__(self, bytes_per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        if not bytes_per_s > 0:
            raise ValueError(
                f"a pace of {bytes_per_s} bytes per second; it must be above 0 (for no limit give no pace)"
            )
        self.bytes_per_s = bytes_per_s
        self.clock = clock
        self._lock = threading.Lock()
        self._free_at = clock()

    def book(self, count_bytes: float) -> float:
        """Takes bytes out of the bucket, or into debt if it is empty; returns the moment, by `clock`, when they may leave.

        Serves bookings in their order. A negative count gives back booked bytes that are not sent.
        """
        with self._lock:
            moment = max(self._free_at, self.clock() - BURST_S)
            self._free_at = moment + count_bytes / self.bytes_per_s
        return moment
