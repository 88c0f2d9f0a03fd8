"""Orders the messages of a link: control before gradients before activations, changed between chunks, data at its pace.

Knows messages and their urgency; does not know what is in them.
Neighbours: `wire.grpc` fills it and gives its iterator to gRPC; `wire.pace` says when data may leave.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from edgelam_fl.wire.counters import GRPC_MESSAGE_FRAME_BYTES
from edgelam_fl.wire.pace import Pace

CONTROL, GRADIENTS, ACTIVATIONS = 0, 1, 2  # numbers of the queues, the most urgent first
MOST_CONTROL = 4096  # control messages in the queue: the other end reads none of them


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
        self._passing_on = False  # the transport has a message and has not asked for the next one
        self._given_at = time.monotonic()  # when the transport got its last message

    @property
    def stuck_s(self) -> float:
        """The time for which the transport has not got one message passed on, in seconds: the other end does not read."""
        return time.monotonic() - self._given_at if self._passing_on else 0.0

    def has_moved(self, within_s: float) -> bool:
        """Returns whether the transport got a message within the last `within_s` seconds."""
        return time.monotonic() - self._given_at <= within_s

    def put(
        self,
        priority: int,
        messages: list[bytes],
        pace: Pace | None = None,
        left: Callable[[], None] | None = None,
    ) -> bool:
        """Queues the messages; returns False, and queues none, if too many control messages are in the queue already.

        `left` is called, on the sender's thread, after the last of the messages has left.
        """
        parcels = [_Parcel(message, pace) for message in messages]
        parcels[-1].left = left
        with self._changed:
            if priority == CONTROL and len(self._queues[CONTROL]) >= MOST_CONTROL:
                return False
            self._queues[priority].extend(parcels)
            self._changed.notify()
        return True

    def close(self, drop_data: bool = False) -> None:
        """Ends the iteration after the queued messages; with `drop_data` only queued control messages are still sent."""
        with self._changed:
            self._closed = True
            for queue in self._queues[GRADIENTS:] if drop_data else ():
                queue.clear()
            self._changed.notify()

    def __iter__(self) -> Iterator[bytes]:
        while (parcel := self._next()) is not None:
            self._given_at, self._passing_on = time.monotonic(), True
            yield parcel.message
            self._passing_on = False
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
