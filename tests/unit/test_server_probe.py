"""What is at an address where a server should be is said in words, and a node that finds no server tries on."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from edgelam_fl.addresses import free_port
from edgelam_fl.errors import ConfigError, EnvironmentProblem
from edgelam_fl.federation.join import ServerInSight, await_server
from edgelam_fl.federation.operator import Operator, prepare_operator
from edgelam_fl.federation.server_probe import ServerProblem, check_server_answers, problem_at
from edgelam_fl.trust.identity import CERTIFICATE_FILE, KEY_FILE, load_identity
from edgelam_fl.trust.server import prepare_trust
from tests.by_hand import HandClock
from tests.support import hang_up_on_all


class Healthy(BaseHTTPRequestHandler):
    """Answers as a server's /health does."""

    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class Elsewhere(Healthy):
    """Another program's."""

    status = 404


@contextmanager
def serving(kind: type[Healthy], context: ssl.SSLContext | None = None) -> Iterator[int]:
    """Serves HTTP, over TLS with a context; the port above is that of a program that hangs up on all who do not speak gRPC."""
    with ExitStack() as stack:
        while True:
            server = HTTPServer(("127.0.0.1", 0), kind)
            try:
                above = socket.create_server(("127.0.0.1", server.server_port + 1))
                break
            except OSError:  # somebody has the port
                server.server_close()
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        stack.callback(server.server_close)
        stack.callback(server.shutdown)
        stack.callback(above.close)
        stack.callback(above.shutdown, socket.SHUT_RDWR)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        threading.Thread(target=hang_up_on_all, args=(above,), daemon=True).start()
        yield server.server_port


def words(port: int, *, tls: bool = False, timeout_s: float = 30.0) -> str:
    problem = problem_at(f"127.0.0.1:{port}", tls=tls, timeout_s=timeout_s)
    return problem.words if problem is not None else ""


def test_the_hubs_port_is_told_from_the_servers() -> None:
    with serving(Healthy) as port:
        assert words(port) == ""
        assert words(port + 1) == (
            f"127.0.0.1:{port + 1} is the hub of a server, which nodes find by themselves; the server itself is at 127.0.0.1:{port}: "
            f"--server 127.0.0.1:{port}"
        )


def test_another_program_and_nobody_are_told_apart() -> None:
    with serving(Elsewhere) as port:
        for other in (port, port + 1):
            assert words(other).startswith(f"what answers at 127.0.0.1:{other} is no EdgeLAM-FL server")
    assert words(free_port()).startswith("no server answers at 127.0.0.1:")
    with socket.create_server(("127.0.0.1", 0)) as still:
        assert "accepts connections and says nothing" in words(still.getsockname()[1], timeout_s=0.01)


def test_tls_and_plain_text_are_told_apart(tmp_path: Path) -> None:
    trust = prepare_trust(tmp_path, "127.0.0.1", 1)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(trust.identity / CERTIFICATE_FILE, trust.identity / KEY_FILE)
    with serving(Healthy, context) as port:
        assert words(port, tls=True) == ""
        assert "speaks TLS and lets members alone in: `edgelam invite NAME`" in words(port)
        assert f"the server itself is at 127.0.0.1:{port}" in words(port + 1)
        with pytest.raises(
            EnvironmentProblem, match=r"needs --operator \(none, the operator's folder here, does not exist\)$"
        ):
            check_server_answers(Operator(f"127.0.0.1:{port}", Path("none")), insecure=False)
    with serving(Healthy) as port:
        assert "speaks plain text (--insecure), and this command TLS" in words(port, tls=True)


def test_a_command_of_the_operators_ends_with_the_reason() -> None:
    with serving(Healthy) as port:
        check_server_answers(Operator(f"127.0.0.1:{port}", Path("none")), insecure=False)
        with pytest.raises(EnvironmentProblem, match=f"the server itself is at 127.0.0.1:{port}"):
            check_server_answers(Operator(f"127.0.0.1:{port + 1}", Path("none")), insecure=False, way_out=". Start one")
    with pytest.raises(EnvironmentProblem, match=r"no server answers at 127.0.0.1:\d+\. Start one$"):
        check_server_answers(Operator(f"127.0.0.1:{free_port()}", Path("none")), insecure=False, way_out=". Start one")
    with pytest.raises(ConfigError, match="beyond this machine"):
        check_server_answers(Operator("192.0.2.1:8000", Path("none")), insecure=False)


# ---------------------------------------------------------------- a node


def test_an_operators_folder_of_another_federation_is_named(tmp_path: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trusts = [prepare_trust(tmp_path / name, "127.0.0.1", 1) for name in ("old", "new")]
    context.load_cert_chain(trusts[1].identity / CERTIFICATE_FILE, trusts[1].identity / KEY_FILE)
    with serving(Healthy, context) as port:
        for trust in trusts:
            prepare_operator(trust.identity.with_name("operator"), "127.0.0.1:1", load_identity(trust.identity))
        old, new = (Operator(f"127.0.0.1:{port}", trust.identity.with_name("operator")) for trust in trusts)
        check_server_answers(new, insecure=False)
        with pytest.raises(
            EnvironmentProblem, match=r"another federation than the operator's folder .*old.*--operator"
        ):
            check_server_answers(old, insecure=False)


def test_a_node_that_finds_no_server_says_so_and_tries_on() -> None:
    clock, said = HandClock(), list[str]()

    def probe(server: str, *, tls: bool) -> ServerProblem | None:
        if clock.now_s < 40:
            return ServerProblem(f"no server answers at {server}", is_nobody=True)
        return ServerProblem("it is the hub", is_nobody=False) if clock.now_s < 60 else None

    await_server("edge:8000", tls=True, patient=True, say=said.append, probe=probe, sleep=clock.sleep, now=clock.now)
    assert said[0] == "no server answers at edge:8000; trying on, Ctrl-C ends it"
    assert said[1].startswith("no server answers at edge:8000; trying on for 1")
    kinds = [text.partition(";")[0] for text in said]
    assert list(dict.fromkeys(kinds)) == [
        "no server answers at edge:8000",
        "it is the hub",
        "a server answers at edge:8000",
    ]
    assert len(said) >= 6, "a sign every ten seconds"
    assert said[-1] == "a server answers at edge:8000"
    with pytest.raises(EnvironmentProblem, match="no server answers at edge:8000; start one"):
        await_server("edge:8000", tls=True, patient=False, say=said.append, probe=lambda *_, **__: probe_nobody)


probe_nobody = ServerProblem("no server answers at edge:8000", is_nobody=True)


def test_a_wait_of_days_is_a_short_log() -> None:
    clock, said = HandClock(), list[str]()
    await_server(
        "edge:8000", tls=True, patient=True, say=said.append, sleep=clock.sleep, now=clock.now,
        probe=lambda *_, **__: probe_nobody if clock.now_s < 2 * 86400 else None,
    )  # fmt: skip
    assert 100 < len(said) < 600


def test_a_node_says_when_its_server_goes_and_comes() -> None:
    clock, said, here = HandClock(), list[str](), [True, False, False, True, True]
    in_sight = ServerInSight("edge:8000", said.append, answers=lambda host, port: here.pop(0), now=clock.now)
    while here:
        in_sight.look()
        clock.sleep(1.0)
    assert said == [
        "no server answers at edge:8000; the node tries on and joins again when it is back",
        "the server at edge:8000 answers again, after 20.0 s",
    ]
