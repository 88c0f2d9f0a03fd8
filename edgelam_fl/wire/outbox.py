"""Orders the messages of a link: signs and control before gradients before activations, changed between chunks, data at its pace.

Keeps what has left until the other end acknowledges it, and sends it again on the link's next stream. Knows messages and
their urgency; does not know what is in them.
Neighbours: `wire.grpc` fills it and gives its senders to gRPC; `wire.pace` says when data may leave; `wire.session` keeps
what has left.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

from edgelam_fl.errors import ProtocolError
from edgelam_fl.wire.pace import Pace
from edgelam_fl.wire.session import Outgoing, Sent, Unmade

# numbers of the queues, the most urgent first; SIGNS are of one stream: they are neither numbered nor kept
SIGNS, CONTROL, GRADIENTS, ACTIVATIONS = range(4)
MOST_CONTROL = 4096  # control messages in the queue: the other end reads none of them
_NOBODY = object()  # a sender's name that no sender has


class Outbox:
    """The queues of a link's senders, of which one at a time sends: that of the link's stream.

    A sender waits, yields the most urgent message, and ends on close, or as soon as it is no longer the one that sends.
    Data waits for its turn at the pace while it is still in its queue, so a more urgent message never waits behind it.
    """

    def __init__(self) -> None:
        self._queues: tuple[deque[Outgoing | Unmade], ...] = (deque(), deque(), deque(), deque())
        self._sent = Sent()
        self._changed = threading.Condition()
        self._closed = False
        self._sends: object = None  # name of the sender whose turn it is
        self._turn: tuple[float, int] | None = None  # moment and bytes booked for the next data message
        self._passing_on = False  # the transport has a message and has not asked for the next one
        self._given_at = time.monotonic()  # when the transport got its last message

    @property
    def stuck_s(self) -> float:
        """The time for which nothing could leave, in seconds: the other end does not read, or acknowledges nothing."""
        stuck = self._passing_on or (self._sent.is_full and any(self._queues))
        return time.monotonic() - self._given_at if stuck else 0.0

    @property
    def has_undelivered(self) -> bool:
        """Returns whether the other end may lack a message of this link."""
        with self._changed:
            return bool(len(self._sent)) or any(self._queues[CONTROL:])

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

        `left` is called after the last of the messages has left, on the sender's thread or the one that acknowledges.
        """
        outgoing = _outgoing(priority, messages, pace, left)
        with self._changed:
            if priority == CONTROL and len(self._queues[CONTROL]) >= MOST_CONTROL:
                return False
            self._queues[priority].extend(outgoing)
            self._changed.notify_all()
        return True

    def put_later(
        self,
        priority: int,
        make: Callable[[], list[bytes]],
        pace: Pace | None = None,
        left: Callable[[], None] | None = None,
    ) -> None:
        """Queues messages that are made when their turn comes, on the sender's thread: what fills the outbox does not wait for it.

        `make`: called once. `left`: as of `put`.
        """
        with self._changed:
            self._queues[priority].append(Unmade(make, pace, left))
            self._changed.notify_all()

    def acknowledge(self, received: int) -> None:
        """Forgets what the other end has, its first `received` messages. Raises ProtocolError for more than have left."""
        with self._changed:
            was_full = self._sent.is_full
            delivered = [message.take_left() for message in self._sent.acknowledge(received)]
            if was_full:
                self._changed.notify_all()
        for left in delivered:
            left()

    def pause(self) -> None:
        """Lets nothing leave until `restart`."""
        with self._changed:
            self._sends = _NOBODY
            self._changed.notify_all()

    def restart(self, sender: object, received: int) -> list[bytes]:
        """Gives the turn to `sender`, whose other end has `received` messages; returns those that leave once more.

        They go back to the heads of their queues. Raises ProtocolError for a number that cannot be.
        """
        self.acknowledge(received)
        with self._changed:
            if received < self._sent.acknowledged:
                raise ProtocolError(
                    f"{received} messages received; {self._sent.acknowledged} had been acknowledged before"
                )
            again = self._sent.take_back()
            for message in reversed(again):
                self._queues[message.priority].appendleft(message)
            self._sends, self._given_at, self._passing_on = sender, time.monotonic(), False
            self._changed.notify_all()
        return [message.data for message in again]

    def close(self, drop_data: bool = False) -> None:
        """Ends the sender after the queued messages; with `drop_data` only signs and control messages are still sent."""
        with self._changed:
            self._closed = True
            if drop_data:
                self._sent.take_back()
                for queue in self._queues[GRADIENTS:]:
                    queue.clear()
            self._changed.notify_all()

    def __iter__(self) -> Iterator[bytes]:
        return self.sender(None)

    def sender(self, name: object) -> Iterator[bytes]:
        """Yields messages while it is the turn of the sender called `name`; at first that is None."""
        while (message := self._next(name)) is not None:
            yield message.data
            self._passing_on = False
            if message.left is not None:  # gRPC asks for the next message after it has passed this one on
                with self._changed:
                    left = message.take_left()
                left()

    def _next(self, name: object) -> Outgoing | None:
        with self._changed:
            while self._sends is name:
                priority = self._due()
                if priority is None:
                    if self._closed and not any(self._queues):
                        return None
                    self._changed.wait()
                    continue
                first = self._queues[priority][0]
                if isinstance(first, Unmade):
                    self._make(first, priority)
                    continue
                wait_s = self._wait_s(first, priority)
                if wait_s > 0:
                    self._changed.wait(wait_s)
                    continue
                self._queues[priority].popleft()
                if priority != SIGNS:
                    self._sent.add(first)
                self._given_at, self._passing_on = time.monotonic(), True
                return first
        return None

    def _make(self, unmade: Unmade, priority: int) -> None:
        """Puts the messages of the first entry of a queue in its place, or makes them: others may use the outbox meanwhile."""
        if unmade.messages is not None:
            queue = self._queues[priority]
            queue.popleft()
            queue.extendleft(reversed(_outgoing(priority, unmade.messages, unmade.pace, unmade.left)))
        elif unmade.begun:  # by the sender of a stream that has broken
            self._changed.wait()
        else:
            unmade.begun = True
            self._changed.release()
            try:
                unmade.messages = unmade.make()
            finally:
                self._changed.acquire()
                self._changed.notify_all()

    def _due(self) -> int | None:
        """Returns the queue whose first message may leave; None: there is none."""
        most = CONTROL if self._sent.is_full else len(self._queues)
        return next((number for number, queue in enumerate(self._queues[:most]) if queue), None)

    def _wait_s(self, message: Outgoing, priority: int) -> float:
        """Books the message; returns the seconds that it has to wait. A message that comes meanwhile may take its turn."""
        pace, cost = message.pace, message.cost_bytes
        if pace is None:
            return 0.0
        if priority <= CONTROL:
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


def _outgoing(
    priority: int, messages: list[bytes], pace: Pace | None, left: Callable[[], None] | None
) -> list[Outgoing]:
    """Returns the messages as they wait in a queue; `left` belongs to the last of them."""
    outgoing = [Outgoing(data, priority, pace) for data in messages]
    if outgoing:
        outgoing[-1].left = left
    return outgoing
