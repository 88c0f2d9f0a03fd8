"""Orders the messages of a link: control before gradients before activations, changed between chunks, data at its pace.

Knows messages and their urgency; does not know what is in them.
Neighbours: `wire.grpc` fills it and gives its iterator to gRPC; `wire.pace` says when data may leave.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from edgelam_fl.wire.counters import GRPC_MESSAGE_FRAME_BYTES
from edgelam_fl.wire.pace import Pace

CONTROL, GRADIENTS, ACTIVATIONS = 0, 1, 2  # numbers of the queues, the most urgent first


@dataclass
class _Parcel:
    """A message in its queue."""

    message: bytes
    pace: Pace | None
    left: Callable[[], None] | None = None  # called after the transport has taken the message

    @property
    def cost_bytes(self) -> int:
        """Returns what the message costs on the wire, with gRPC's prefix."""
        return len(self.message) + GRPC_MESSAGE_FRAME_BYTES


class Outbox:
    """The three queues of a link's sender. An iteration is the sender: waits, yields the most urgent message, ends on close.

    Data waits for its turn at the pace while it is still in its queue, so a more urgent message never waits behind it.
    """

    def __init__(self) -> None:
        self._queues: tuple[deque[_Parcel], ...] = (deque(), deque(), deque())
        self._changed = threading.Condition()
        self._closed = False
        self._turn: tuple[float, int] | None = None  # moment and bytes booked for the next data message

    def put(
        self,
        priority: int,
        messages: list[bytes],
        pace: Pace | None = None,
        left: Callable[[], None] | None = None,
    ) -> None:
        """Queues the messages. `left` is called, on the sender's thread, after the last of them has left."""
        parcels = [_Parcel(message, pace) for message in messages]
        parcels[-1].left = left
        with self._changed:
            self._queues[priority].extend(parcels)
            self._changed.notify()

    def close(self, drop_data: bool = False) -> None:
        """Ends the iteration after the queued messages; with `drop_data` only queued control messages are still sent."""
        with self._changed:
            self._closed = True
            for queue in self._queues[GRADIENTS:] if drop_data else ():
                queue.clear()
            self._changed.notify()

    def __iter__(self) -> Iterator[bytes]:
        while (parcel := self._next()) is not None:
            yield parcel.message
            if parcel.left is not None:  # gRPC asks for the next message after it has passed this one on
                parcel.left()

    def _next(self) -> _Parcel | None:
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._closed or any(self._queues))
                priority = next((number for number, queue in enumerate(self._queues) if queue), None)
                if priority is None:
                    return None
                wait_s = self._wait_s(self._queues[priority][0], priority)
                if wait_s <= 0:
                    return self._queues[priority].popleft()
                self._changed.wait(wait_s)

    def _wait_s(self, parcel: _Parcel, priority: int) -> float:
        """Books the parcel; returns the seconds that it has to wait. A message that comes meanwhile may take its turn."""
        pace, cost = parcel.pace, parcel.cost_bytes
        if pace is None:
            return 0.0
        if priority == CONTROL:
            pace.book(cost)
            return 0.0
        if self._turn is None:
            self._turn = pace.book(cost), cost
        moment, booked = self._turn
        wait_s = moment - pace.clock()
        if wait_s <= 0:
            pace.book(cost - booked)  # a gradient may have taken an activation's turn
            self._turn = None
        return wait_s
