"""The end of a link that is dialled: directly, or through the relay of the server's hub. Knows handshakes; knows no plans.

Whoever reaches the port may open streams, so a stream has to earn what it costs: until its HELLO has been answered with READY
it has a place in the lobby (`wire.grpc.lobby`) and one thread of a small pool. Threads of its own it gets afterwards, so
streams that only wait never take anything from links that were let in.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import grpc

from edgelam_fl.errors import EnvironmentProblem
from edgelam_fl.trust.identity import SERVER
from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.counters import ByteCounters
from edgelam_fl.wire.grpc.link import GrpcLink, Stream
from edgelam_fl.wire.grpc.lobby import DEFAULT_LOBBY_LIMITS, Lobby, LobbyLimits
from edgelam_fl.wire.grpc.options import DEFAULT_TIMING, LinkTiming, channel_options, server_options
from edgelam_fl.wire.grpc.secure import PLAIN, Security, peer
from edgelam_fl.wire.grpc.services import Send, WithoutThread, service_handler, stub
from edgelam_fl.wire.link import Frame, Link
from edgelam_fl.wire.relay import ACCEPT, LISTEN, RELAY_SERVICE, Relay, number_metadata

_WAITING_CALLS = 128  # streams that wait for a thread of the lobby's pool; gRPC turns further ones away
_STREAMS = 2  # at a time on a connection; our diallers open one
_SPARE_THREADS = 16  # of that pool: for streams that have just lost their place in the lobby
_MOST_SHOWN = 80  # characters of a name that a stranger sent
_LOG = logging.getLogger(__name__)

# Asked about every HELLO. Returns READY after it has opened the link, else when to ask again, or why never.
Doorkeeper = Callable[[pb.Hello, Link], pb.Ready | pb.NotReady | pb.Refuse]


class DataPlaneServer:
    """A port that listens for links. `port` is the real one if 0 was asked for."""

    def __init__(
        self,
        host: str,
        port: int,
        doorkeeper: Doorkeeper,
        timing: LinkTiming = DEFAULT_TIMING,
        security: Security = PLAIN,
        limits: LobbyLimits = DEFAULT_LOBBY_LIMITS,
    ) -> None:
        self._doorkeeper, self._timing, self._security = doorkeeper, timing, security
        self._lobby = Lobby(limits, timing.hello_s)
        self._server = grpc.server(
            ThreadPoolExecutor(limits.places + _SPARE_THREADS, "lobby"),
            options=[
                *server_options(timing, connections=limits.connections, streams=_STREAMS),
                ("grpc.so_reuseport", 0),
            ],
            maximum_concurrent_rpcs=_WAITING_CALLS,
        )
        self._server.add_generic_rpc_handlers((service_handler("DataPlane", {"Link": WithoutThread(self._link)}),))
        try:
            self.port = security.open_port(self._server, host, port)
        except RuntimeError as error:
            raise EnvironmentProblem(
                f"port {port} on {host} cannot be opened (in use, or not this machine's address); choose another with --port"
            ) from error
        self._server.start()

    @property
    def waiting(self) -> int:
        """Counts the streams that were not let in yet."""
        return len(self._lobby)

    def stop(self) -> None:
        self._server.stop(grace=0.5)
        self._lobby.close()

    def _link(self, requests: Iterator[bytes], context: grpc.ServicerContext, send: Send) -> None:
        """Shakes hands on a thread of the lobby's pool; gives a stream that is let in threads of its own."""
        member = peer(context)
        caller = Caller(member.name, member.serial) if member else None
        with self._lobby.place(caller.name if caller else _address_of(context.peer()), context.cancel):
            newcomer = _served_link(context.peer(), caller, self._doorkeeper, self._timing, self._security)
            stream = Stream(newcomer, context.cancel)
            if not _let_in(stream, requests):
                _send_all(stream, context, send)
                return
        stream.read_from(requests)
        name = f"send {stream.link.name}"
        threading.Thread(target=_send_all, args=(stream, context, send), name=name, daemon=True).start()


def _send_all(stream: Stream, context: grpc.ServicerContext, send: Send) -> None:
    """Sends what the stream's link has to send until the link or the call ends; then ends the call."""
    for message in stream.outgoing():
        send(message)
        if not context.is_active():
            break
    send(None)


