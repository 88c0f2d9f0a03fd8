"""Links through the hub's relay, over real sockets: the host's end, the dialler's end, and what goes wrong between them."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
import torch

from edgelam_fl.addresses import free_port
from edgelam_fl.errors import PeerLost, Refused
from edgelam_fl.hub import relay
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.counters import ByteCounters
from edgelam_fl.wire.grpc.dial import dial
from edgelam_fl.wire.grpc.options import LinkTiming
from edgelam_fl.wire.grpc.serve import DataPlaneServer, RelayedDoor
from edgelam_fl.wire.grpc.services import stub
from edgelam_fl.wire.link import Frame, Link
from edgelam_fl.wire.relay import ACCEPT, BEHIND, DIAL, LISTEN, RELAY_SERVICE, Relay, make_token, number_metadata
from tests.links import Heard, hello, make_terms, ready, terms
from tests.support import WAIT_S, grpc_server

PART = "rün/1/1/edge-1"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    with grpc_server([relay.make_service(tmp_path)]) as port:
        yield f"127.0.0.1:{port}"


@pytest.fixture
def way(hub: str, tmp_path: Path) -> Callable[[str], Relay]:
    return lambda method: Relay(hub, token_for(relay.relay_key(tmp_path), method))


def token_for(key: bytes, method: str, part: str = PART, node: str = "device-1") -> bytes:
    return make_token(key, method, part, "edge-1" if method == LISTEN else node, 2)


class Host:
    """The dialled end: admits everybody once it has its job."""

    def __init__(self, silent_s: float = 30.0) -> None:
        self.heard, self.links, self.silent_s = Heard(), list[Link](), silent_s
        self.ready = threading.Event()
        self.ready.set()

    def admit(self, hello: pb.Hello, link: Link) -> pb.Ready | pb.NotReady | pb.Refuse:
        if hello.node == "stranger":
            return pb.Refuse(reason="no route here")
        if not self.ready.is_set():
            return pb.NotReady(retry_ms=50)
        link.open(terms(answer=ready(), heard=self.heard, silent_s=self.silent_s))
        self.links.append(link)
        return ready()


def call(address: str, way: Relay | None, heard: Heard, ready_s: float = 20, node: str = "device-1") -> Link:
    terms = make_terms(heard, silent_s=30)
    return dial("edge-1", address, "entry edge-1", hello("rün/1/1", node), ByteCounters(), terms, ready_s, way)


def test_frames_go_both_ways_and_an_end_that_closes_ends_the_other(way: Callable[[str], Relay]) -> None:
    host, heard = Host(), Heard()
    door = RelayedDoor(way(LISTEN), host.admit)
    near = call(BEHIND + "edge-1", way(DIAL), heard)
    assert near.name == "entry edge-1 by relay"
    sent = torch.randn(2, 300, 576)  # of several chunks
    near.send(pb.Header(kind=pb.ACT, step=1), sent)
    got = host.heard.get(timeout=20)
    assert isinstance(got, Frame)
    assert got.tensor is not None
    assert torch.equal(got.tensor, sent)
    host.links[0].send(pb.Header(kind=pb.GRAD, step=1), 2 * sent)
    back = heard.get(timeout=20)
    assert isinstance(back, Frame)
    assert back.tensor is not None
    assert torch.equal(back.tensor, 2 * sent)
    door.close()  # the part is over; its links end by themselves
    host.links[0].send(pb.Header(kind=pb.STEP_CLOSE, step=9))
    host.links[0].close()
    last = heard.get(timeout=20)
    assert isinstance(last, Frame), "what was sent before the end still comes"
    assert last.header.step == 9
    assert heard.get(timeout=20) == "the other end closed the link"


def test_a_dialler_waits_for_the_host_to_come_and_to_have_its_job(way: Callable[[str], Relay]) -> None:
    host, heard = Host(), Heard()
    host.ready.clear()
    doors: list[RelayedDoor] = []
    threading.Timer(0.7, lambda: doors.append(RelayedDoor(way(LISTEN), host.admit))).start()
    threading.Timer(1.5, host.ready.set).start()
    began = time.monotonic()
    call(BEHIND + "edge-1", way(DIAL), heard).close()
    assert time.monotonic() - began > 1.4
    doors[0].close()


def test_the_direct_way_comes_first_and_the_relay_where_it_is_shut(way: Callable[[str], Relay]) -> None:
    host, heard = Host(), Heard()
    host.ready.clear()
    threading.Timer(1.0, host.ready.set).start()
    door = RelayedDoor(way(LISTEN), host.admit)
    server = DataPlaneServer("127.0.0.1", 0, host.admit)
    try:
        direct = call(f"127.0.0.1:{server.port}", way(DIAL), heard)
        assert direct.name == "entry edge-1", "a host that has not its job yet is no reason to go round"
        direct.close()
        round_about = call(f"127.0.0.1:{free_port()}", way(DIAL), heard)
        assert round_about.name == "entry edge-1 by relay"
        round_about.close()
    finally:
        server.stop()
        door.close()


def test_who_goes_away_is_missed_at_once(way: Callable[[str], Relay], monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host()
    door = RelayedDoor(way(LISTEN), host.admit)
    channels: list[grpc.Channel] = []
    make = grpc.insecure_channel
    monkeypatch.setattr(grpc, "insecure_channel", lambda *a, **k: channels.append(make(*a, **k)) or channels[-1])
    heard = Heard()
    call(BEHIND + "edge-1", way(DIAL), heard)
    channels[-1].close()  # the host's: it accepts after the dialler has dialled
    assert isinstance(heard.get(timeout=10), str)
    heard = Heard()
    near = call(BEHIND + "edge-1", way(DIAL), heard)
    channels[-2].close()
    assert isinstance(host.heard.get(timeout=10), str)
    near.close()
    door.close()


def test_refusals(way: Callable[[str], Relay], hub: str, tmp_path: Path) -> None:
    host, heard = Host(), Heard()
    with pytest.raises(PeerLost, match="has not dialled the server's relay yet"):
        call(BEHIND + "edge-1", way(DIAL), heard, ready_s=1)
    with pytest.raises(PeerLost, match="this server has none"):
        call(BEHIND + "edge-1", None, heard, ready_s=1)
    door = RelayedDoor(way(LISTEN), host.admit)
    key = relay.relay_key(tmp_path)
    stranger = Relay(hub, token_for(key, DIAL, node="stranger"))
    with pytest.raises(Refused, match="no route here"):
        call(BEHIND + "edge-1", stranger, heard, node="stranger")
    with pytest.raises(Refused, match="node 'device-1' says that it is 'device-2'"):
        call(BEHIND + "edge-1", way(DIAL), heard, node="device-2")
    for wrong in (Relay(hub, b"x"), way(LISTEN), Relay(hub, way(DIAL).token[:-1]), Relay(hub, token_for(b"", DIAL))):
        with pytest.raises(PeerLost, match="hub does not let this node in there"):
            call(BEHIND + "edge-1", wrong, heard, ready_s=1)
    door.close()


def test_calls_without_tokens_or_numbers(hub: str) -> None:
    with grpc.insecure_channel(hub) as channel:
        for method, metadata in ((DIAL, ()), (ACCEPT, ()), (ACCEPT, number_metadata(b"x" * 16))):
            with pytest.raises(grpc.RpcError) as caught:
                list(stub(channel, RELAY_SERVICE, method)(iter([]), metadata=metadata, timeout=10))
            assert caught.value.code() in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.NOT_FOUND)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub(channel, RELAY_SERVICE, LISTEN)(b"", timeout=10))
        assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED


def test_a_host_that_came_back_takes_the_place_of_its_lost_self(way: Callable[[str], Relay], hub: str) -> None:
    with grpc.insecure_channel(hub) as channel:
        silent = stub(channel, RELAY_SERVICE, LISTEN)(b"", metadata=way(LISTEN).metadata)
        assert not next(silent).number
        host, heard = Host(), Heard()
        door = RelayedDoor(way(LISTEN), host.admit)
        assert list(silent) == [], "the older call ends"
        call(BEHIND + "edge-1", way(DIAL), heard).close()
        door.close()


def test_a_host_outlives_a_hub_that_is_started_again(tmp_path: Path) -> None:
    key = relay.relay_key(tmp_path)
    assert relay.relay_key(tmp_path) == key
    host, heard = Host(), Heard()
    port = free_port()
    ways = {m: Relay(f"127.0.0.1:{port}", token_for(key, m)) for m in (LISTEN, DIAL)}
    door = RelayedDoor(ways[LISTEN], host.admit, LinkTiming(listen_again_s=0.2))
    for _ in range(2):
        with grpc_server([relay.make_service(tmp_path)], port=port):
            call(BEHIND + "edge-1", ways[DIAL], heard)
    door.close()


def test_a_slow_reader_slows_the_sender_and_the_relay_keeps_nothing(way: Callable[[str], Relay], hub: str) -> None:
    """Raw messages: far more than the buffers of four sockets take is not sent while nobody reads."""
    sent = itertools.count()
    last = 0

    def messages() -> Iterator[bytes]:
        nonlocal last
        while last < 400:
            last = next(sent)
            yield bytes(256 << 10)

    def settled(count: Callable[[], int], still_s: float = 0.5) -> int:
        """Waits until the count has not changed for a while, and returns it."""
        end, seen, since = time.monotonic() + WAIT_S, count(), time.monotonic()
        while time.monotonic() - since < still_s:
            assert time.monotonic() < end, seen
            time.sleep(0.05)
            if count() != seen:
                seen, since = count(), time.monotonic()
        return seen

    with grpc.insecure_channel(hub) as here, grpc.insecure_channel(hub) as there:
        numbers = stub(here, RELAY_SERVICE, LISTEN)(b"", metadata=way(LISTEN).metadata)
        assert not next(numbers).number
        dialled = stub(there, RELAY_SERVICE, DIAL)(messages(), metadata=way(DIAL).metadata)
        accepted = stub(here, RELAY_SERVICE, ACCEPT)(
            iter(lambda: time.sleep(60), 0), metadata=number_metadata(next(numbers).number)
        )
        next(accepted)
        assert settled(lambda: last) < 200, "at most 50 of 100 MB are under way"
        for _ in range(399):
            next(accepted)
        dialled.cancel()
        accepted.cancel()
        numbers.cancel()
