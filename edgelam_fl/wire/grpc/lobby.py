"""The lobby of a port: streams that were not let in yet, few per peer address and in all, each for a limited time.

A newcomer never waits and is never turned away: if there are too many, the one that has waited longest is hung up on. An
honest dialler sends HELLO with its first bytes and has left long before. Knows no frames.
Neighbour: `wire.grpc.serve`, which lets streams in.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from edgelam_fl.wire.grpc.options import MOST_CONNECTIONS


@dataclass(frozen=True, kw_only=True)
class LobbyLimits:
    """How many connections a port takes, and how many streams its lobby."""

    connections: int = MOST_CONNECTIONS

    places: int = 64
    places_per_address: int = 8  # as soon as half of all places are taken; many devices may share an address


DEFAULT_LOBBY_LIMITS = LobbyLimits()


@dataclass(eq=False)
class _Guest:
    address: str
    hang_up: Callable[[], object]
    end: float  # monotonic, s


class Lobby:
    """The streams of one port that were not let in yet. Safe to call from any thread."""

    def __init__(self, limits: LobbyLimits, stay_s: float) -> None:
        """`stay_s`: how long a stream may stay, in seconds."""
        self._limits, self._stay_s = limits, stay_s
        self._changed = threading.Condition()
        self._guests: dict[_Guest, None] = {}  # in the order of arrival
        self._of_address: Counter[str] = Counter()
        self._closed = False
        threading.Thread(target=self._watch, name="lobby", daemon=True).start()

    def __len__(self) -> int:
        with self._changed:
            return len(self._guests)

    @contextmanager
    def place(self, address: str, hang_up: Callable[[], object]) -> Iterator[None]:
        """Holds a place until the block ends. `hang_up` ends the stream: it is called if the place is lost first."""
        guest = _Guest(address, hang_up, time.monotonic() + self._stay_s)
        with self._changed:
            self._guests[guest] = None
            self._of_address[address] += 1
            surplus = self._surplus(address)
            self._changed.notify()
        if surplus is not None:
            surplus.hang_up()
        try:
            yield
        finally:
            with self._changed:
                self._forget(guest)

    def close(self) -> None:
        """Ends the watch over the guests' time. The streams end with their port."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _surplus(self, address: str) -> _Guest | None:
        """Forgets and returns the guest that has to go now that one came from `address`; None if there is room."""
        limits, taken = self._limits, len(self._guests)
        crowded = 2 * taken > limits.places and self._of_address[address] > limits.places_per_address
        if not crowded and taken <= limits.places:
            return None
        leaving = next(guest for guest in self._guests if not crowded or guest.address == address)
        self._forget(leaving)
        return leaving

    def _forget(self, guest: _Guest) -> None:
        if guest in self._guests:
            del self._guests[guest]
            self._of_address[guest.address] -= 1
            self._of_address += Counter()  # drops addresses without a guest

    def _watch(self) -> None:
        while True:
            with self._changed:
                oldest = next(iter(self._guests), None)
                left_s = None if oldest is None else oldest.end - time.monotonic()
                if self._closed:
                    return
                if oldest is None or left_s is None or left_s > 0:
                    self._changed.wait(left_s)
                    continue
                self._forget(oldest)
            oldest.hang_up()
