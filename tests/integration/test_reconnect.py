"""Links whose streams break: nothing is lost, nothing comes twice, and only the same node gets its link back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from edgelam_fl.hub import relay
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.counters import ByteCounters
from edgelam_fl.wire.grpc.dial import dial
from edgelam_fl.wire.grpc.link import GrpcLink
from edgelam_fl.wire.grpc.options import LinkTiming
from edgelam_fl.wire.grpc.serve import DataPlaneServer, RelayedDoor
from edgelam_fl.wire.link import CLOSED, Frame, Link
from edgelam_fl.wire.relay import BEHIND, DIAL, LISTEN, Relay, make_token
from tests.integration.proxy import CuttingProxy
from tests.links import Heard, hello, make_terms, ready, terms
from tests.support import WAIT_S, grpc_server

TIMING = LinkTiming(ping_every_s=0.2, redial_s=0.01, listen_again_s=0.1)
PART = "r/1/1/edge-1"

WINDOW = 1000  # tensors queued at a time are not what these tests are about


@dataclass
class End:
    """One end of a link, what it heard, and how often it went on."""

    heard: Heard = field(default_factory=Heard)
    link: Link | None = None
    resumed: list[tuple[float, int]] = field(default_factory=list)
    suspended: list[str] = field(default_factory=list)
    silent_s: float = 0.0
    reconnect_s: float = WAIT_S

    def terms(self) -> dict[str, Any]:
        return {
            "heard": self.heard, "silent_s": self.silent_s, "reconnect_s": self.reconnect_s,
            "on_suspended": lambda link, reason: self.suspended.append(reason),
            "on_resumed": lambda link, seconds, resent: self.resumed.append((seconds, resent)),
        }  # fmt: skip

    def frames(self, count: int) -> list[Frame]:
        found = [self.heard.get(timeout=WAIT_S) for _ in range(count)]
        assert all(isinstance(frame, Frame) for frame in found), found
        return found  # type: ignore[return-value]


class Host(End):
    """The dialled end: lets one link in, as a group of devices does."""

    def admit(self, hello: pb.Hello, link: Link) -> pb.Ready | pb.Refuse:
        if self.link is not None or hello.resumes:
            again = self.link.continue_on(link) if self.link is not None else None
            return again or pb.Refuse(reason="opened before")
        link.open(terms(answer=ready(window=WINDOW), **self.terms()))
        self.link = link
        return ready(window=WINDOW)


@contextmanager
def host_behind(
    host: Host, budgets: list[int] | None = None, folder: Path | None = None
) -> Iterator[tuple[CuttingProxy, str, Relay | None]]:
    """Yields a proxy before a host, the address to dial, and the relay. `folder`: of the hub; None: the host is dialled directly."""
    if folder is None:
        server = DataPlaneServer("127.0.0.1", 0, host.admit, TIMING)
        proxy = CuttingProxy(f"127.0.0.1:{server.port}", budgets or [])
        try:
            yield proxy, proxy.address, None
        finally:
            proxy.close()
            server.stop()
        return
    with grpc_server([relay.make_service(folder)]) as port:
        key, hub = relay.relay_key(folder), f"127.0.0.1:{port}"
        proxy = CuttingProxy(hub, budgets or [])
        door = RelayedDoor(Relay(hub, make_token(key, LISTEN, PART, "edge-1")), host.admit, TIMING)
        try:
            yield proxy, BEHIND + "edge-1", Relay(proxy.address, make_token(key, DIAL, PART, "device-1", 2))
        finally:
            door.close()
            proxy.close()


def call(end: End, address: str, way: Relay | None = None) -> Link:
    counters = ByteCounters()
    end.link = dial(
        "edge-1",
        address,
        "entry",
        hello(window=WINDOW),
        counters,
        make_terms(**end.terms()),
        WAIT_S,
        way,
        timing=TIMING,
    )
    return end.link


def send_all(link: Link, seed: int, count: int, first: int = 0) -> list[torch.Tensor | None]:
    """Sends hidden states of random sizes, some of many chunks, and control frames between them; returns what was sent."""
    chance = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    sent: list[torch.Tensor | None] = []
    for number in range(count):
        kind = chance.choice([pb.ACT, pb.GRAD, pb.STEP_CLOSE])
        tensor = None if kind == pb.STEP_CLOSE else torch.randn(1, chance.randint(1, 300), 700, generator=generator)
        link.send(pb.Header(kind=kind, step=first + number), tensor)
        sent.append(tensor)
    return sent


def check_all(frames: list[Frame], sent: list[torch.Tensor | None]) -> None:
    assert sorted(frame.header.step for frame in frames) == list(range(len(sent))), "each once"
    for kind in (pb.ACT, pb.GRAD, pb.STEP_CLOSE):
        steps = [frame.header.step for frame in frames if frame.header.kind == kind]
        assert steps == sorted(steps), "in order"
    for frame in frames:
        expected = sent[frame.header.step]
        assert (frame.tensor is None) == (expected is None)
        assert expected is None or torch.equal(frame.tensor, expected)


@pytest.mark.parametrize("by_relay", [False, True])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_streams_cut_anywhere_cost_nothing(seed: int, by_relay: bool, tmp_path: Path) -> None:
    """Six connections in a row break after a random number of bytes, within handshakes, headers and tensors, both ways."""
    chance = random.Random(seed)
    budgets = [chance.randint(2_000, 2_000_000) for _ in range(6)]
    host, device = Host(), End()
    with host_behind(host, budgets, tmp_path if by_relay else None) as (proxy, address, way):
        link = call(device, address, way)
        assert host.link is not None
        ups, downs = send_all(link, seed, 30), send_all(host.link, seed + 100, 30)
        check_all(host.frames(30), ups)
        check_all(device.frames(30), downs)
        assert proxy.cuts >= 3, "the bytes must have met the budgets"
        assert device.resumed
        link.send(pb.Header(kind=pb.DONE))
        link.close()
        assert host.frames(1)[0].header.kind == pb.DONE
        assert host.heard.get(timeout=WAIT_S) == CLOSED
        assert device.heard.empty()


def test_a_node_whose_address_changes_takes_the_place_of_its_lost_self() -> None:
    """The host, which waits for ever, still takes the old stream for alive when the new one comes.

    The device gives its stream up by hand: how long it may be silent is tested in test_links, and a slow machine can be so at any time.
    """
    host, device = Host(), End()
    with host_behind(host) as (proxy, address, _):
        link = call(device, address)
        assert host.link is not None
        sent = send_all(link, 1, 5)
        frames = host.frames(5)
        proxy.move("127.0.0.2")
        assert isinstance(link, GrpcLink)
        assert link.stream is not None
        lost = link.stream
        sent += send_all(link, 2, 5, first=5)
        link.stream_ended(lost, "the address changed", clean=False)
        lost.hang_up()
        check_all(frames + host.frames(5), sent)
        host.link.send(pb.Header(kind=pb.STEP_CLOSE, step=1))
        assert device.frames(1)[0].header.step == 1
        assert host.resumed[0][0] == 0.0, "it had not been suspended before"
        assert device.suspended[0] == "the address changed"
        link.close()
        assert host.heard.get(timeout=WAIT_S) == CLOSED


def test_what_was_said_before_the_end_arrives_although_the_stream_breaks() -> None:
    host, device = Host(), End()
    with host_behind(host) as (proxy, address, _):
        link = call(device, address)
        for _ in range(3):  # the first cut may come before or after what was sent
            proxy.cut()
            link.send(pb.Header(kind=pb.TABLE))
        proxy.cut()
        link.send(pb.Header(kind=pb.DONE))
        link.close()
        assert [frame.header.kind for frame in host.frames(4)] == [pb.TABLE] * 3 + [pb.DONE]
        assert host.heard.get(timeout=WAIT_S) == CLOSED
        assert device.heard.empty()


def test_a_link_that_gets_no_stream_again_is_lost_at_both_ends() -> None:
    host, device = Host(reconnect_s=0.5), End(reconnect_s=0.5)
    with host_behind(host) as (proxy, address, _):
        call(device, address)
        proxy.close()
        for end in (host, device):
            assert "; then " in str(end.heard.get(timeout=WAIT_S))


def test_a_host_that_no_longer_knows_the_link_ends_it_at_once() -> None:
    host, device = Host(), End()
    with host_behind(host) as (proxy, address, _):
        call(device, address)
        host.link = None  # as if it had been started again
        proxy.cut()
        assert "entry refuses: opened before" in str(device.heard.get(timeout=WAIT_S))
