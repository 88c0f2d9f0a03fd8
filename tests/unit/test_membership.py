"""Memberships that end while calls and links are open: on the hub, and at the nodes that follow it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from edgelam_fl.errors import PeerLost, Refused
from edgelam_fl.hub.echo import LIMITS, write_length
from edgelam_fl.hub.membership import EndedMembers, read_ended
from edgelam_fl.trust.identity import HOST, SERVER, Identity
from edgelam_fl.trust.members import Members
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.counters import ByteCounters
from edgelam_fl.wire.grpc.dial import dial
from edgelam_fl.wire.grpc.following import Following
from edgelam_fl.wire.grpc.options import LinkTiming
from edgelam_fl.wire.grpc.secure import Security
from edgelam_fl.wire.grpc.serve import DataPlaneServer, RelayedDoor
from edgelam_fl.wire.grpc.services import stub
from edgelam_fl.wire.link import Link
from edgelam_fl.wire.membership import ENDED, MEMBERSHIP_SERVICE
from edgelam_fl.wire.relay import BEHIND, DIAL, LISTEN, Relay
from tests.links import Heard, hello, make_terms, ready, terms
from tests.members import SmallFederation
from tests.support import WAIT_S

TIMING = LinkTiming(ping_every_s=0.05, listen_again_s=0.05, redial_s=0.05)


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[SmallFederation]:
    federation = SmallFederation(tmp_path)
    yield federation
    federation.hub.stop()


def until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)


def asks(federation: SmallFederation, identity: Identity) -> str:
    """Returns why the hub's Ping was not answered; empty if it was."""
    with Security(identity).channel(federation.address, SERVER, []) as channel:
        try:
            stub(channel, "Echo", "Ping")(b"", timeout=20)
        except grpc.RpcError as error:
            return str(error.details())
    return ""


# ---------------------------------------------------------------- at the hub


def test_the_hub_refuses_a_member_from_the_moment_that_it_is_revoked(
    federation: SmallFederation, caplog: pytest.LogCaptureFixture
) -> None:
    ann, bob = federation.join("ann"), federation.join("bob")
    assert asks(federation, ann) == ""
    with Security(ann).channel(federation.address, SERVER, []) as channel:
        giving = stub(channel, "Echo", "Give")(write_length(LIMITS.most_bytes), timeout=25)
        next(giving)  # the call is open, and stays so as long as nobody reads the rest
        with caplog.at_level(logging.WARNING):
            federation.members.revoke("ann")
            until(lambda: asks(federation, ann) == "node ann: its membership in the federation has ended")
            with pytest.raises(grpc.RpcError) as ended:
                list(giving)
    assert ended.value.code() == grpc.StatusCode.CANCELLED
    assert "ended Give of ann" in caplog.text
    assert "refused ann" in caplog.text
    assert asks(federation, bob) == ""
    again = federation.join("ann")
    assert asks(federation, again) == "", "a name that was invited again has a new certificate"
    assert asks(federation, ann) != ""


def test_nodes_are_told_at_once_and_after_every_change(federation: SmallFederation) -> None:
    ann, bob, old = federation.join("ann"), federation.join("bob"), federation.join("old")
    federation.members.revoke("old")
    until(lambda: asks(federation, old) != "")
    with Security(ann).channel(federation.address, SERVER, []) as channel:
        told = stub(channel, MEMBERSHIP_SERVICE, ENDED)(b"", timeout=WAIT_S)
        assert next(told).names == ["old"]
        federation.members.revoke("bob")
        said = next(told)
        assert (said.names, set(said.serials)) == (["bob", "old"], federation.members.revoked_serials())
        assert asks(federation, bob) != ""


def test_a_member_cannot_take_all_places_of_calls_that_wait(federation: SmallFederation) -> None:
    ann, bob = federation.join("ann"), federation.join("bob")
    with (
        Security(ann).channel(federation.address, SERVER, []) as first,
        Security(bob).channel(federation.address, SERVER, []) as second,
    ):
        calls = [stub(first, MEMBERSHIP_SERVICE, ENDED)(b"", timeout=WAIT_S) for _ in range(4)]
        for call in calls:
            next(call)
        with pytest.raises(grpc.RpcError) as caught:
            next(stub(first, MEMBERSHIP_SERVICE, ENDED)(b"", timeout=WAIT_S))
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert next(stub(second, MEMBERSHIP_SERVICE, ENDED)(b"", timeout=WAIT_S)) == pb.EndedMembers()
        calls[0].cancel()

        def again() -> bool:
            try:
                return next(stub(first, MEMBERSHIP_SERVICE, ENDED)(b"", timeout=WAIT_S)) == pb.EndedMembers()
            except grpc.RpcError:
                return False

        until(again)


# ---------------------------------------------------------------- between nodes


class Host:
    """A host that lets in whoever its port lets in."""

    def __init__(self, security: Security) -> None:
        self.heard, self.security = Heard(), security
        self.server = DataPlaneServer("127.0.0.1", 0, self.admit, TIMING, security)
        self.address = f"127.0.0.1:{self.server.port}"

    def admit(self, hello: pb.Hello, link: Link) -> pb.Ready:
        link.open(terms(answer=ready(), heard=self.heard))
        return ready()


def call(address: str, security: Security, node: str, heard: Heard | None = None, way: Relay | None = None) -> Link:
    return dial(
        "edge-1",
        address,
        "entry edge-1",
        hello(node=node),
        ByteCounters(),
        make_terms(heard),
        20,
        way,
        timing=TIMING,
        security=security,
    )


