"""Records who did what and when in a train phase. Knows nothing about what an interval means to the report."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from edgelam_fl.wire import edgelam_pb2 as pb

_INTERVALS_KEPT = 400


class Timeline:
    """The newest few hundred intervals of one role at one node."""

    def __init__(self, role: str) -> None:
        """`role`: "device" or "host"."""
        self._role = role
        self._zero = 0.0  # when the phase opened (monotonic, s); 0: not yet, and nothing is kept
        self._intervals: deque[pb.Interval] = deque(maxlen=_INTERVALS_KEPT)

    def open(self) -> None:
        """Starts the phase: intervals count from now. Later calls change nothing."""
        self._zero = self._zero or time.monotonic()

    @contextmanager
    def interval(self, kind: str, header: pb.Header, peer: str = "") -> Iterator[None]:
        """Records the block as an interval of `kind`. `header`: names step and micro-batch. `peer`: a host's device."""
        began = time.monotonic()
        yield
        self._add(kind, began, time.monotonic(), header, peer)

    def sent(self, header: pb.Header, queued: float, left: float) -> None:
        """Records how long a tensor took from the queue into the network; for `LinkTerms.on_sent`."""
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
        """Returns what was recorded, oldest first."""
        return list(self._intervals)
