"""What a stranger at a port, or a member on its own link, may use up: streams, threads, memory and patience."""

from __future__ import annotations

import math
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import torch

from edgelam_fl.hub import relay
from edgelam_fl.hub.daemon import HubServer
from edgelam_fl.split.inbox import Inbox
from edgelam_fl.trust.authority import Authority, issue
from edgelam_fl.trust.identity import DEVICE, HOST
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.counters import ByteCounters
from edgelam_fl.wire.grpc.dial import dial
from edgelam_fl.wire.grpc.link import GrpcLink, Stream
from edgelam_fl.wire.grpc.lobby import DEFAULT_LOBBY_LIMITS, Lobby, LobbyLimits
from edgelam_fl.wire.grpc.options import LinkTiming
from edgelam_fl.wire.grpc.secure import PLAIN, Security
from edgelam_fl.wire.grpc.serve import DataPlaneServer, RelayedDoor
from edgelam_fl.wire.grpc.services import stub
from edgelam_fl.wire.link import MAX_HELLO_BYTES, MOST_UNKNOWN_KINDS, NOT_READING, PINGS_SAVED, Frame, Link
from edgelam_fl.wire.memory import memory_pair
from edgelam_fl.wire.outbox import MOST_CONTROL
from edgelam_fl.wire.relay import DIAL, LISTEN, Relay, make_token
from tests.floods import flood, half_open
from tests.fuzz import fuzz_hub, fuzz_links, fuzz_port, resident_bytes
from tests.links import Heard, hello, make_terms, ready, terms
from tests.support import WAIT_S, grpc_server

FOREVER = LinkTiming(hello_s=3600.0, unused_s=3600.0)
OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]


def message(header: pb.Header, payload: bytes = b"") -> bytes:
    encoded = header.SerializeToString()
    return struct.pack("<I", len(encoded)) + encoded + payload


def eventually(done: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)


class Port:
    """A data port that lets everybody in who says HELLO."""

    def __init__(self, timing: LinkTiming, security: Security, limits: LobbyLimits) -> None:
        self.heard = Heard()
        self.server = DataPlaneServer("127.0.0.1", 0, self.admit, timing, security, limits)
        self.address = f"127.0.0.1:{self.server.port}"

    def admit(self, hello: pb.Hello, link: Link) -> pb.Ready:
        link.open(terms(answer=ready(), heard=self.heard))
        return ready()

    def dial(self, security: Security = PLAIN) -> Link:
        counters = ByteCounters()
        return dial("edge-1", self.address, "entry", hello(), counters, make_terms(), WAIT_S, security=security)


@contextmanager
def port(
    timing: LinkTiming = FOREVER, security: Security = PLAIN, limits: LobbyLimits = DEFAULT_LOBBY_LIMITS
) -> Iterator[Port]:
    opened = Port(timing, security, limits)
    try:
        yield opened
    finally:
        opened.server.stop()


@contextmanager
def strangers(address: str, channels: int, streams: int, first: bytes | None = None) -> Iterator[list[grpc.Call]]:
    """Streams that send `first`, None: nothing, and stay open."""
    over = threading.Event()

    def squat() -> Iterator[bytes]:
        if first is not None:
            yield first
        over.wait()

    opened = [grpc.insecure_channel(address, options=OWN_CONNECTION) for _ in range(channels)]
    try:
        yield [stub(channel, "DataPlane", "Link")(squat()) for channel in opened for _ in range(streams)]
    finally:
        over.set()
        for channel in opened:
            channel.close()


def answers_of(address: str, *messages: bytes) -> list[pb.Header]:
    """Returns what a port answers on one stream, until the port ends it."""
    over = threading.Event()

    def sent() -> Iterator[bytes]:
        yield from messages
        over.wait()

    with grpc.insecure_channel(address, options=OWN_CONNECTION) as channel:
        answers = list(stub(channel, "DataPlane", "Link")(sent(), timeout=WAIT_S))
        over.set()
    return [pb.Header.FromString(answer[4 : 4 + struct.unpack_from("<I", answer)[0]]) for answer in answers]


def lobby_threads() -> int:
    return sum(thread.name.startswith("lobby_") for thread in threading.enumerate())


# ---------------------------------------------------------------- at the port


def test_s10_streams_that_say_nothing_keep_nobody_out() -> None:
    before = lobby_threads()
    with port() as host, strangers(host.address, channels=40, streams=5):
        eventually(lambda: host.server.waiting >= 8)
        link = host.dial()
        link.send(pb.Header(kind=pb.DONE))
        assert isinstance(host.heard.get(timeout=WAIT_S), Frame)
        assert host.server.waiting <= 33, "one address holds no more than half of the lobby"
        assert lobby_threads() - before <= 80
        link.close()


