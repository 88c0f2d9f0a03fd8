"""Counts bytes by link, direction and kind, where messages enter and leave the transport. Knows no frames."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable

from edgelam_fl.wire import edgelam_pb2 as pb

GRPC_MESSAGE_FRAME_BYTES = 5  # gRPC's prefix of every message: a flag and a length
UNKNOWN = "UNKNOWN"  # all kinds that this version does not know: a sender may invent any number of them


def kind_name(kind: int) -> str:
    """Returns the name of a kind of frames; UNKNOWN if this version does not know the kind."""
    return pb.Kind.Name(kind) if kind in pb.Kind.values() else UNKNOWN


class ByteCounters:
    """The byte counts of one job: a row per link, direction and known kind. Safe to call from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0, 0])

    def add(self, link: str, direction: str, kind: int, payload_bytes: int, message_bytes: int) -> None:
        """Counts one message. `message_bytes` includes the payload."""
        with self._lock:
            count = self._counts[(link, direction, kind_name(kind))]
            count[0] += payload_bytes
            count[1] += message_bytes - payload_bytes + GRPC_MESSAGE_FRAME_BYTES
            count[2] += 1

    def include(self, rows: Iterable[pb.KindBytes]) -> None:
        """Adds what `report` returned in an earlier attempt of the round."""
        with self._lock:
            for row in rows:
                count = self._counts[(row.link, row.direction, row.kind)]
                count[0] += row.payload_bytes
                count[1] += row.framing_bytes
                count[2] += row.messages

    def total(self, direction: str) -> int:
        """Returns payload and framing of all links in one direction ("sent" or "received"), in bytes."""
        with self._lock:
            return sum(count[0] + count[1] for key, count in self._counts.items() if key[1] == direction)

    def report(self) -> list[pb.KindBytes]:
        """Returns the counts per link, direction and kind, sorted."""
        with self._lock:
            return [
                pb.KindBytes(
                    link=link,
                    direction=direction,
                    kind=kind,
                    payload_bytes=payload,
                    framing_bytes=framing,
                    messages=messages,
                )
                for (link, direction, kind), (payload, framing, messages) in sorted(self._counts.items())
            ]
