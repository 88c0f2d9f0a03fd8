"""A share of the bandwidth, enforced: a token bucket on bytes that the links of one direction share.

Senders book bytes and are told the moment at which these may leave; that moment lies further ahead the more has been
booked. Knows nothing about links, frames or what is urgent: who need not wait books and does not look at the moment.
Neighbour: `wire.outbox`, which waits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

BURST_S = 0.02  # what an idle link may save up; short, because the share of others is taken meanwhile


class Pace:
    """At most `bytes_per_s` over any time that is long against a chunk; safe to call from any thread."""

    def __init__(self, bytes_per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        if not bytes_per_s > 0:
            raise ValueError(f"a pace of {bytes_per_s} bytes a second; it must be above 0 (no limit: no pace)")
        self.bytes_per_s = bytes_per_s
        self.clock = clock
        self._lock = threading.Lock()
        self._free_at = clock()

    def book(self, count_bytes: float) -> float:
        """Takes bytes out of the bucket, into debt where it is empty; returns when, by `clock`, they may leave.

        Bookings are served in their order. A negative count gives back what was booked and is not sent.
        """
        with self._lock:
            moment = max(self._free_at, self.clock() - BURST_S)
            self._free_at = moment + count_bytes / self.bytes_per_s
        return moment