def test_s10_a_stream_without_hello_is_hung_up_on_whatever_it_does() -> None:
    with port(LinkTiming(hello_s=2.0)) as host, strangers(host.address, channels=1, streams=3) as calls:
        for call in calls:
            with pytest.raises(grpc.RpcError) as caught:
                list(call)
            assert caught.value.code() == grpc.StatusCode.CANCELLED
        eventually(lambda: host.server.waiting == 0)


@pytest.mark.parametrize("first", [pb.Header(kind=pb.PING), pb.Header(kind=pb.ACT), pb.Header(optional=True, kind=99)])  # type: ignore[arg-type]
def test_s10_anything_but_hello_first_is_refused_and_closed(first: pb.Header) -> None:
    with port() as host:
        (answer,) = answers_of(host.address, message(first), message(pb.Header(kind=pb.HELLO, hello=hello())))
        assert answer.kind == pb.ERROR
        assert answer.error.text.endswith("before the handshake is over")
        eventually(lambda: host.server.waiting == 0)


def test_s10_a_large_header_is_not_read_before_hello() -> None:
    with port() as host:
        large = pb.Header(kind=pb.HELLO, hello=hello(node="x" * MAX_HELLO_BYTES))
        (answer,) = answers_of(host.address, message(large))
        assert answer.error.text.startswith("a header of ")


def test_s10_connections_that_say_nothing_are_closed() -> None:
    with port(LinkTiming(hello_s=2.0, unused_s=2.0)) as host:
        silent = [socket.create_connection(("127.0.0.1", host.server.port)) for _ in range(100)]
        host.dial().close()
        for connection in silent:
            connection.settimeout(WAIT_S)
            while connection.recv(1 << 16):
                pass  # gRPC's settings
            connection.close()


def test_s10_half_open_handshakes_of_tls_are_closed(tmp_path: Path) -> None:
    authority = Authority.open(tmp_path)
    edge, device = (Security(issue(authority, name, role)) for name, role in (("edge-1", HOST), ("device-1", DEVICE)))
    with port(LinkTiming(hello_s=2.0), edge) as host:
        silent = [socket.create_connection(("127.0.0.1", host.server.port)) for _ in range(50)]
        for connection in silent[25:]:
            connection.sendall(b"\x16\x03\x01\x02\x00\x01")  # the beginning of a ClientHello
        host.dial(device).close()
        for connection in silent:
            connection.settimeout(WAIT_S)
            assert connection.recv(1) == b""
            connection.close()


def test_s10_a_port_takes_a_limited_number_of_connections() -> None:
    with port(limits=LobbyLimits(connections=20)) as host:
        link = host.dial()
        opened = [socket.create_connection(("127.0.0.1", host.server.port)) for _ in range(70)]
        for connection in opened[-50:]:  # as those of one who came too late
            connection.settimeout(WAIT_S)
            assert connection.recv(1) == b""
        link.send(pb.Header(kind=pb.DONE))
        assert isinstance(host.heard.get(timeout=WAIT_S), Frame)
        for connection in opened:
            connection.close()
        link.close()


def test_s10_the_lobby_gives_up_the_stream_that_has_waited_longest() -> None:
    lobby, hung_up = Lobby(LobbyLimits(places=6, places_per_address=2), 3600.0), list[str]()
    with ExitStack() as guests:

        def enter(address: str, name: str) -> None:
            guests.enter_context(lobby.place(address, lambda: hung_up.append(name)))

        for name in ("a0", "a1", "a2"):
            enter("a", name)
        assert hung_up == [], "an address may have more while half of the lobby is free"
        for address, name in (("a", "a3"), ("b", "b0"), ("a", "a4"), ("c", "c0"), ("d", "d0")):
            enter(address, name)
        assert hung_up == ["a0", "a1"]
        enter("e", "e0")
        enter("f", "f0")
        assert hung_up == ["a0", "a1", "a2", "a3"], "the lobby is full: whoever has waited longest goes"
        assert len(lobby) == 6
    assert len(lobby) == 0
    lobby.close()


def test_s10_the_relay_is_used_if_the_direct_way_does_not_answer(tmp_path: Path) -> None:
    over = threading.Event()

    def never(hello: pb.Hello, link: Link) -> pb.NotReady:
        over.wait(WAIT_S)
        return pb.NotReady()

    with port() as host, grpc_server([relay.make_service(tmp_path)]) as hub:
        silent = DataPlaneServer("127.0.0.1", 0, never, FOREVER)
        ways = {
            method: Relay(f"127.0.0.1:{hub}", make_token(relay.relay_key(tmp_path), method, "r/1/1/e", node, 1))
            for method, node in ((LISTEN, "edge-1"), (DIAL, "device-1"))
        }
        door = RelayedDoor(ways[LISTEN], host.admit)
        link = dial(
            "edge-1", f"127.0.0.1:{silent.port}", "entry", hello(), ByteCounters(), make_terms(), WAIT_S, ways[DIAL],
            timing=LinkTiming(answer_s=1.0, redial_s=0.0),
        )  # fmt: skip
        assert link.name == "entry by relay"
        link.close()
        door.close()
        over.set()
        silent.stop()


