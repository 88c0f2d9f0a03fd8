"""The bookkeeping by which a link outlives its streams: what left is kept until the other end has it; what came is counted.

Both ends number the messages of a link, one way, in the order in which they leave, over all of its streams. A stream
delivers what it was given in order, up to its end. So one number, how many messages have come, says what need not be kept
any longer, and from where the next stream has to go on. Signs of life, acknowledgements and handshakes have no number: they
are of their stream, and are sent once.
Knows messages and numbers; knows no streams, no frames and no waiting. Neighbours: `wire.outbox` keeps here what has left,
`wire.link` counts here what comes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from edgelam_fl.errors import ProtocolError
from edgelam_fl.wire.counters import GRPC_MESSAGE_FRAME_BYTES
from edgelam_fl.wire.pace import Pace

ACK_EVERY_BYTES, ACK_EVERY_MESSAGES = 1 << 20, 1024  # received and not acknowledged by a frame of another kind
MOST_KEPT_BYTES, MOST_KEPT_MESSAGES = (
    32 << 20,
    8 * ACK_EVERY_MESSAGES,
)  # more does not leave until some are acknowledged


@dataclass(eq=False)
class Outgoing:
    """One message on its way out of a link."""

    data: bytes  # the message itself
    priority: int  # number of its queue
    pace: Pace | None
    left: Callable[[], None] | None = None  # called once, after the transport has taken the message

    @property
    def cost_bytes(self) -> int:
        """Returns what the message costs on the wire, with gRPC's prefix."""
        return len(self.data) + GRPC_MESSAGE_FRAME_BYTES

    def take_left(self) -> Callable[[], None]:
        """Returns what is to be called now that the message has left; afterwards nothing is."""
        left, self.left = self.left, None
        return left or _nothing


@dataclass(eq=False)
class Unmade:
    """Messages on their way out of a link that do not exist yet, such as those of a tensor that was not encoded."""

    make: Callable[[], list[bytes]]
    pace: Pace | None
    left: Callable[[], None] | None
    begun: bool = False  # a sender is making them
    messages: list[bytes] | None = None  # once they are made


class Sent:
    """Messages that have left and that the other end may still lack, in the order of leaving. Its owner locks."""

    def __init__(self) -> None:
        self._messages: deque[Outgoing] = deque()
        self._bytes = 0
        self.acknowledged = 0  # messages of the link that the other end has

    def __len__(self) -> int:
        return len(self._messages)

    @property
    def is_full(self) -> bool:
        """Returns whether no further message may leave: what is kept for a slow or silent end is bounded."""
        return self._bytes >= MOST_KEPT_BYTES or len(self._messages) >= MOST_KEPT_MESSAGES

    def add(self, message: Outgoing) -> None:
        """Keeps a message that leaves now."""
        self._messages.append(message)
        self._bytes += len(message.data)

    def acknowledge(self, received: int) -> list[Outgoing]:
        """Forgets the first `received` messages of the link; returns those of them that were still kept.

        An older acknowledgement changes nothing. Raises ProtocolError for messages that never left.
        """
        count = received - self.acknowledged
        if count > len(self._messages):
            left = self.acknowledged + len(self._messages)
            raise ProtocolError(f"{received} messages acknowledged; {left} have left")
        dropped = [self._messages.popleft() for _ in range(count)]
        self._bytes -= sum(len(message.data) for message in dropped)
        self.acknowledged += len(dropped)
        return dropped

    def take_back(self) -> list[Outgoing]:
        """Returns what is kept, to be sent again, and keeps it no longer."""
        again = list(self._messages)
        self._messages.clear()
        self._bytes = 0
        return again


class Arrivals:
    """Counts the messages that have come, and what of them the other end has not been told."""

    def __init__(self) -> None:
        self.count = 0
        self._untold_messages, self._untold_bytes = 0, 0

    def add(self, size_bytes: int) -> bool:
        """Counts a message; returns whether an acknowledgement is due."""
        self.count += 1
        self._untold_messages += 1
        self._untold_bytes += size_bytes
        return self._untold_bytes >= ACK_EVERY_BYTES or self._untold_messages >= ACK_EVERY_MESSAGES

    def tell(self) -> int:
        """Returns the count, for a message that tells it to the other end."""
        self._untold_messages, self._untold_bytes = 0, 0
        return self.count


def _nothing() -> None:
    """Does nothing: nobody waits to hear that the message has left."""
