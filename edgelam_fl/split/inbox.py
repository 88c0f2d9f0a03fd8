"""The inbox that the one compute thread of a job works from.

The thread may compute for long, so the inbox limits what each link may put in meanwhile: the tensors of its window, and many
but small other frames. Knows neither what a frame means nor who sent it. Neighbours: `wire.link` fills it, `split.route` and
`split.host` empty it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

from edgelam_fl.errors import PeerLost, ProtocolError, RunFailed
from edgelam_fl.split.workers import Work
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.link import Frame, Link

_STEPS_AT_A_TIME = 2  # with tensors in the inbox: a step that was closed without a late device, and the next
_MOST_OTHERS = 4096  # frames without a tensor per link
_MOST_BYTES_OF_OTHERS = 16 << 20


@dataclass(frozen=True)
class Lost:
    """A link has ended."""

    reason: str


@dataclass(frozen=True)
class Cancelled:
    """The job is not to go on."""

    reason: str


@dataclass(frozen=True)
class Out:
    """The server has taken a device out of the job: nobody is to wait for it."""

    device: str
    reason: str


@dataclass
class _Waiting:
    """What a link has put in and nobody has taken out yet."""

    tensors: Counter[tuple[int, int, int]] = field(default_factory=Counter)  # by kind, phase and step
    others: int = 0  # frames without a tensor
    bytes_of_others: int = 0

    def add(self, frame: Frame, window: int) -> None:
        """Counts a frame. Raises ProtocolError if the link may not put it in."""
        header = frame.header
        if frame.tensor is None:
            size = header.ByteSize()
            if self.others >= _MOST_OTHERS or self.bytes_of_others + size > _MOST_BYTES_OF_OTHERS:
                raise ProtocolError(
                    f"{self.others} frames of {self.bytes_of_others} bytes wait to be read; one more is too many"
                )
            self.others += 1
            self.bytes_of_others += size
            return
        step = _step(header)
        if self.tensors.get(step, 0) >= window:
            raise ProtocolError(f"more than {window} micro-batches in flight (split.window)")
        if step not in self.tensors and sum(kind == header.kind for kind, _, _ in self.tensors) >= _STEPS_AT_A_TIME:
            raise ProtocolError(f"micro-batches of more than {_STEPS_AT_A_TIME} steps in flight")
        self.tensors[step] += 1

    def remove(self, frame: Frame) -> bool:
        """Counts a frame as taken out; returns whether none is left."""
        if frame.tensor is None:
            self.others -= 1
            self.bytes_of_others -= frame.header.ByteSize()
        else:
            step = _step(frame.header)
            self.tensors[step] -= 1
            if not self.tensors[step]:
                del self.tensors[step]
        return not self.tensors and not self.others


def _step(header: pb.Header) -> tuple[int, int, int]:
    return header.kind, header.phase, header.step


class Inbox:
    """All that arrives for the compute thread of a job, in order. Transport threads and workers fill it, that thread empties it."""

    def __init__(self, round_s: float) -> None:
        """Starts the clock: `round_s` seconds from now, `get` raises PeerLost."""
        self._queue: queue.SimpleQueue[tuple[Link, Frame | Lost] | Out | Work | Cancelled] = queue.SimpleQueue()
        self._end = time.monotonic() + round_s
        self._counting = threading.Lock()
        self._waiting: dict[Link, _Waiting] = {}
        self.cancelled = ""
        """Why the job is not to go on, also while nobody asks for arrivals; empty: it is."""

    def on_frame(self, link: Link, frame: Frame) -> None:
        """Puts in a frame; for `LinkTerms.on_frame`. Raises ProtocolError if too much of the link waits here already."""
        with self._counting:
            self._waiting.setdefault(link, _Waiting()).add(frame, link.terms.window)
        self._queue.put((link, frame))

    def on_lost(self, link: Link, reason: str) -> None:
        """Puts in the end of a link; for `LinkTerms.on_lost`."""
        self._queue.put((link, Lost(reason)))

    def cancel(self, reason: str) -> None:
        """Ends the job, on any thread: `get` raises RunFailed with the reason."""
        self.cancelled = reason
        self._queue.put(Cancelled(reason))

    def put_out(self, device: str, reason: str) -> None:
        """Has whoever empties this inbox, a host, go on without a device; on any thread."""
        self._queue.put(Out(device, reason))

    def put_over(self, work: Work) -> None:
        """Brings work that a worker of this host is through with; on any thread."""
        self._queue.put(work)

    def empty(self) -> bool:
        """Returns whether nothing has arrived that `get` has not returned yet."""
        return self._queue.empty()

    def get(self, timeout_s: float) -> tuple[Link, Frame | Lost] | Out | Work | None:
        """Returns the next arrival, or None if nothing comes for `timeout_s` seconds.

        Raises RunFailed if the job is cancelled, and its subclass PeerLost if the round's deadline has passed.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise PeerLost("the round's deadline has passed (federation.round_deadline_s)")
        try:
            arrival = self._queue.get(timeout=max(0.0, min(timeout_s, left)))
        except queue.Empty:
            return None
        if isinstance(arrival, Cancelled):
            raise RunFailed(arrival.reason)
        if isinstance(arrival, Out | Work):
            return arrival
        link, item = arrival
        if isinstance(item, Frame):
            with self._counting:
                if self._waiting[link].remove(item):
                    del self._waiting[link]
        return link, item
