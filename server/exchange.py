"""One message per node, with a deadline: yields each reply as it arrives, and a reason for each node without one.

Flower's own `send_and_receive` waits for all nodes until its time is up; here a node that Flower no longer lists is given
up at once. Knows nothing about the contents of messages, nor which nodes there are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from edgelam_fl.errors import BUG, Mismatch
from edgelam_fl.names import printable

_CODES = {ErrorCode.INVALID_FAB: Mismatch.code, ErrorCode.CLIENT_APP_RAISED_EXCEPTION: BUG}  # of Flower's error replies


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeTiming:
    """The server's clock, waits and pauses."""

    query_s: float = 90.0
    """For a node's answer to a query."""
    settle_s: float = 10.0
    """For the last profiles once enough nodes are here, at least; if the others took longer, as long as they took."""
    messages_s: float = 120.0
    """For a reply, on top of the nodes' own deadline: Flower polls every few seconds."""
    first_poll_s: float = 0.05
    """Between the first two looks at what has arrived: a simulated node answers at once. Later pauses are longer."""
    poll_s: float = 0.5
    """The longest pause between two looks."""
    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


@dataclass(frozen=True, slots=True)
class Request:
    """A message to one node. `kind` is Flower's message type: it picks the function of the ClientApp that answers."""

    name: str
    node_id: int
    kind: str
    content: RecordDict


@dataclass(frozen=True, slots=True)
class Arrived:
    """A node's reply that has not been read yet."""

    name: str
    content: RecordDict


@dataclass(frozen=True, slots=True)
class Missing:
    """A node without a reply, and why it is given up."""

    name: str
    reason: str
    code: str = ""
    """Kind of the reason, as in `edgelam_fl.errors`; "": unknown."""


@dataclass(frozen=True, slots=True)
class SiteDeadline:
    """The nodes of one site, whose parts end together: once a host has replied, or every member, the rest have `limit_s`.

    Flower keeps listing a SuperNode that lost a message (its process was started again with the message half done): without
    this limit the server would wait for such a node until the round's deadline.
    """

    hosts: frozenset[str]
    members: frozenset[str]
    limit_s: float

    def is_through(self, silent: Set[str]) -> bool:
        """Returns whether the time of the site's `silent` nodes is running."""
        return not self.hosts <= silent or not self.members & silent


@dataclass(frozen=True, slots=True)
class Addressee:
    """A node that was sent a message."""

    name: str
    node_id: int


class Exchange:
    """Sends requests over Flower's grid and collects what comes back."""

    def __init__(self, grid: Grid, timing: ExchangeTiming) -> None:
        self.grid, self.timing = grid, timing
        self._here: set[int] = set()  # at the last look
        self._left: set[int] = set()  # since the last call of `left`

    def present(self) -> set[int]:
        """Returns Flower's ids of the nodes that are here."""
        here = set(self.grid.get_node_ids())
        self._left |= self._here - here
        self._here = here
        return set(here)

    def left(self) -> set[int]:
        """Returns the nodes that any look since the last call missed; those that are back by now are new ones."""
        left, self._left = self._left, set()
        return left

    def replies(
        self,
        requests: Iterable[Request],
        limit_s: float,
        *,
        one_by_one: bool = False,
        sites: Sequence[SiteDeadline] = (),
    ) -> Iterator[Arrived | Missing]:
        """Sends all requests at once and yields one answer per request, in the order of arrival.

        With `one_by_one`, the next reply is fetched only after the last one was taken, and no reply is kept here. Silent
        nodes of `sites` are given up at their site's deadline, all others after `limit_s`.
        """
        timing = self.timing
        end = timing.now() + limit_s
        waiting = self.send(requests)
        through_since = dict.fromkeys(sites, math.inf)
        pause_s = timing.first_poll_s
        while waiting and timing.now() < end:
            for asked in [[message_id] for message_id in waiting] if one_by_one else [list(waiting)]:
                found = list(self.grid.pull_messages(asked))
                while found:
                    yield answer_of(waiting.pop(found[-1].metadata.reply_to_message_id), found.pop())
            now, silent = timing.now(), {peer.name for peer in waiting.values()}
            through_since = {s: min(t, now) if s.is_through(silent) else math.inf for s, t in through_since.items()}
            late = {site for site, since in through_since.items() if now - since > site.limit_s}
            for message_id, missing in self._given_up(waiting, late):
                del waiting[message_id]
                yield missing
            if waiting:
                timing.sleep(pause_s)
                pause_s = min(timing.poll_s, 1.2 * pause_s)
        for peer in waiting.values():
            yield Missing(peer.name, f"no reply within {limit_s:.0f} s")

    def arrived(self, message_ids: Iterable[str]) -> dict[str, Message]:
        """Returns the answers to these messages that are here now, by the ids of the messages that they answer."""
        return {message.metadata.reply_to_message_id: message for message in self.grid.pull_messages(list(message_ids))}

    def send(self, requests: Iterable[Request]) -> dict[str, Addressee]:
        """Sends the requests; returns their receivers by Flower's message ids. The messages, each with an adapter, are not
        kept.
        """
        messages, peers = [], []
        for request in requests:
            messages.append(Message(content=request.content, dst_node_id=request.node_id, message_type=request.kind))
            peers.append(Addressee(request.name, request.node_id))
        return dict(zip(self.grid.push_messages(messages), peers, strict=True))

    def _given_up(self, waiting: Mapping[str, Addressee], late: Iterable[SiteDeadline]) -> list[tuple[str, Missing]]:
        """Returns the messages that nobody will answer: their nodes have left, or belong to a site that is `late`."""
        present = self.present() if waiting else set()
        reasons = {name: f"no reply {s.limit_s:.0f} s after its site" for s in late for name in s.hosts | s.members}
        return [
            (message_id, Missing(peer.name, reasons.get(peer.name, "left the federation")))
            for message_id, peer in waiting.items()
            if peer.node_id not in present or peer.name in reasons
        ]


def answer_of(peer: Addressee, message: Message) -> Arrived | Missing:
    """Returns a node's message as the answer that it is: a reply, or an account of what failed there."""
    if message.has_error():
        reason = f"its ClientApp failed: {printable(message.error.reason)}"
        return Missing(peer.name, reason, _CODES.get(message.error.code, ""))
    return Arrived(peer.name, message.content)
