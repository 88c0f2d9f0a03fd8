"""Links over gRPC: one bidirectional stream of raw messages a link, dialled by the one that may sit behind a NAT.

Where it reaches nobody, the server's hub joins it to the other end, which has dialled the hub too (hub.relay).
The service knows the handshake (HELLO -> READY, NOT_READY or REFUSE) and nothing else: whom to let in is decided by the
`Doorkeeper` that it is given. Threads, not asyncio: a link has one that reads and gRPC's own that sends, and tensors are
computed on neither.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import grpc

from edgelam_fl.errors import EnvironmentProblem, PeerLost, ProtocolError, Refused
from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.counters import ByteCounters
from edgelam_fl.wire.link import Ears, Frame, Link
from edgelam_fl.wire.outbox import Outbox
from edgelam_fl.wire.relay import ACCEPT, BEHIND, BY_RELAY, DIAL, LISTEN, Metadata, Relay, number_metadata, path

_METHOD = "/edgelam.v1.DataPlane/Link"
_HELLO_DEADLINE_S = 10.0
_RETRY_S = 0.5
_LISTEN_RETRY_S = 2.0
_PING_EVERY_S = 2.0
_MAX_STREAMS = 512
_OPTIONS = [
    ("grpc.max_receive_message_length", 6 << 20),  # a chunk and the largest header
    ("grpc.max_send_message_length", 6 << 20),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),  # the other end is a machine of the federation, never a web address
]

# Asked for every HELLO: lets the link in (after attaching to it) or says why not.
Doorkeeper = Callable[[pb.Hello, Link], pb.Ready | pb.NotReady | pb.Refuse]


class GrpcLink(Link):
    def __init__(self, name: str, counters: ByteCounters, silent_s: float) -> None:
        super().__init__(name, counters)
        self.outbox = Outbox()
        self.silent_s = silent_s

    def _transmit(self, priority: int, messages: list[bytes], left: Callable[[], None] | None) -> None:
        self.outbox.put(priority, messages, self.pace, left)

    def _shut(self, lost: bool) -> None:
        self.outbox.close(drop_data=lost)

    def start_pulse(self, hang_up: Callable[[], object]) -> None:
        """Starts the pulse: pings, and gives the link up when the other end stays silent."""
        threading.Thread(target=self._pulse, args=(hang_up,), name=f"pulse {self.name}", daemon=True).start()

    def _pulse(self, hang_up: Callable[[], object]) -> None:
        # A thread of its own, because "alive" must not depend on how long a layer computes.
        while not self.closed:
            time.sleep(_PING_EVERY_S)
            if self.closed:
                return
            silent = time.monotonic() - self.last_heard
            if silent > self.silent_s:
                self.lost(f"silent for {silent:.0f} s")
                hang_up()
            else:
                self.send(pb.Header(kind=pb.PING, progress=self.progress))

    def read_from(self, messages: Iterator[bytes], then: Callable[[], object] = lambda: None) -> None:
        """Starts the thread that receives, until there are no more messages; `then` is called at its end."""

        def read() -> None:
            try:
                for message in messages:
                    self.receive(message)
                self.lost("the other end closed the link")
            except grpc.RpcError as error:
                self.lost(grpc_reason(error))
            except Exception as error:  # noqa: BLE001 - grpc raises a bare Exception when the peer vanishes
                self.lost(f"the connection broke ({error or 'the peer vanished'})")
            then()

        threading.Thread(target=read, name=f"read {self.name}", daemon=True).start()


# ---------------------------------------------------------------- the end that dials


@dataclass(frozen=True)
class _Way:
    """Where to dial for a link, and how."""

    address: str
    method: str = _METHOD
    metadata: Metadata = ()
    suffix: str = ""  # of the link's name


def dial(
    address: str,
    link_name: str,
    hello: pb.Hello,
    counters: ByteCounters,
    ears: Ears,
    deadlines: pb.Deadlines,
    relay: Relay | None = None,
) -> tuple[Link, pb.Ready]:
    """Opens a link and attaches `ears` to it. Repeats while the host is not up or has no such job yet.

    `relay`: the way by which it goes where nobody answers at `address`.
    Raises Refused with the host's reason, PeerLost when `deadlines.ready_s` seconds have passed.
    """
    end = time.monotonic() + deadlines.ready_s
    ways = deque([_Way(address)] if not address.startswith(BEHIND) else [])
    if relay is not None:
        ways.append(_Way(relay.hub, path(DIAL), relay.metadata, BY_RELAY))
    problem = "no answer" if ways else "it can be reached by a relay alone, and this server has none"
    while ways and time.monotonic() < end:
        way = ways[0]
        channel = grpc.insecure_channel(way.address, options=_OPTIONS)
        try:
            grpc.channel_ready_future(channel).result(timeout=max(0.1, min(5.0, end - time.monotonic())))
            link = GrpcLink(link_name + way.suffix, counters, deadlines.silent_s)
            outcome = _say_hello(channel, way, link, hello, ears)
        except grpc.FutureTimeoutError:
            problem = "nobody listens there"
            channel.close()
            ways.rotate()
            continue
        except PeerLost as error:
            problem = str(error)
            channel.close()
            time.sleep(_RETRY_S)
            if way.suffix:
                ways.rotate()
            continue
        if isinstance(outcome, pb.NotReady):
            problem = "it has not received this job yet"
            channel.close()
            time.sleep(min(outcome.retry_ms / 1000, 5.0))
            continue
        return outcome
    raise PeerLost(f"{link_name} at {address} could not be reached within {deadlines.ready_s:.0f} s: {problem}")


def _say_hello(
    channel: grpc.Channel, way: _Way, link: GrpcLink, hello: pb.Hello, ears: Ears
) -> tuple[Link, pb.Ready] | pb.NotReady:
    """Raises Refused, or PeerLost when no answer comes."""
    name = link.name
    link.send(pb.Header(kind=pb.HELLO, hello=hello))
    call = channel.stream_stream(way.method)(iter(link.outbox), metadata=way.metadata)
    answer: list[pb.Header] = []
    problems: list[str] = []
    answered = threading.Event()

    def first_frame(_: Link, frame: Frame) -> None:
        if frame.header.kind == pb.READY:
            link.attach(*ears)  # on the reading thread, so that no later frame slips through
        answer.append(frame.header)
        answered.set()

    def lost(_: Link, reason: str) -> None:
        problems.append(reason)
        answered.set()

    link.attach(first_frame, lost)
    link.read_from(call, then=channel.close)
    answered.wait(_HELLO_DEADLINE_S)
    if answer and answer[0].kind == pb.READY:
        link.start_pulse(call.cancel)
        return link, answer[0].ready
    link.close()
    call.cancel()
    if not answer:
        raise PeerLost(problems[0] if problems else f"no answer to HELLO within {_HELLO_DEADLINE_S:.0f} s")
    if answer[0].kind == pb.REFUSE:
        raise Refused(f"{name} refuses: {answer[0].refuse.reason}")
    if answer[0].kind != pb.NOT_READY:
        raise ProtocolError(f"{name} answered HELLO with {pb.Kind.Name(answer[0].kind)}")
    return answer[0].not_ready


def grpc_reason(error: grpc.RpcError) -> str:
    """The one place that turns gRPC's statuses into words."""
    code = error.code() if hasattr(error, "code") else None
    known = {
        grpc.StatusCode.UNAVAILABLE: "the connection broke",
        grpc.StatusCode.CANCELLED: "the link was given up",
        grpc.StatusCode.DEADLINE_EXCEEDED: "no answer in time",
        grpc.StatusCode.RESOURCE_EXHAUSTED: "a message above the size limit",
        grpc.StatusCode.NOT_FOUND: "it has not dialled the server's relay yet",
        grpc.StatusCode.FAILED_PRECONDITION: "the server's relay is full",
        grpc.StatusCode.PERMISSION_DENIED: "the server's relay does not know this run",
        grpc.StatusCode.UNIMPLEMENTED: "something else than a stage host answers there",
    }
    return known.get(code, f"gRPC {code.name if code else error}")


