"""The end of a link that is dialled: directly, or through the relay of the server's hub. Knows handshakes; knows no plans."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import grpc

from edgelam_fl.errors import EnvironmentProblem
from edgelam_fl.trust.identity import SERVER
from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.counters import ByteCounters
from edgelam_fl.wire.grpc.link import GrpcLink
from edgelam_fl.wire.grpc.options import DEFAULT_TIMING, LinkTiming, channel_options
from edgelam_fl.wire.grpc.secure import PLAIN, Security, peer
from edgelam_fl.wire.grpc.services import service_handler, stub
from edgelam_fl.wire.link import Frame, Link
from edgelam_fl.wire.relay import ACCEPT, LISTEN, RELAY_SERVICE, Relay, number_metadata

_MAX_STREAMS = 512
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
    ) -> None:
        self._doorkeeper, self._timing = doorkeeper, timing
        self._server = grpc.server(
            ThreadPoolExecutor(_MAX_STREAMS, "link"), options=[*channel_options(timing), ("grpc.so_reuseport", 0)]
        )
        self._server.add_generic_rpc_handlers((service_handler("DataPlane", {"Link": self._link}),))
        try:
            self.port = security.open_port(self._server, host, port)
        except RuntimeError as error:
            raise EnvironmentProblem(
                f"port {port} on {host} cannot be opened (in use, or not this machine's address); choose another with --port"
            ) from error
        self._server.start()

    def stop(self) -> None:
        self._server.stop(grace=0.5)

    def _link(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        member = peer(context)
        link = _served_link(context.peer(), member.name if member else None, self._doorkeeper, self._timing)
        link.read_from(requests)
        link.start_pulse(context.cancel)
        yield from link.outbox


class RelayedDoor:
    """A way to this node through the server's hub, open until `close`. Calls the hub again if it goes away."""

    def __init__(
        self, relay: Relay, doorkeeper: Doorkeeper, timing: LinkTiming = DEFAULT_TIMING, security: Security = PLAIN
    ) -> None:
        self._relay, self._doorkeeper, self._timing, self._security = relay, doorkeeper, timing, security
        self._closed = threading.Event()
        self._calls: grpc.Call | None = None
        threading.Thread(target=self._listen, name="relay", daemon=True).start()

    def close(self) -> None:
        """Takes no more links; open ones stay open."""
        self._closed.set()
        if self._calls is not None:
            self._calls.cancel()

    def _listen(self) -> None:
        while not self._closed.is_set():
            with self._channel() as channel, suppress(grpc.RpcError):
                self._calls = stub(channel, RELAY_SERVICE, LISTEN)(b"", metadata=self._relay.metadata)
                for number in self._calls:
                    if self._closed.is_set():
                        return
                    if number:  # an empty one only says that the hub is there
                        self._accept(number)
            self._closed.wait(self._timing.listen_again_s)

    def _accept(self, number: bytes) -> None:
        channel = self._channel()
        link = _served_link("a link by relay", None, self._doorkeeper, self._timing)
        call = stub(channel, RELAY_SERVICE, ACCEPT)(iter(link.outbox), metadata=number_metadata(number))
        link.read_from(call, then=channel.close)
        link.start_pulse(call.cancel)

    def _channel(self) -> grpc.Channel:
        return self._security.channel(self._relay.hub, SERVER, channel_options(self._timing))


def _served_link(name: str, caller: str | None, doorkeeper: Doorkeeper, timing: LinkTiming) -> GrpcLink:
    """Returns a link that waits for HELLO. `name` and its byte counts serve until the doorkeeper has opened it.

    `caller`: the node that the dialler has proved to be; None: nothing was proved, as on a plain port.
    """
    answer = partial(_answer_hello, doorkeeper, caller)
    return GrpcLink(name, ByteCounters(), answer, lambda _, reason: None, timing)


def _answer_hello(doorkeeper: Doorkeeper, caller: str | None, link: Link, frame: Frame) -> None:
    """Answers the dialler's first frame, before any frame that the host sends on the link that it has let in."""
    with link.holding_back():
        answer = _verdict(doorkeeper, caller, link, frame.header)
        if isinstance(answer, pb.Ready):
            link.send(pb.Header(kind=pb.READY, ready=answer))
            return
    if isinstance(answer, pb.Refuse):
        _LOG.warning("refused a link of %s: %s", caller or link.name, answer.reason)
        link.send(pb.Header(kind=pb.REFUSE, refuse=answer))
    else:
        link.send(pb.Header(kind=pb.NOT_READY, not_ready=answer))
    link.close()


def _verdict(
    doorkeeper: Doorkeeper, caller: str | None, link: Link, header: pb.Header
) -> pb.Ready | pb.NotReady | pb.Refuse:
    if header.kind != pb.HELLO:
        return pb.Refuse(reason="the first frame must be HELLO")
    if header.hello.version != PROTOCOL_VERSION:
        return pb.Refuse(
            reason=f"protocol version {header.hello.version} of node {header.hello.node!r}; this host speaks "
            f"{PROTOCOL_VERSION}: install the same edgelam-fl on both"
        )
    if caller is not None and header.hello.node != caller:
        return pb.Refuse(
            reason=f"the certificate is of node {caller!r}, and HELLO of {header.hello.node[:_MOST_SHOWN]!r}"
        )
    return doorkeeper(header.hello, link)