# ---------------------------------------------------------------- on a link


class Unread(Link):
    """An end whose messages nobody takes."""

    queued = 0

    def _transmit(self, priority: int, messages: list[bytes], left: Callable[[], None] | None) -> None:
        self.queued += len(messages)


def test_s10_an_end_that_pings_and_does_not_read_is_given_up() -> None:
    over, heard = threading.Event(), Heard()

    def admit(hello: pb.Hello, link: Link) -> pb.Ready:
        link.open(terms("entry stranger", ready(window=1000), heard=heard, silent_s=1.0))
        for _ in range(40):
            link.send(pb.Header(kind=pb.ACT), torch.zeros(1, 1 << 10, 1 << 10))
        return ready(window=1000)

    def says() -> Iterator[bytes]:
        yield message(pb.Header(kind=pb.HELLO, hello=hello()))
        while not over.wait(0.1):
            yield message(pb.Header(kind=pb.PING))

    server = DataPlaneServer("127.0.0.1", 0, admit, LinkTiming(ping_every_s=0.05, farewell_s=0.1))
    try:
        with grpc.insecure_channel(f"127.0.0.1:{server.port}", options=OWN_CONNECTION) as channel:
            _unread = stub(channel, "DataPlane", "Link")(says())
            assert str(heard.get(timeout=WAIT_S)).startswith((NOT_READING, "silent for")), (
                "a slow machine may be silent"
            )
            eventually(lambda: not any(thread.name.endswith(" stranger") for thread in threading.enumerate()))
            over.set()
    finally:
        server.stop()


def test_s10_an_end_that_is_never_silent_has_to_read_too() -> None:
    reasons, hung_up = list[str](), threading.Event()
    link = GrpcLink("exit ann", ByteCounters(), lambda *_: None, lambda *_: None, LinkTiming(ping_every_s=0.01))
    link.open(terms(silent_s=0.05, on_lost=lambda _, reason: reasons.append(reason)))
    link.last_heard = math.inf
    link.send(pb.Header(kind=pb.DONE))
    next(Stream(link, hung_up.set).outgoing())  # the transport passes this message on, and does not come back
    link.start_pulse()
    assert hung_up.wait(WAIT_S)
    assert reasons[0].startswith(f"{NOT_READING}: nothing went out for ")


def test_s15_tensors_do_not_pile_up_for_an_end_that_does_not_read() -> None:
    reasons = list[str]()
    link = Unread("exit ann", ByteCounters())
    link.open(terms(on_lost=lambda _, reason: reasons.append(reason)))
    for _ in range(100):
        link.send(pb.Header(kind=pb.ACT), torch.zeros(1, 1, 4))
    assert reasons == [NOT_READING]
    assert link.queued == 5, "four windows, and the one that was too much"


def test_s15_frames_without_tensors_do_not_pile_up_either() -> None:
    reasons = list[str]()
    link = GrpcLink("exit ann", ByteCounters(), lambda *_: None, lambda *_: None, FOREVER)
    link.open(terms(on_lost=lambda _, reason: reasons.append(reason)))
    for _ in range(MOST_CONTROL + 1):
        link.send(pb.Header(kind=pb.STEP_CLOSE))
    assert reasons == [NOT_READING]


def test_s10_a_flood_of_pings_ends_the_link_and_answers_unread_are_not_kept() -> None:
    reasons, sent = list[str](), 0
    link = Unread("entry ann", ByteCounters())
    link.open(terms(on_lost=lambda _, reason: reasons.append(reason)))
    while not link.closed:
        link.receive(message(pb.Header(kind=pb.PING)))
        sent += 1
    assert PINGS_SAVED <= sent < 100 * PINGS_SAVED
    assert "a flood of PING" in reasons[0]
    assert link.queued == 2, "one PONG and the reason of the end"


def test_s15_unknown_kinds_share_a_row_and_end_the_link() -> None:
    counters, reasons = ByteCounters(), list[str]()
    link, _ = memory_pair("entry ann", counters, ByteCounters())
    link.open(terms(counters=counters, on_lost=lambda _, reason: reasons.append(reason)))
    for number in range(1000):
        header = pb.Header(optional=True)
        header.kind = 1000 + number  # type: ignore[assignment]
        link.receive(message(header))
    assert link.closed
    assert f"more than {MOST_UNKNOWN_KINDS} frames of unknown kinds" in reasons[0]
    assert [row.kind for row in counters.report() if row.direction == "received"] == ["UNKNOWN"]


