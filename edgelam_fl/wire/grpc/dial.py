"""Dials links over gRPC: directly, or through the relay of the hub."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass

import grpc

from edgelam_fl.errors import PeerLost, ProtocolError, Refused
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.counters import ByteCounters
from edgelam_fl.wire.grpc.options import _HELLO_DEADLINE_S, _METHOD, _OPTIONS, GrpcLink
from edgelam_fl.wire.link import Ears, Frame, Link
from edgelam_fl.wire.relay import BEHIND, BY_RELAY, DIAL, Metadata, Relay, path

_RETRY_S = 0.5


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
