"""What waits to be sent on a link: control before gradients before activations, switched between chunks, data at its pace.

Knows messages and their urgency, not what is in them.
Neighbours: `wire.grpc` fills it and gives its iterator to gRPC; `wire.pace` says when data may leave.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from edgelam_fl.wire.counters import GRPC_MESSAGE_FRAME_BYTES
from edgelam_fl.wire.pace import Pace

CONTROL, GRADIENTS, ACTIVATIONS = 0, 1, 2  # the queues, the most urgent first


@dataclass
class _Parcel:
    message: bytes
    pace: Pace | None
    left: Callable[[], None] | None = None  # called when the transport has taken the message

    @property
    def cost_bytes(self) -> int:
        return len(self.message) + GRPC_MESSAGE_FRAME_BYTES


class Outbox:
    """The sender's three queues. Iterating over it is the sender: it waits, yields the most urgent message, ends on close.

    Data waits for its turn at the pace while it is still in its queue, so that what is more urgent never waits behind it.
    """

    def __init__(self) -> None:
        self._queues: tuple[deque[_Parcel], ...] = (deque(), deque(), deque())
        self._changed = threading.Condition()
        self._closed = False
        self._turn: tuple[float, int] | None = None  # when the next data message may leave, and the bytes booked for it

    def put(
        self,
        priority: int,
        messages: list[bytes],
        pace: Pace | None = None,
        left: Callable[[], None] | None = None,
    ) -> None:
        """`left` is called, on the sender's thread, when the last of `messages` has left."""
        parcels = [_Parcel(message, pace) for message in messages]
        parcels[-1].left = left
        with self._changed:
            self._queues[priority].extend(parcels)
            self._changed.notify()

    def close(self, drop_data: bool = False) -> None:
        """What was put before is still sent; `drop_data`: only the control messages of it."""
        with self._changed:
            self._closed = True
            for queue in self._queues[GRADIENTS:] if drop_data else ():
                queue.clear()
            self._changed.notify()

    def __iter__(self) -> Iterator[bytes]:
        while (parcel := self._next()) is not None:
            yield parcel.message
            if parcel.left is not None:  # asked for the next one: gRPC does so when this one is out of its hands
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
        """Books `parcel`; above 0, it has to wait so long, and what comes meanwhile may take its turn."""
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
