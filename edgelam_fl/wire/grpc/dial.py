"""The end of a link that dials: directly, or through the relay of the server's hub. Knows handshakes; knows no plans."""

from __future__ import annotations

import queue
import secrets
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
from edgelam_fl.wire.grpc.link import GrpcLink, Stream
from edgelam_fl.wire.grpc.options import DEFAULT_TIMING, LinkTiming, channel_options
from edgelam_fl.wire.grpc.secure import PLAIN, Security, why_unreachable
from edgelam_fl.wire.grpc.services import stub
from edgelam_fl.wire.link import Frame, Link
from edgelam_fl.wire.relay import BEHIND, BY_RELAY, DIAL, RELAY_SERVICE, Metadata, Relay
from edgelam_fl.wire.terms import MakeTerms

_LEAST_CONNECT_S = 0.1  # an attempt shortly before the deadline still gets so long
_LOOK_S = 0.2  # between two looks at whether the link is still wanted
_MOST_RETRY_S = 5.0  # a host that asks for a longer pause is asked again all the same
_SESSION_BYTES = 16
_IMPATIENT = (  # gRPC's own pauses between two tries to connect, for a host that was there a moment ago
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.min_reconnect_backoff_ms", 3000),  # patience with one try
)

GivenUp = Callable[[], str]  # returns why a link is no longer wanted; empty: it is
# link that shakes hands, the host's READY -> nothing; it opens the link, or goes on with an older one
TakeReady = Callable[[GrpcLink, pb.Ready], None]


@dataclass(frozen=True)
class _Way:
    """Address, relay and options for dialling one link."""

    address: str
    node: str  # who answers there
    service: str = "DataPlane"
    method: str = "Link"
    metadata: Metadata = ()
    suffix: str = ""  # of the link's name


@dataclass(frozen=True)
class _Dialler:
    """Who dials whom, and how: once to open a link, and again whenever it has lost its stream."""

    node: str
    name: str  # of the link
    hello: pb.Hello
    counters: ByteCounters
    ways: deque[_Way]  # the one to try next comes first: that which worked, or follows one that did not
    timing: LinkTiming
    security: Security

    def call(self, hello: pb.Hello, until: float, given_up: GivenUp, take_ready: TakeReady) -> GrpcLink:
        """Says HELLO over one way after the other until a host is ready; returns the link that shook hands.

        `until`: monotonic, s. `take_ready`: is handed READY. Raises RunFailed once the link is given up, Refused with the
        host's reason, PeerLost if none is ready in time, and what `take_ready` raises.
        """
        ways = self.ways
        problem = "no answer" if ways else "it can be reached by a relay alone, and this server has none"
        while ways and time.monotonic() < until:
            if self._is_barred():
                raise Refused(f"{self.name}: the membership of {self.node} in the federation has ended")
            way = ways[0]
            options = [*channel_options(self.timing), *(_IMPATIENT if hello.resumes else ())]
            channel = self.security.channel(way.address, way.node, options)
            try:
                left_s = until - time.monotonic()
                connect_s = max(_LEAST_CONNECT_S, min(self.timing.connect_s, left_s))
                _connect(channel, connect_s, given_up)
                outcome = self._say_hello(channel, way, hello, given_up, take_ready)
            except grpc.FutureTimeoutError:
                problem = "nobody answers there" if hello.resumes else why_unreachable(channel)  # which takes a while
                channel.close()
                ways.rotate()
                continue
            except PeerLost as error:
                problem = str(error)
                channel.close()
                _pause(self.timing.redial_s, given_up)
                ways.rotate()
                continue
            if isinstance(outcome, Link):
                return outcome
            channel.close()
            if hello.resumes:
                raise Refused(f"{self.name}: {self.node} no longer has this link")
            problem = "it has not received this job yet"
            _pause(min(outcome.retry_ms / 1000, _MOST_RETRY_S), given_up)
        raise PeerLost(problem)

    def again(self, link: GrpcLink, until: float) -> None:
        """Gets a suspended link another stream; as `call`, with the host's READY for this link."""
        hello = pb.Hello()
        hello.CopyFrom(self.hello)
        hello.resumes, hello.received = True, link.received

        def take_ready(newcomer: GrpcLink, ready: pb.Ready) -> None:
            link.go_on(newcomer, ready.received)
            newcomer.close()  # its stream is the link's now

        self.call(hello, until, lambda: "" if link.waits_for_stream else "the link has ended", take_ready)

    def _is_barred(self) -> bool:
        return self.security.ended.node(self.node)

    def _say_hello(
        self, channel: grpc.Channel, way: _Way, hello: pb.Hello, given_up: GivenUp, take_ready: TakeReady
    ) -> GrpcLink | pb.NotReady:
        """Shakes hands; returns the link that did, or the host's wish to be asked later.

        Raises Refused with the host's reason, PeerLost without an answer, RunFailed if none is wanted any more, and what
        `take_ready` raises.
        """
        answers: queue.SimpleQueue[pb.Header | EdgelamError] = queue.SimpleQueue()

        def take_answer(_: Link, frame: Frame) -> None:
            try:
                if frame.header.kind == pb.READY:
                    take_ready(link, frame.header.ready)  # on the reading thread: before it reads a later frame
                answers.put(frame.header)
            except EdgelamError as error:
                answers.put(error)

        def take_loss(_: Link, reason: str) -> None:
            answers.put(PeerLost(reason))

        name = self.name + way.suffix
        link = GrpcLink(name, self.counters, take_answer, take_loss, self.timing, self._is_barred)
        stream = Stream(link)
        link.hello = hello
        link.send(pb.Header(kind=pb.HELLO, hello=hello))
        call = stub(channel, way.service, way.method)(stream.outgoing(), metadata=way.metadata)
        stream.hang_up = call.cancel
        stream.read_from(call, then=channel.close)
        answer = _await_answer(answers, self.timing.answer_s, given_up)
        if isinstance(answer, pb.Header) and answer.kind == pb.READY:
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