def activation(step: int, number: int) -> bytes:
    shape = [1, 2, 4]
    meta = pb.Tensor(dtype="float32", shape=shape, codec="raw", total_bytes=32)
    header = pb.Header(kind=pb.ACT, last_chunk=True, phase=pb.TRAIN, step=step, micro_batch=number, tensor=meta)
    return message(header, bytes(32))


@dataclass
class Busy:
    """A host whose compute thread takes nothing out of the inbox, and the link of one member."""

    inbox: Inbox
    link: Link
    reasons: list[str]


@pytest.fixture
def busy() -> Busy:
    inbox, reasons = Inbox(WAIT_S), list[str]()
    link, member = memory_pair("entry ann", ByteCounters(), ByteCounters())
    member.open(terms(on_lost=lambda _, reason: reasons.append(reason)))
    link.open(terms(answer=ready(window=2), on_frame=inbox.on_frame, on_lost=inbox.on_lost))
    return Busy(inbox, link, reasons)


def test_s15_the_window_is_enforced_while_the_host_computes(busy: Busy) -> None:
    for number in range(1000):
        busy.link.receive(activation(0, number))
    assert busy.link.closed
    assert "more than 2 micro-batches in flight" in busy.reasons[0]
    frames = [busy.inbox.get(0.0) for _ in range(3)]
    assert [isinstance(item[1], Frame) for item in frames if isinstance(item, tuple)] == [True, True, False]
    assert busy.inbox.empty()


def test_s15_steps_do_not_multiply_the_window(busy: Busy) -> None:
    for step in range(2):
        for number in range(2):
            busy.link.receive(activation(step, number))
    assert not busy.link.closed, "a step may be closed while a late device's micro-batches are still here"
    busy.link.receive(activation(2, 0))
    assert "micro-batches of more than 2 steps in flight" in busy.reasons[0]


def test_s15_a_link_goes_on_within_its_window(busy: Busy) -> None:
    for step in range(20):
        for number in range(4):
            busy.link.receive(activation(step, number))
            if number:
                assert busy.inbox.get(0.0) is not None
        assert busy.inbox.get(0.0) is not None
    assert busy.reasons == []


@pytest.mark.parametrize("size", [0, 1 << 20])
def test_s15_small_frames_unread_are_limited_by_number_and_size(busy: Busy, size: int) -> None:
    frame = message(pb.Header(kind=pb.CANCEL, cancel=pb.Cancel(reason="x" * size)))
    for _ in range(20 if size else 10_000):
        busy.link.receive(frame)
    assert "wait to be read; one more is too many" in busy.reasons[0]


# ---------------------------------------------------------------- mutated input; `python -m benchmarks.fuzz` sends more


def test_mutated_frames_and_handshakes_neither_escape_nor_take_memory() -> None:
    fuzz_links(500, seed=1)
    before = resident_bytes(os.getpid())
    tally = fuzz_links(4000, seed=2)
    assert tally.escaped == []
    assert tally.outcomes["closed"] > 100
    assert tally.outcomes["taken"] > 100
    assert resident_bytes(os.getpid()) - before < 64 << 20


def test_mutated_streams_and_calls_at_live_ports_hang_nobody(tmp_path: Path) -> None:
    hub = HubServer("127.0.0.1", 0, tmp_path / "hub")
    try:
        with port() as host:
            link = host.dial()
            at_port = fuzz_port(host.address, 1500, seed=3)
            at_hub = fuzz_hub(f"127.0.0.1:{hub.port}", 300, seed=4)
            link.send(pb.Header(kind=pb.DONE))
            heard = host.heard.get(timeout=WAIT_S)
            while not (isinstance(heard, Frame) and heard.header.kind == pb.DONE):
                heard = host.heard.get(timeout=WAIT_S)
            assert at_port.hung == at_hub.hung == 0
            eventually(lambda: host.server.waiting == 0)
            link.close()
    finally:
        hub.stop()


def test_s10_floods_leave_counts_as_they_were() -> None:
    """Counts, not speed: `python -m benchmarks.floods` measures that."""
    before = lobby_threads()
    with port() as host:
        link = host.dial()
        stranger = half_open(host.address, 5)
        assert stranger is not None
        eventually(lambda: host.server.waiting == 2)  # gRPC turns away the rest of a connection
        assert flood(host.address, 1000, 5000, waves=1, pause_s=0.0)["streams"] >= 1000
        assert host.server.waiting <= 64
        assert lobby_threads() - before <= 80
        link.send(pb.Header(kind=pb.DONE))
        assert isinstance(host.heard.get(timeout=WAIT_S), Frame)
        host.dial().close()
        stranger.close()
        eventually(lambda: host.server.waiting == 0)
        link.close()
