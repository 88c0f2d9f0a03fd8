"""Channels and ports with certificates, over real sockets: who is let in, who is refused, and what each is told."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from edgelam_fl.addresses import free_port
from edgelam_fl.errors import EnvironmentProblem, PeerLost, Refused
from edgelam_fl.hub import echo
from edgelam_fl.hub.daemon import HubServer
from edgelam_fl.hub.link_speed import measure_link
from edgelam_fl.trust.authority import Authority, issue
from edgelam_fl.trust.identity import DEVICE, HOST, SERVER, Identity, Peer, tls_name
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.counters import ByteCounters
from edgelam_fl.wire.grpc.dial import dial
from edgelam_fl.wire.grpc.secure import PLAIN, Security, peer, why_unreachable
from edgelam_fl.wire.grpc.serve import DataPlaneServer
from edgelam_fl.wire.grpc.services import service_handler, stub
from edgelam_fl.wire.link import Link
from tests.links import Heard, hello, make_terms, ready, terms

Sign = Callable[[str, str], Identity]


@pytest.fixture(scope="module")
def sign(tmp_path_factory: pytest.TempPathFactory) -> Sign:
    authority = Authority.open(tmp_path_factory.mktemp("trust"))
    return lambda name, role: issue(authority, name, role)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Sign:
    authority = Authority.open(tmp_path_factory.mktemp("elsewhere"))
    return lambda name, role: issue(authority, name, role)


@contextmanager
def echo_port(security: Security, seen: list[Peer | None] | None = None) -> Iterator[str]:
    """Serves an Echo whose Ping notes who asked."""
    server = grpc.server(ThreadPoolExecutor(4))

    def ping(_: bytes, context: grpc.ServicerContext) -> bytes:
        if seen is not None:
            seen.append(peer(context))
        return b""

    server.add_generic_rpc_handlers((service_handler("Echo", {"Ping": ping, "Take": ping, "Give": ping}),))
    port = security.open_port(server, "127.0.0.1", 0)
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


def ask(address: str, security: Security, node: str = SERVER) -> str:
    """Returns why a Ping was not answered; empty if it was."""
    with security.channel(address, node, []) as channel:
        try:
            stub(channel, "Echo", "Ping")(b"", timeout=10)
        except grpc.RpcError:
            return why_unreachable(channel)
    return ""


def test_both_ends_know_each_other(sign: Sign) -> None:
    seen: list[Peer | None] = []
    with echo_port(Security(sign(SERVER, SERVER)), seen) as address:
        assert ask(address, Security(sign("ann ü", DEVICE))) == ""
    (who,) = seen
    assert who is not None
    assert (who.name, who.role) == ("ann ü", DEVICE)


def test_on_a_plain_port_nobody_is_known() -> None:
    seen: list[Peer | None] = []
    with echo_port(PLAIN, seen) as address:
        assert ask(address, PLAIN) == ""
    assert seen == [None]


def test_who_is_not_a_member_reaches_no_service(sign: Sign, foreign: Sign, capfd: pytest.CaptureFixture[str]) -> None:
    seen: list[Peer | None] = []
    member, stranger = sign("ann", DEVICE), foreign("ann", DEVICE)
    with echo_port(Security(sign(SERVER, SERVER)), seen) as address:
        assert "it closed the connection" in ask(address, PLAIN)
        assert "not of this federation" in ask(address, Security(stranger))
        trusting = replace(stranger, authority=member.authority)
        assert "whether it refused this node's certificate" in ask(address, Security(trusting))
        with grpc.secure_channel(
            address,
            grpc.ssl_channel_credentials(member.authority),
            [("grpc.ssl_target_name_override", tls_name(SERVER))],
        ) as without:
            with pytest.raises(grpc.RpcError):
                stub(without, "Echo", "Ping")(b"", timeout=10)
    assert seen == []
    log = capfd.readouterr().err
    for reason in ("WRONG_VERSION_NUMBER", "CERTIFICATE_VERIFY_FAILED", "PEER_DID_NOT_RETURN_A_CERTIFICATE"):
        assert reason in log, "the port's log says why it refused"


def test_a_dialler_takes_nobody_else_for_the_node_that_it_wants(sign: Sign) -> None:
    with echo_port(Security(sign("edge-2", HOST))) as address:
        assert ask(address, Security(sign("ann", DEVICE)), "edge-1") == "its certificate is another node's"
        assert ask(address, Security(sign("ann", DEVICE)), "edge-2") == ""
    with echo_port(PLAIN) as address:
        assert ask(address, Security(sign("ann", DEVICE)), "edge-1") == _PLAIN_PORT


_PLAIN_PORT = "it speaks plain text, and this node only TLS"


def test_no_version_of_tls_before_1_2(sign: Sign) -> None:
    with echo_port(Security(sign(SERVER, SERVER))) as address:
        assert (_server_hello(address, b"\x03\x02"), _server_hello(address, b"\x03\x03")) == (b"", b"hello")


def _server_hello(address: str, version: bytes) -> bytes:
    """Returns how a port answers a ClientHello of a version of TLS (03 02: 1.1, 03 03: 1.2); empty: it hangs up."""
    suites = b"\xc0\x2b\xc0\x09"  # ECDHE-ECDSA with AES-128-GCM, and with AES-128-CBC for older versions
    extensions = b"\x00\x0a\x00\x04\x00\x02\x00\x17\x00\x0b\x00\x02\x01\x00\x00\x0d\x00\x04\x00\x02\x04\x03"  # P-256
    body = version + bytes(32) + b"\x00" + len(suites).to_bytes(2, "big") + suites + b"\x01\x00"
    body += len(extensions).to_bytes(2, "big") + extensions
    message = b"\x01" + len(body).to_bytes(3, "big") + body
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), 10) as connection:
        connection.sendall(b"\x16\x03\x01" + len(message).to_bytes(2, "big") + message)
        kind = connection.recv(1)
    return b"hello" if kind == b"\x16" else kind


def test_plain_text_stays_on_this_machine() -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    for attempt in (
        lambda: PLAIN.channel("192.0.2.1:9000", "edge-1", []),
        lambda: PLAIN.open_port(server, "0.0.0.0", 0),
        lambda: dial("edge-1", "192.0.2.1:9", "entry", hello(), ByteCounters(), make_terms(), ready_s=1),
    ):
        with pytest.raises(EnvironmentProblem, match=r"beyond this machine.*edgelam invite.*--insecure"):
            attempt()
    Security(insecure=True).channel("192.0.2.1:9000", "edge-1", []).close()
    assert Security(insecure=True).open_port(server, "0.0.0.0", 0) > 0


# ---------------------------------------------------------------- links


class Host:
    """A host's port that lets every HELLO in that comes so far, and keeps what it was asked."""

    def __init__(self, security: Security) -> None:
        self.asked: list[str] = []
        self.heard = Heard()
        self.server = DataPlaneServer("127.0.0.1", 0, self.admit, security=security)
        self.address = f"127.0.0.1:{self.server.port}"

    def admit(self, hello: pb.Hello, link: Link) -> pb.Ready:
        self.asked.append(hello.node)
        link.open(terms(answer=ready(), heard=self.heard))
        return ready()


