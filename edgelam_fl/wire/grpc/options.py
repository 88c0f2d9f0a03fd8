"""What both ends of a link over gRPC share: how often they look after each other, gRPC's options, its errors in words."""

from __future__ import annotations

import resource
from dataclasses import dataclass

import grpc

Options = list[tuple[str, int]]
MESSAGE_BYTES = 6 << 20  # enough for a chunk with the largest header
_STREAMS_PER_CONNECTION = 16
MOST_CONNECTIONS = 1024  # per port


@dataclass(frozen=True, kw_only=True)
class LinkTiming:
    """Waits and intervals of the ends of a link, in seconds."""

    ping_every_s: float = 2.0  # our own PING, from a thread outside compute
    hello_s: float = 5.0  # patience of the dialled end: from a stream's start until its HELLO is answered
    answer_s: float = 10.0  # patience of the dialling end with the answer to its HELLO
    connect_s: float = 5.0  # patience with one attempt to connect
    redial_s: float = 0.5  # pause before a link that broke in the handshake is dialled again
    listen_again_s: float = 2.0  # pause before a host calls a hub again that has gone away
    farewell_s: float = 60.0  # patience with the end of a closed link's stream while nothing of it moves
    keepalive_s: float = 20.0  # gRPC's own ping on an idle connection
    keepalive_answer_s: float = 10.0  # patience with the answer to that ping
    keepalive_least_s: float = 5.0  # more frequent pings are taken for an attack
    unused_s: float = 10.0  # a connection without a stream is closed after so long


DEFAULT_TIMING = LinkTiming()


def channel_options(timing: LinkTiming = DEFAULT_TIMING, most_sent_bytes: int = MESSAGE_BYTES) -> Options:
    """Returns gRPC's options for a channel or a server that carries links.

    `most_sent_bytes` limits the messages that this end sends; -1: no limit.
    """
    return [
        ("grpc.max_receive_message_length", MESSAGE_BYTES),
        ("grpc.max_send_message_length", most_sent_bytes),
        ("grpc.keepalive_time_ms", round(1000 * timing.keepalive_s)),
        ("grpc.keepalive_timeout_ms", round(1000 * timing.keepalive_answer_s)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", round(1000 * timing.keepalive_least_s)),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_http_proxy", 0),  # the other end is a machine of the federation, never a web address
    ]


def server_options(
    timing: LinkTiming = DEFAULT_TIMING,
    most_sent_bytes: int = MESSAGE_BYTES,
    connections: int = MOST_CONNECTIONS,
    streams: int = _STREAMS_PER_CONNECTION,
) -> Options:
    """Returns gRPC's options for a server that carries links: those of a channel, and limits of what strangers may hold.

    `most_sent_bytes`: as of `channel_options`. `connections`: at most so many are open at a time, and never more than half of
    the files that this process may open. `streams`: at a time on each connection; gRPC itself turns further ones away.
    """
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files != resource.RLIM_INFINITY:
        connections = min(connections, files // 2)
    return [
        *channel_options(timing, most_sent_bytes),
        ("grpc.server_handshake_timeout_ms", round(1000 * timing.hello_s)),  # TCP, TLS and HTTP/2 together
        ("grpc.max_connection_idle_ms", round(1000 * timing.unused_s)),
        ("grpc.max_concurrent_streams", streams),
        ("grpc.max_allowed_incoming_connections", connections),
    ]


def grpc_reason(error: grpc.RpcError) -> str:
    """Returns what a gRPC status means for the reader of a message: the one place that knows."""
    code = error.code() if hasattr(error, "code") else grpc.StatusCode.UNAVAILABLE  # a server's call has none
    known = {
        grpc.StatusCode.UNAVAILABLE: "the connection broke",
        grpc.StatusCode.CANCELLED: "the link was given up",
        grpc.StatusCode.DEADLINE_EXCEEDED: "no answer in time",
        grpc.StatusCode.RESOURCE_EXHAUSTED: "a message above the size limit",
        grpc.StatusCode.NOT_FOUND: "it has not dialled the server's relay yet",
        grpc.StatusCode.FAILED_PRECONDITION: "the server's relay has no room for the link",
        grpc.StatusCode.PERMISSION_DENIED: "the server's hub does not let this node in there",
        grpc.StatusCode.UNIMPLEMENTED: "something else than a stage host answers there",
    }
    return known.get(code, f"gRPC {code.name if code else error}")
