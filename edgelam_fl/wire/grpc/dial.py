"""The end of a link that dials: directly, or through the relay of the server's hub. Knows handshakes; knows no plans."""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import grpc

from edgelam_fl.errors import EdgelamError, PeerLost, ProtocolError, Refused, RunFailed
from edgelam_fl.trust.identity import SERVER
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.counters import ByteCounters
from edgelam_fl.wire.grpc.link import GrpcLink
from edgelam_fl.wire.grpc.options import DEFAULT_TIMING, LinkTiming, channel_options
from edgelam_fl.wire.grpc.secure import PLAIN, Security, why_unreachable
from edgelam_fl.wire.grpc.services import stub
from edgelam_fl.wire.link import Frame, Link
from edgelam_fl.wire.relay import BEHIND, BY_RELAY, DIAL, RELAY_SERVICE, Metadata, Relay
from edgelam_fl.wire.terms import MakeTerms

_LEAST_CONNECT_S = 0.1  # an attempt shortly before the deadline still gets so long
_LOOK_S = 0.2  # between two looks at whether the link is still wanted
_MOST_RETRY_S = 5.0  # a host that asks for a longer pause is asked again all the same


@dataclass(frozen=True)
class _Way:
    """Address, relay and options for dialling one link."""

    address: str
    node: str  # who answers there
    service: str = "DataPlane"
    method: str = "Link"
    metadata: Metadata = ()
    suffix: str = ""  # of the link's name


def dial(
    node: str,
    address: str,
    name: str,
    hello: pb.Hello,
    counters: ByteCounters,
    make_terms: MakeTerms,
    ready_s: float,
    relay: Relay | None = None,
    given_up: Callable[[], str] = lambda: "",
    timing: LinkTiming = DEFAULT_TIMING,
    security: Security = PLAIN,
) -> Link:
    """Opens a link called `name` to the host `node`, with the terms that `make_terms` makes of the host's READY.

    Tries again while the host is not up or has no such job yet. If `node` does not answer at `address`, the link goes
    through `relay`, and the two ways take turns; None: there is no such way. `given_up` returns why the link is no longer
    wanted; empty: it is. Raises RunFailed with that reason, Refused with the host's, PeerLost after `ready_s` seconds,
    EnvironmentProblem for an address that `security` does not allow, and what `make_terms` raises.
    """
    end = time.monotonic() + ready_s
    ways = deque([_Way(address, node)] if not address.startswith(BEHIND) else [])
    if relay is not None:
        ways.append(_Way(relay.hub, SERVER, RELAY_SERVICE, DIAL, relay.metadata, BY_RELAY))
    problem = "no answer" if ways else "it can be reached by a relay alone, and this server has none"
    while ways and time.monotonic() < end:
        if security.ended.node(node):
            raise Refused(f"{name}: the membership of {node} in the federation has ended")
        way = ways[0]
        channel = security.channel(way.address, way.node, channel_options(timing))
        try:
            left_s = end - time.monotonic()
            _connect(channel, max(_LEAST_CONNECT_S, min(timing.connect_s, left_s)), given_up)
            outcome = _say_hello(
                channel, way, name + way.suffix, hello, counters, make_terms, timing,
                lambda: security.ended.node(node), given_up,
            )  # fmt: skip
        except grpc.FutureTimeoutError:
            problem = why_unreachable(channel)
            channel.close()
            ways.rotate()
            continue
        except PeerLost as error:
            problem = str(error)
            channel.close()
            _pause(timing.redial_s, given_up)
            ways.rotate()
            continue
        if isinstance(outcome, Link):
            return outcome
        problem = "it has not received this job yet"
        channel.close()
        _pause(min(outcome.retry_ms / 1000, _MOST_RETRY_S), given_up)
    raise PeerLost(f"{name} at {address} could not be reached within {ready_s:.0f} s: {problem}")


def _connect(channel: grpc.Channel, timeout_s: float, given_up: Callable[[], str]) -> None:
    """Waits until a channel is connected. Raises FutureTimeoutError if that takes too long, RunFailed if it is not wanted."""
    connected = grpc.channel_ready_future(channel)
    try:
        for wait_s in _short_waits(timeout_s, given_up):
            with suppress(grpc.FutureTimeoutError):
                return connected.result(timeout=wait_s)
    except RunFailed:
        connected.cancel()
        channel.close()
        raise
    raise grpc.FutureTimeoutError


def _pause(pause_s: float, given_up: Callable[[], str]) -> None:
    for wait_s in _short_waits(pause_s, given_up):
        time.sleep(wait_s)


def _short_waits(timeout_s: float, given_up: Callable[[], str]) -> Iterator[float]:
    """Yields how long to wait, at least once, in pieces until `timeout_s` is over. Raises RunFailed once the wait is in vain."""
    end = time.monotonic() + timeout_s
    while True:
        if reason := given_up():
            raise RunFailed(reason)
        left_s = end - time.monotonic()
        yield max(0.0, min(left_s, _LOOK_S))
        if left_s <= _LOOK_S:
            return


def _say_hello(
    channel: grpc.Channel, way: _Way, name: str, hello: pb.Hello, counters: ByteCounters, make_terms: MakeTerms,
    timing: LinkTiming, barred: Callable[[], bool], given_up: Callable[[], str],
) -> Link | pb.NotReady:  # fmt: skip
    """Shakes hands; returns the open link, or the host's wish to be asked later.

    Raises Refused with the host's reason, PeerLost without an answer, RunFailed if none is wanted any more, and what
    `make_terms` raises.
    """
    answers: queue.SimpleQueue[pb.Header | EdgelamError] = queue.SimpleQueue()

    def take_answer(link: Link, frame: Frame) -> None:
        try:
            if frame.header.kind == pb.READY:
                link.open(
                    make_terms(name, counters, frame.header.ready)
                )  # on the reading thread: before it reads a later frame
            answers.put(frame.header)
        except EdgelamError as error:
            answers.put(error)

    link = GrpcLink(name, counters, take_answer, lambda _, reason: answers.put(PeerLost(reason)), timing, barred)
    link.send(pb.Header(kind=pb.HELLO, hello=hello))
    call = stub(channel, way.service, way.method)(iter(link.outbox), metadata=way.metadata)
    link.read_from(call, then=channel.close)
    answer = _await_answer(answers, timing.answer_s, given_up)
    if isinstance(answer, pb.Header) and answer.kind == pb.READY:
        link.start_pulse(call.cancel)
        return link
    link.close()
    call.cancel()
    if isinstance(answer, EdgelamError):
        raise answer
    if answer.kind == pb.REFUSE:
        raise Refused(f"{name} refuses: {answer.refuse.reason}")
    if answer.kind != pb.NOT_READY:
        raise ProtocolError(f"{name} answered HELLO with {pb.Kind.Name(answer.kind)}")
    return answer.not_ready


def _await_answer(
    answers: queue.SimpleQueue[pb.Header | EdgelamError], timeout_s: float, given_up: Callable[[], str]
) -> pb.Header | EdgelamError:
    """Returns the answer to HELLO, or why there is none."""
    try:
        for wait_s in _short_waits(timeout_s, given_up):
            with suppress(queue.Empty):
                return answers.get(timeout=wait_s)
    except RunFailed as error:
        return error
    return PeerLost(f"no answer to HELLO within {timeout_s:.0f} s")