@pytest.fixture
def host(sign: Sign) -> Iterator[Host]:
    host = Host(Security(sign("edge-1", HOST)))
    yield host
    host.server.stop()


def call(host: Host, identity: Identity | None, node: str = "device-1", ready_s: float = 20) -> Link:
    return dial(
        "edge-1", host.address, "entry edge-1", hello(node=node), ByteCounters(), make_terms(), ready_s,
        security=Security(identity),
    )  # fmt: skip


def test_a_link_between_members(host: Host, sign: Sign) -> None:
    link = call(host, sign("device-1", DEVICE))
    link.send(pb.Header(kind=pb.STEP_CLOSE, step=3))
    frame = host.heard.get(timeout=20)
    assert not isinstance(frame, str)
    assert frame.header.step == 3
    link.close()


def test_a_member_cannot_say_that_it_is_another(host: Host, sign: Sign, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), pytest.raises(Refused, match="node 'mallory' says that it is 'device-1'"):
        call(host, sign("mallory", DEVICE))
    assert host.asked == [], "the host's plan was not asked"
    assert "refused a link of mallory" in caplog.text


def test_links_of_strangers_are_not_opened(host: Host, foreign: Sign) -> None:
    with pytest.raises(PeerLost, match="not of this federation"):
        call(host, foreign("device-1", DEVICE), ready_s=1)
    with pytest.raises(PeerLost, match="it closed the connection"):
        call(host, None, ready_s=1)
    assert host.asked == []


def test_a_dialler_shakes_hands_with_the_planned_host_alone(host: Host, sign: Sign) -> None:
    with pytest.raises(PeerLost, match="its certificate is another node's"):
        dial(
            "edge-2", host.address, "entry edge-2", hello(), ByteCounters(), make_terms(), 1,
            security=Security(sign("device-1", DEVICE)),
        )  # fmt: skip
    assert host.asked == []


def test_the_link_to_a_hub_with_keys_is_measured(sign: Sign, foreign: Sign, tmp_path: Path) -> None:
    server = HubServer("127.0.0.1", 0, tmp_path, [echo.make_service], security=Security(sign(SERVER, SERVER)))
    try:
        assert measure_link("127.0.0.1", server.port, security=Security(sign("ann", DEVICE))).up_bps > 0
        with pytest.raises(EnvironmentProblem):
            measure_link("127.0.0.1", server.port, 1, Security(foreign("ann", DEVICE)))
    finally:
        server.stop()


def test_nobody_there_is_told_from_somebody_else(sign: Sign) -> None:
    assert ask(f"127.0.0.1:{free_port()}", Security(sign("ann", DEVICE))) == "nobody listens there"
