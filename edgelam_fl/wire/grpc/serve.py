"""Serves links over gRPC: those that are dialled here, and those that the relay brings."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import grpc

from edgelam_fl.errors import EnvironmentProblem
from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.counters import ByteCounters
from edgelam_fl.wire.grpc.options import _HELLO_DEADLINE_S, _OPTIONS, GrpcLink
from edgelam_fl.wire.link import Frame, Link
from edgelam_fl.wire.relay import ACCEPT, LISTEN, Relay, number_metadata, path

_LISTEN_RETRY_S = 2.0
_MAX_STREAMS = 512

# Asked for every HELLO: lets the link in (after attaching to it) or says why not.
Doorkeeper = Callable[[pb.Hello, Link], pb.Ready | pb.NotReady | pb.Refuse]


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
