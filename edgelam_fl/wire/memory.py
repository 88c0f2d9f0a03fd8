"""Links inside one process: frames, chunks, checks and byte counts as over gRPC, without a network and without waiting."""

from __future__ import annotations

from collections.abc import Callable

from edgelam_fl.wire.counters import ByteCounters
from edgelam_fl.wire.link import CLOSED, Link


class MemoryLink(Link):
    """One end of a link in memory: hands each message to its peer at once, on the sender's thread; a pace limits nothing."""

    peer: MemoryLink

    def _transmit(self, priority: int, messages: list[bytes], left: Callable[[], None] | None) -> None:
        for message in messages:
            self.peer.receive(message)
        if left is not None:
            left()

    def _shut(self, lost: bool) -> None:
        self.peer.lost(CLOSED)


def memory_pair(name: str, left: ByteCounters, right: ByteCounters) -> tuple[MemoryLink, MemoryLink]:
    """Returns the two ends of a new link, neither of them open yet."""
    one, two = MemoryLink(name, left), MemoryLink(name, right)
    one.peer, two.peer = two, one
    return one, two
