"""One message per node, with a deadline: yields each reply as it arrives, and a reason for each node without one.

Flower's own `send_and_receive` waits for all nodes until its time is up; here a `Watch` may give a node up at any look, or
have its message sent again. Knows nothing about the contents of messages, nor which nodes there are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from edgelam_fl.errors import BUG, Mismatch
from edgelam_fl.names import printable

_CODES = {ErrorCode.INVALID_FAB: Mismatch.code, ErrorCode.CLIENT_APP_RAISED_EXCEPTION: BUG}  # of Flower's error replies
_LOST = {  # messages that nobody will answer, though the node may be well
    ErrorCode.NODE_UNAVAILABLE: "its SuperNode was away",
    ErrorCode.MESSAGE_UNAVAILABLE: "its message is lost",
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "its reply is lost",
    ErrorCode.CLIENT_APP_CRASHED: "its ClientApp was killed",
}
LEFT = "left the federation"


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
    look_s: float = 1.0
    """Between two looks at which nodes attend."""
    strikes_s: float = 10.0
    """Until a silent host is lost that another can replace. One that stands still for 8 s is not: its beat comes a second later."""
    left_s: float = 3.0
    """Until a silent node is lost that has left Flower: three missed beats."""
    device_silent_s: float = 30.0
    """Until a silent device is lost: it may be frozen, or its network away, and its links wait for it, too."""
    host_silent_s: float = 60.0
    """Until a silent host is lost that none can replace."""
    cancelled_s: float = 6.0
    """For the reports of a site whose attempt has ended."""
    resend_s: float = 20.0
    """Until a message is sent again to a node that has never attended, beside the time for its tensors."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What becomes of nodes without an answer, as a `Watch` sees it."""

    lost: Mapping[str, str] = field(default_factory=dict)
    """Why a node is given up, by its name."""
    again: Sequence[Request] = ()
    """Messages to send: again, or in a node's next turn. The node's first answer to any of its messages counts."""


@dataclass(frozen=True, slots=True)
class Unanswered:
    """A node without an answer."""

    is_here: bool = True
    """Whether Flower lists it."""
    problem: str = ""
    """Why nothing will answer its messages, whatever the node does; empty: one may be answered."""

    @property
    def why_lost(self) -> str:
        """Why there will be no answer; empty: there may be one."""
        return self.problem if self.is_here else LEFT


class Watch(Protocol):
    """Judges the nodes that have not answered yet."""

    def look(self, silent: Mapping[str, Unanswered]) -> Verdict:
        """Called after each look at what has arrived; `silent`: the nodes without an answer, by name."""


class WhoLeft:
    """Gives up the nodes that Flower no longer lists, and those whose messages are lost."""

    def look(self, silent: Mapping[str, Unanswered]) -> Verdict:
        return Verdict(lost={name: peer.why_lost for name, peer in silent.items() if peer.why_lost})


@dataclass(frozen=True, slots=True)
class Addressee:
    """A node that was sent a message."""

    name: str
    node_id: int
    problem: str = ""
    """Why nobody will answer the message; empty: somebody may."""