class RelayedDoor:
    """A way to this node through the server's hub, open until `close`. Calls the hub again if it goes away."""

    def __init__(
        self, relay: Relay, doorkeeper: Doorkeeper, timing: LinkTiming = DEFAULT_TIMING, security: Security = PLAIN
    ) -> None:
        self._relay, self._doorkeeper, self._timing, self._security = relay, doorkeeper, timing, security
        self._lobby = Lobby(DEFAULT_LOBBY_LIMITS, timing.hello_s)
        self._closed = threading.Event()
        self._calls: grpc.Call | None = None
        threading.Thread(target=self._listen, name="relay", daemon=True).start()

    def close(self) -> None:
        """Takes no more links; open ones stay open."""
        self._closed.set()
        self._lobby.close()
        if self._calls is not None:
            self._calls.cancel()

    def _listen(self) -> None:
        while not self._closed.is_set():
            with self._channel() as channel, suppress(grpc.RpcError):
                self._calls = stub(channel, RELAY_SERVICE, LISTEN)(b"", metadata=self._relay.metadata)
                for dialler in self._calls:
                    if self._closed.is_set():
                        return
                    if dialler.number:  # without one the hub only says that it is there
                        threading.Thread(target=self._accept, args=(dialler,), name="relayed link", daemon=True).start()
            self._closed.wait(self._timing.listen_again_s)

    def _accept(self, dialler: pb.Dialler) -> None:
        """Shakes hands with a dialler; then reads its stream until that ends."""
        caller = Caller(dialler.node, dialler.serial)
        with self._channel() as channel:
            newcomer = _served_link("a link by relay", caller, self._doorkeeper, self._timing, self._security)
            stream = Stream(newcomer)
            call = stub(channel, RELAY_SERVICE, ACCEPT)(stream.outgoing(), metadata=number_metadata(dialler.number))
            stream.hang_up = call.cancel
            with self._lobby.place(caller.name, call.cancel):
                _let_in(stream, call)
            stream.read(call)  # of a stream that is not let in: until the dialler has the refusal and hangs up

    def _channel(self) -> grpc.Channel:
        return self._security.channel(self._relay.hub, SERVER, channel_options(self._timing))


def _address_of(caller: str) -> str:
    """Returns the address in gRPC's name of a caller ("ipv4:192.0.2.1:50312"), without the port."""
    return caller.rpartition(":")[0]


def _let_in(stream: Stream, messages: Iterator[bytes]) -> bool:
    """Has the first message answered; returns whether the stream now belongs to an open link, a new or an older one."""
    newcomer = stream.link
    stream.read(messages, most=1)
    if newcomer.is_open:
        newcomer.start_pulse()
    else:
        newcomer.close()
    return stream.link.is_open


@dataclass(frozen=True)
class Caller:
    """The node that a dialler has shown to be, to this node or to the hub."""

    name: str
    serial: str  # number of its certificate; empty: it came to a hub without certificates


def _served_link(
    name: str, caller: Caller | None, doorkeeper: Doorkeeper, timing: LinkTiming, security: Security
) -> GrpcLink:
    """Returns a link that waits for HELLO. `name` and its byte counts serve until the doorkeeper has opened it.

    `caller`: None: the port is plain, and the dialler has shown nothing.
    """

    def barred() -> bool:
        return caller is not None and security.ended.certificate(caller.serial)

    answer = partial(_answer_hello, doorkeeper, caller, barred)
    certificate = caller.serial if caller is not None else ""
    return GrpcLink(name, ByteCounters(), answer, lambda _, reason: None, timing, barred, certificate)


def _answer_hello(
    doorkeeper: Doorkeeper, caller: Caller | None, barred: Callable[[], bool], link: Link, frame: Frame
) -> None:
    """Answers the dialler's first frame, before any frame that the host sends on the link that it has let in."""
    assert isinstance(link, GrpcLink)  # as _served_link made it
    link.hello = frame.header.hello
    with link.holding_back():
        if barred():
            answer: pb.Ready | pb.NotReady | pb.Refuse = pb.Refuse(reason="the membership of this node has ended")
        else:
            answer = _verdict(doorkeeper, caller, link, frame.header)
        if isinstance(answer, pb.Ready):
            link.send(pb.Header(kind=pb.READY, ready=answer))
            return
    if isinstance(answer, pb.Refuse):
        _LOG.warning("refused a link of %s: %s", caller.name if caller else link.name, answer.reason)
        link.send(pb.Header(kind=pb.REFUSE, refuse=answer))
    else:
        link.send(pb.Header(kind=pb.NOT_READY, not_ready=answer))
    link.close()


def _verdict(
    doorkeeper: Doorkeeper, caller: Caller | None, link: Link, header: pb.Header
) -> pb.Ready | pb.NotReady | pb.Refuse:
    if header.kind != pb.HELLO:
        return pb.Refuse(reason="the first frame must be HELLO")
    if header.hello.version != PROTOCOL_VERSION:
        return pb.Refuse(
            reason=f"protocol version {header.hello.version} of node {header.hello.node!r}; this host speaks "
            f"{PROTOCOL_VERSION}: install the same edgelam-fl on both"
        )
    if caller is not None and header.hello.node != caller.name:
        return pb.Refuse(reason=f"node {caller.name!r} says that it is {header.hello.node[:_MOST_SHOWN]!r}")
    return doorkeeper(header.hello, link)
