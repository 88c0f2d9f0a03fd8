"""Records who did what and when in a train phase."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from edgelam_fl.wire import edgelam_pb2 as pb

_INTERVALS_KEPT = 400


class Timeline:
    """Who did what, when, in a train phase: the newest few hundred intervals of one role at one node."""

    def __init__(self, role: str) -> None:
        self._role = role
        self._zero = 0.0  # monotonic, when the phase opened; nothing is kept before
        self._intervals: deque[pb.Interval] = deque(maxlen=_INTERVALS_KEPT)

    def open(self) -> None:
        self._zero = self._zero or time.monotonic()

    @contextmanager
    def interval(self, kind: str, header: pb.Header, peer: str = "") -> Iterator[None]:
        began = time.monotonic()
        yield
        self._add(kind, began, time.monotonic(), header, peer)

    def sent(self, header: pb.Header, queued: float, left: float) -> None:
        """A tensor's way from the queue into the network; called by the sender."""
        self._add("send", queued, left, header, "", header.tensor.total_bytes)

    def _add(self, kind: str, began: float, ended: float, header: pb.Header, peer: str, tensor_bytes: int = 0) -> None:
        if self._zero and began >= self._zero:
            self._intervals.append(
                pb.Interval(
                    kind=kind,
                    role=self._role,
                    start_s=round(began - self._zero, 4),
                    seconds=round(ended - began, 4),
                    step=header.step,
                    micro_batch=header.micro_batch,
                    peer=peer,
                    tensor_bytes=tensor_bytes,
                )
            )

    def report(self) -> list[pb.Interval]:
        return list(self._intervals)