class Exchange:
    """Sends requests over Flower's grid and collects what comes back."""

    def __init__(self, grid: Grid, timing: ExchangeTiming) -> None:
        self.grid, self.timing = grid, timing
        self._here: set[int] = set()  # at the last look
        self._left: set[int] = set()  # since the last call of `left`
        self._given_up: dict[str, list[str]] = {}  # by name, the ids of messages that the last `replies` has given up

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
        watch: Watch | None = None,
    ) -> Iterator[Arrived | Missing]:
        """Sends all requests at once and yields one answer per request, in the order of arrival.

        With `one_by_one`, the next reply is fetched only after the last one was taken, and no reply is kept here. `watch`
        gives silent nodes up and has messages sent again; None: it gives up those that have left. All others are given up
        after `limit_s`.
        """
        timing, watch = self.timing, watch or WhoLeft()
        end = timing.now() + limit_s
        waiting, self._given_up = _Waiting(self.send(requests)), {}
        pause_s = timing.first_poll_s
        while waiting.by_id and timing.now() < end:
            awaited = [message_id for message_id, peer in waiting.by_id.items() if not peer.problem]
            for asked in [[message_id] for message_id in awaited] if one_by_one else [awaited]:
                found = _taken(self.grid.pull_messages(asked), waiting)
                if found:
                    pause_s = timing.first_poll_s  # nodes that play together are done together
                while found:
                    yield found.pop()
            verdict = watch.look(self._silent(waiting.by_id))
            for name, reason in verdict.lost.items():
                self._given_up[name] = waiting.forget(name)
                yield Missing(name, reason)
            if verdict.again:
                waiting.add(self.send(verdict.again))
            if waiting.by_id:
                timing.sleep(pause_s)
                pause_s = min(timing.poll_s, 1.2 * pause_s)
        for name in dict.fromkeys(peer.name for peer in waiting.by_id.values()):
            yield Missing(name, f"no reply within {limit_s:.0f} s")

    def unanswered(self, name: str) -> Sequence[str]:
        """Returns the ids of the messages to a node that the last `replies` gave up: an answer may still come (`arrived`)."""
        return self._given_up.get(name, ())

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

    def _silent(self, waiting: Mapping[str, Addressee]) -> dict[str, Unanswered]:
        """Returns the nodes without an answer."""
        present = self.present() if waiting else set()
        messages: dict[str, list[Addressee]] = {}
        for peer in waiting.values():
            messages.setdefault(peer.name, []).append(peer)
        return {
            name: Unanswered(
                is_here=any(peer.node_id in present for peer in peers),
                problem=peers[-1].problem if all(peer.problem for peer in peers) else "",
            )
            for name, peers in messages.items()
        }


class _Waiting:
    """Messages without an answer. A node may have been sent several."""

    def __init__(self, sent: Mapping[str, Addressee]) -> None:
        self.by_id: dict[str, Addressee] = {}
        self._ids: dict[str, list[str]] = {}  # by the node's name
        self.add(sent)

    def add(self, sent: Mapping[str, Addressee]) -> None:
        """Waits for answers to these messages, too."""
        self.by_id |= sent
        for message_id, peer in sent.items():
            self._ids.setdefault(peer.name, []).append(message_id)

    def forget(self, name: str) -> list[str]:
        """Waits for a node no more; returns the ids of its messages."""
        message_ids = self._ids.pop(name, [])
        for message_id in message_ids:
            del self.by_id[message_id]
        return message_ids


def _taken(messages: Iterable[Message], waiting: _Waiting) -> list[Arrived | Missing]:
    """Returns what has arrived as its nodes' answers, and takes these nodes off `waiting`.

    No answer is an account of a lost message, nor that of a failed ClientApp while another message is on its way to its node.
    """
    answers = []
    for message in messages:
        message_id = message.metadata.reply_to_message_id
        peer = waiting.by_id.get(message_id)
        if peer is None:
            continue
        if message.has_error():
            problem = _problem(message)
            others = [other for key, other in waiting.by_id.items() if other.name == peer.name and key != message_id]
            if message.error.code in _LOST or any(not other.problem for other in others):
                waiting.by_id[message_id] = replace(peer, problem=problem)
                continue
        waiting.forget(peer.name)
        answers.append(answer_of(peer.name, message))
    return answers


def is_of_lost_message(message: Message) -> bool:
    """Returns whether an answer says that no process of its node has the message: another message would be answered."""
    return message.has_error() and message.error.code == ErrorCode.MESSAGE_UNAVAILABLE


def answer_of(name: str, message: Message) -> Arrived | Missing:
    """Returns a node's message as the answer that it is: a reply, or an account of what failed there."""
    if message.has_error():
        return Missing(name, _problem(message), _CODES.get(message.error.code, ""))
    return Arrived(name, message.content)


def _problem(message: Message) -> str:
    return _LOST.get(message.error.code) or f"its ClientApp failed: {printable(message.error.reason)}"