# ---------------------------------------------------------------- the end that is dialled


class DataPlaneServer:
    """Listens for links. `port` is the real one when 0 was asked for."""

    def __init__(self, host: str, port: int, doorkeeper: Doorkeeper) -> None:
        self._doorkeeper = doorkeeper
        self._server = grpc.server(
            ThreadPoolExecutor(_MAX_STREAMS, "link"), options=[*_OPTIONS, ("grpc.so_reuseport", 0)]
        )
        handler = grpc.stream_stream_rpc_method_handler(self._link)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("edgelam.v1.DataPlane", {"Link": handler}),)
        )
        try:
            self.port = self._server.add_insecure_port(f"{host}:{port}")
        except RuntimeError as error:
            raise EnvironmentProblem(
                f"port {port} on {host} cannot be opened (in use, or not this machine's address); choose another with --port"
            ) from error
        self._server.start()

    def stop(self) -> None:
        self._server.stop(grace=0.5)

    def _link(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        link = GrpcLink(context.peer(), ByteCounters(), silent_s=_HELLO_DEADLINE_S)
        _answer(link, requests, self._doorkeeper, context.cancel)
        yield from link.outbox


class RelayedDoor:
    """Lets a node be dialled through the server's hub, from now until `close`. Where the hub is away, it tries again."""

    def __init__(self, relay: Relay, doorkeeper: Doorkeeper) -> None:
        self._relay, self._doorkeeper = relay, doorkeeper
        self._closed = threading.Event()
        self._calls: grpc.Call | None = None
        threading.Thread(target=self._listen, name="relay", daemon=True).start()

    def close(self) -> None:
        """Links that are open stay open."""
        self._closed.set()
        if self._calls is not None:
            self._calls.cancel()

    def _listen(self) -> None:
        while not self._closed.is_set():
            with grpc.insecure_channel(self._relay.hub, options=_OPTIONS) as channel, suppress(grpc.RpcError):
                self._calls = channel.unary_stream(path(LISTEN))(b"", metadata=self._relay.metadata)
                for number in self._calls:
                    if self._closed.is_set():
                        return
                    if number:  # an empty one only says that the hub is there
                        self._accept(number)
            self._closed.wait(_LISTEN_RETRY_S)

    def _accept(self, number: bytes) -> None:
        channel = grpc.insecure_channel(self._relay.hub, options=_OPTIONS)
        link = GrpcLink("a link by relay", ByteCounters(), silent_s=_HELLO_DEADLINE_S)
        call = channel.stream_stream(path(ACCEPT))(iter(link.outbox), metadata=number_metadata(number))
        _answer(link, call, self._doorkeeper, call.cancel, then=channel.close)


def _answer(
    link: GrpcLink,
    messages: Iterator[bytes],
    doorkeeper: Doorkeeper,
    hang_up: Callable[[], object],
    then: Callable[[], object] = lambda: None,
) -> None:
    """Starts the dialled end of a link."""
    link.attach(partial(_hear_hello, doorkeeper), lambda _, reason: None)
    link.read_from(messages, then)
    link.start_pulse(hang_up)


def _hear_hello(doorkeeper: Doorkeeper, link: Link, frame: Frame) -> None:
    header = frame.header
    if header.kind != pb.HELLO:
        answer: pb.Ready | pb.NotReady | pb.Refuse = pb.Refuse(reason="the first frame must be HELLO")
    elif header.hello.version != PROTOCOL_VERSION:
        answer = pb.Refuse(
            reason=f"protocol version {header.hello.version} of node {header.hello.node!r}; this host speaks "
            f"{PROTOCOL_VERSION}: install the same edgelam-fl on both"
        )
    else:
        answer = doorkeeper(header.hello, link)
    if isinstance(answer, pb.Ready):
        link.send(pb.Header(kind=pb.READY, ready=answer))
        link.job_token = answer.job_token  # no later frame is read before this thread is through
    else:
        refused = isinstance(answer, pb.Refuse)
        link.send(
            pb.Header(kind=pb.REFUSE, refuse=answer) if refused else pb.Header(kind=pb.NOT_READY, not_ready=answer)
        )
        link.close()