@pytest.fixture
def host(federation: SmallFederation) -> Iterator[Host]:
    host = Host(Security(federation.join("edge-1", HOST)))
    following = Following(federation.address, host.security, TIMING)
    yield host
    following.close()
    host.server.stop()


def test_open_links_of_a_revoked_device_end_and_no_others(federation: SmallFederation, host: Host) -> None:
    ann, bob = Security(federation.join("ann")), Security(federation.join("bob"))
    of_ann, of_bob = Heard(), Heard()
    call(host.address, ann, "ann", of_ann)
    honest = call(host.address, bob, "bob", of_bob)
    federation.members.revoke("ann")
    assert host.heard.get(timeout=WAIT_S) == "the other end's membership in the federation has ended"
    assert isinstance(of_ann.get(timeout=WAIT_S), str)
    with pytest.raises(Refused, match="the membership of this node has ended"):
        call(host.address, ann, "ann")
    honest.send(pb.Header(kind=pb.STEP_CLOSE, step=5))
    frame = host.heard.get(timeout=WAIT_S)
    assert not isinstance(frame, str)
    assert frame.header.step == 5
    assert of_bob.empty()


def test_a_device_leaves_a_host_that_was_revoked(federation: SmallFederation, host: Host) -> None:
    device = Security(federation.join("ann"))
    following, heard = Following(federation.address, device, TIMING), Heard()
    call(host.address, device, "ann", heard)
    federation.members.revoke("edge-1")
    assert heard.get(timeout=WAIT_S) == "the other end's membership in the federation has ended"
    with pytest.raises(Refused, match="the membership of edge-1 in the federation has ended"):
        call(host.address, device, "ann")
    following.close()


def test_links_by_relay_of_a_revoked_device_end(federation: SmallFederation, host: Host) -> None:
    door = RelayedDoor(federation.way(LISTEN, "edge-1"), host.admit, TIMING, host.security)
    ann, heard = Security(federation.join("ann")), Heard()
    call(BEHIND + "edge-1", ann, "ann", heard, federation.way(DIAL, "ann"))
    federation.members.revoke("ann")
    assert isinstance(heard.get(timeout=WAIT_S), str)
    assert isinstance(host.heard.get(timeout=WAIT_S), str)
    door.close()


def test_a_hub_that_is_gone_ends_no_honest_link_and_says_what_it_knows_when_it_is_back(
    federation: SmallFederation, host: Host
) -> None:
    ann, heard = Security(federation.join("ann")), Heard()
    link = call(host.address, ann, "ann", heard)
    federation.members.revoke(federation.join("old").name)
    until(lambda: host.security.ended.node("old"))
    federation.hub.stop()
    link.send(pb.Header(kind=pb.STEP_CLOSE, step=1))
    assert not isinstance(host.heard.get(timeout=WAIT_S), str)
    assert host.security.ended.node("old"), "what was heard last holds"
    federation.members.revoke("ann")
    federation.start()
    assert host.heard.get(timeout=WAIT_S) == "the other end's membership in the federation has ended"


# ---------------------------------------------------------------- places on the relay


def test_a_relay_token_is_of_no_use_to_another_member(
    federation: SmallFederation, host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    door = RelayedDoor(federation.way(LISTEN, "edge-1"), host.admit, TIMING, host.security)
    thief = Security(federation.join("mallory"))
    with pytest.raises(PeerLost, match="does not let this node in there"), caplog.at_level(logging.WARNING):
        dial(
            "edge-1", BEHIND + "edge-1", "entry edge-1", hello(node="ann"), ByteCounters(), make_terms(), 1,
            federation.way(DIAL, "ann"), timing=TIMING, security=thief,
        )  # fmt: skip
    assert "mallory shows the token of ann" in caplog.text
    with thief.channel(federation.address, SERVER, []) as channel, pytest.raises(grpc.RpcError) as caught:
        next(stub(channel, "Relay", LISTEN)(b"", metadata=federation.way(LISTEN, "edge-1").metadata, timeout=WAIT_S))
    assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
    with pytest.raises(Refused, match="node 'mallory' says that it is 'ann'"):
        call(BEHIND + "edge-1", thief, "ann", way=federation.way(DIAL, "mallory"))
    door.close()


def test_a_token_is_good_for_the_links_that_its_holder_needs(federation: SmallFederation, host: Host) -> None:
    door = RelayedDoor(federation.way(LISTEN, "edge-1"), host.admit, TIMING, host.security)
    greedy, honest = Security(federation.join("greedy")), Security(federation.join("ann"))
    links = [call(BEHIND + "edge-1", greedy, "greedy", way=federation.way(DIAL, "greedy")) for _ in range(3)]
    with pytest.raises(PeerLost, match="no room for the link"):
        dial(
            "edge-1", BEHIND + "edge-1", "entry edge-1", hello(node="greedy"), ByteCounters(), make_terms(), 1,
            federation.way(DIAL, "greedy"), timing=TIMING, security=greedy,
        )  # fmt: skip
    call(BEHIND + "edge-1", honest, "ann", way=federation.way(DIAL, "ann")).close()
    for link in links:
        link.close()
    call(BEHIND + "edge-1", greedy, "greedy", way=federation.way(DIAL, "greedy")).close()
    door.close()


def test_without_a_book_nobody_has_ended(tmp_path: Path) -> None:
    assert read_ended(Members(tmp_path)) == EndedMembers()
