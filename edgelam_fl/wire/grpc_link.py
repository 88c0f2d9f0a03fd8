"""Links over gRPC: one bidirectional stream of raw messages a link, dialled by the one that may sit behind a NAT.

The service knows the handshake (HELLO -> READY, NOT_READY or REFUSE) and nothing else: whom to let in is decided by the
`Doorkeeper` that it is given. Threads, not asyncio: a link has one that reads and gRPC's own that sends, and tensors are
computed on neither.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc

from edgelam_fl.errors import EnvironmentProblem, PeerLost, ProtocolError, Refused
from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.counters import ByteCounters
from edgelam_fl.wire.link import Ears, Frame, Link, Outbox

_METHOD = "/edgelam.v1.DataPlane/Link"
_HELLO_DEADLINE_S = 10.0
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

    def _shut(self) -> None:
        self.outbox.close()

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


# ---------------------------------------------------------------- the end that dials


def dial(
    address: str, link_name: str, hello: pb.Hello, counters: ByteCounters, ears: Ears, deadlines: pb.Deadlines
) -> tuple[Link, pb.Ready]:
    """Opens a link and attaches `ears` to it. Repeats while the host is not up or has no such job yet.

    Raises Refused with the host's reason, PeerLost when `deadlines.ready_s` seconds have passed.
    """
    end = time.monotonic() + deadlines.ready_s
    problem, name = "no answer", link_name
    while time.monotonic() < end:
        channel = grpc.insecure_channel(address, options=_OPTIONS)
        try:
            grpc.channel_ready_future(channel).result(timeout=max(0.1, min(5.0, end - time.monotonic())))
            outcome = _say_hello(channel, GrpcLink(name, counters, deadlines.silent_s), hello, ears)
        except (grpc.FutureTimeoutError, grpc.RpcError) as error:
            problem = "nobody listens there" if isinstance(error, grpc.FutureTimeoutError) else grpc_reason(error)
            channel.close()
            continue
        if isinstance(outcome, pb.NotReady):
            problem = "it has not received this job yet"
            channel.close()
            time.sleep(min(outcome.retry_ms / 1000, 5.0))
            continue
        return outcome
    raise PeerLost(f"{name} at {address} could not be reached within {deadlines.ready_s:.0f} s: {problem}")


def _say_hello(
    channel: grpc.Channel, link: GrpcLink, hello: pb.Hello, ears: Ears
) -> tuple[Link, pb.Ready] | pb.NotReady:
    name = link.name
    link.send(pb.Header(kind=pb.HELLO, hello=hello))
    call = channel.stream_stream(_METHOD)(iter(link.outbox))
    answer: list[pb.Header] = []
    answered = threading.Event()

    def first_frame(_: Link, frame: Frame) -> None:
        if frame.header.kind == pb.READY:
            link.attach(*ears)  # on the reading thread, so that no later frame slips through
        answer.append(frame.header)
        answered.set()

    link.attach(first_frame, lambda _, reason: answered.set())

    def read() -> None:
        try:
            for message in call:
                link.receive(message)
            link.lost("the other end closed the link")
        except grpc.RpcError as error:
            link.lost(grpc_reason(error))
        channel.close()

    threading.Thread(target=read, name=f"read {name}", daemon=True).start()
    answered.wait(_HELLO_DEADLINE_S)
    if answer and answer[0].kind == pb.READY:
        link.start_pulse(call.cancel)
        return link, answer[0].ready
    link.close()
    call.cancel()
    if answer and answer[0].kind == pb.REFUSE:
        raise Refused(f"{name} refuses: {answer[0].refuse.reason}")
    if answer and answer[0].kind != pb.NOT_READY:
        raise ProtocolError(f"{name} answered HELLO with {pb.Kind.Name(answer[0].kind)}")
    return answer[0].not_ready if answer else pb.NotReady(retry_ms=500)


def grpc_reason(error: grpc.RpcError) -> str:
    """The one place that turns gRPC's statuses into words."""
    code = error.code() if hasattr(error, "code") else None
    known = {
        grpc.StatusCode.UNAVAILABLE: "the connection broke",
        grpc.StatusCode.CANCELLED: "the link was given up",
        grpc.StatusCode.DEADLINE_EXCEEDED: "no answer in time",
        grpc.StatusCode.RESOURCE_EXHAUSTED: "a message above the size limit",
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
        link.attach(self._hello, lambda _, reason: None)

        def read() -> None:
            try:
                for message in requests:
                    link.receive(message)
                link.lost("the other end closed the link")
            except grpc.RpcError as error:
                link.lost(grpc_reason(error))
            except Exception as error:  # noqa: BLE001 - grpc raises a bare Exception when the peer vanishes
                link.lost(f"the connection broke ({error or 'the peer vanished'})")

        threading.Thread(target=read, name=f"read {link.name}", daemon=True).start()
        link.start_pulse(context.cancel)
        yield from link.outbox

    def _hello(self, link: Link, frame: Frame) -> None:
        header = frame.header
        if header.kind != pb.HELLO:
            answer: pb.Ready | pb.NotReady | pb.Refuse = pb.Refuse(reason="the first frame must be HELLO")
        elif header.hello.version != PROTOCOL_VERSION:
            answer = pb.Refuse(
                reason=f"protocol version {header.hello.version} of node {header.hello.node!r}; this host speaks "
                f"{PROTOCOL_VERSION}: install the same edgelam-fl on both"
            )
        else:
            answer = self._doorkeeper(header.hello, link)
        if isinstance(answer, pb.Ready):
            link.send(pb.Header(kind=pb.READY, ready=answer))
        else:
            refused = isinstance(answer, pb.Refuse)
            link.send(
                pb.Header(kind=pb.REFUSE, refuse=answer) if refused else pb.Header(kind=pb.NOT_READY, not_ready=answer)
            )
            link.close()