def dial(
    node: str,
    address: str,
    name: str,
    hello: pb.Hello,
    counters: ByteCounters,
    make_terms: MakeTerms,
    ready_s: float,
    relay: Relay | None = None,
    given_up: GivenUp = lambda: "",
    timing: LinkTiming = DEFAULT_TIMING,
    security: Security = PLAIN,
) -> Link:
    """Opens a link called `name` to the host `node`, with the terms that `make_terms` makes of the host's READY.

    Tries again while the host is not up or has no such job yet. If `node` does not answer at `address`, the link goes
    through `relay`, and the two ways take turns; None: there is no such way. A link that loses its stream later is dialled
    again by the same ways. Raises RunFailed once the link is given up, Refused with the host's reason, PeerLost after
    `ready_s` seconds, EnvironmentProblem for an address that `security` does not allow, and what `make_terms` raises.
    """
    ways = [_Way(address, node)] if not address.startswith(BEHIND) else []
    if relay is not None:
        ways.append(_Way(relay.hub, SERVER, RELAY_SERVICE, DIAL, relay.metadata, BY_RELAY))
    own = pb.Hello()
    own.CopyFrom(hello)
    own.session = secrets.token_bytes(_SESSION_BYTES)  # the same in every try: a READY may be lost on its way
    dialler = _Dialler(node, name, own, counters, deque(ways), timing, security)

    def take_ready(link: GrpcLink, ready: pb.Ready) -> None:
        link.open(make_terms(link.name, counters, ready))
        link.start_pulse(dialler.again)

    try:
        return dialler.call(own, time.monotonic() + ready_s, given_up, take_ready)
    except PeerLost as error:
        raise PeerLost(f"{name} at {address} could not be reached within {ready_s:.0f} s: {error}") from error


def _connect(channel: grpc.Channel, timeout_s: float, given_up: GivenUp) -> None:
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


def _pause(pause_s: float, given_up: GivenUp) -> None:
    for wait_s in _short_waits(pause_s, given_up):
        time.sleep(wait_s)


def _short_waits(timeout_s: float, given_up: GivenUp) -> Iterator[float]:
    """Yields how long to wait, at least once, in pieces until `timeout_s` is over. Raises RunFailed once the wait is in vain."""
    end = time.monotonic() + timeout_s
    while True:
        if reason := given_up():
            raise RunFailed(reason)
        left_s = end - time.monotonic()
        yield max(0.0, min(left_s, _LOOK_S))
        if left_s <= _LOOK_S:
            return


def _await_answer(
    answers: queue.SimpleQueue[pb.Header | EdgelamError], timeout_s: float, given_up: GivenUp
) -> pb.Header | EdgelamError:
    """Returns the answer to HELLO, or why there is none."""
    try:
        for wait_s in _short_waits(timeout_s, given_up):
            with suppress(queue.Empty):
                return answers.get(timeout=wait_s)
    except RunFailed as error:
        return error
    return PeerLost(f"no answer to HELLO within {timeout_s:.0f} s")
