"""The calls that one of the hub's services works on at a time: so many in all, so many per member, none that stands still.

Knows no service. A member is known by its certificate; on a port without certificates nobody is, and all share the places.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import grpc

from edgelam_fl.wire.grpc.secure import peer

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PlaceLimits:
    """Limits of the calls of one service."""

    most: int  # at a time
    most_per_member: int  # at a time
    still_s: float  # patience with a caller that takes no byte, or sends none


class Place:
    """The place of one call."""

    def __init__(self, member: str, context: grpc.ServicerContext) -> None:
        self.member, self.context = member, context
        self.waits_since: float | None = None  # for its caller, monotonic; None: the hub itself works on it

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time until the block ends as the caller's, who keeps the call waiting."""
        self.waits_since = time.monotonic()
        try:
            yield
        finally:
            self.waits_since = None


class Places:
    """The places of one service. Safe to call from any thread."""

    def __init__(self, limits: PlaceLimits) -> None:
        self.limits = limits
        self._lock = threading.Lock()
        self._taken: list[Place] = []
        self._watched = False

    @contextmanager
    def place(self, context: grpc.ServicerContext) -> Iterator[Place]:
        """Holds a place until the block ends. Aborts the call if there is none for its caller."""
        who = peer(context)
        place = Place(who.name if who is not None else "", context)
        self._enter(place)
        try:
            yield place
        finally:
            with self._lock:
                self._taken.remove(place)

    def _enter(self, place: Place) -> None:
        limits, refusal = self.limits, ""
        with self._lock:
            own = sum(other.member == place.member for other in self._taken)
            if place.member and own >= limits.most_per_member:
                refusal = f"{own} calls of {place.member} are being served; ask again"
            elif len(self._taken) >= limits.most:
                refusal = f"{limits.most} calls are being served; ask again"
            else:
                self._taken.append(place)
                if not self._watched:
                    self._watched = True
                    threading.Thread(target=self._watch, name="places", daemon=True).start()
        if refusal:
            place.context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, refusal)

    def _watch(self) -> None:
        """Ends calls whose caller stands still, as long as there are calls."""
        while True:
            time.sleep(self.limits.still_s / 10)
            with self._lock:
                if not self._taken:
                    self._watched = False
                    return
                end = time.monotonic() - self.limits.still_s
                still = [place for place in self._taken if place.waits_since is not None and place.waits_since < end]
            for place in still:
                _LOG.warning("ended a call of %s: not a byte for %g s", place.member or "a node", self.limits.still_s)
                place.context.cancel()
