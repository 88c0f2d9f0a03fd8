"""Attacks on Flower's port of a started server: strangers, and what the operator alone may do. The attacks speak Flower's API."""

from __future__ import annotations

import json
import os
import socket
import ssl
import stat
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fleet_pb2 import ActivateNodeRequest, RegisterNodeFleetRequest
from flwr.proto.runtime_pb2 import AcquireTaskRequest, GetNodesRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors.http import RuntimeTokenHttpInterceptor
from flwr.supercore.primitives.asymmetric import bytes_to_private_key, generate_key_pairs, public_key_to_bytes
from flwr.supercore.runtime.runtime_http_client import RuntimeHttpClient
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from edgelam_fl.addresses import free_port
from edgelam_fl.config import parse_run_file
from edgelam_fl.errors import ConfigError, RunFailed
from edgelam_fl.federation.child import Child, end_all, log_tail
from edgelam_fl.federation.environment import child_environment
from edgelam_fl.federation.guard import ROUTES, Audience
from edgelam_fl.federation.operator import Operator, operator_folder, read_token
from edgelam_fl.federation.run_service import LIST_RUNS, READ_RUN, STOP_RUN
from edgelam_fl.federation.server_runs import ServerRuns, ServerSource
from edgelam_fl.federation.submission import Submission
from edgelam_fl.federation.superlink import start_superlink
from edgelam_fl.telemetry.events import RunStarted
from edgelam_fl.telemetry.run_folder import await_end
from edgelam_fl.trust.identity import DEVICE, new_key, public_key
from edgelam_fl.trust.join_service import JOIN, ROUTE, SYNC
from edgelam_fl.trust.server import prepare_trust
from edgelam_fl.trust.signed import sign_request
from tests.flower_api import Token, new_client
from tests.support import WAIT_S

pytestmark = pytest.mark.processes

STRANGERS_APP = {
    "pyproject.toml": """
[project]
name = "stranger"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "nobody"
fab-include = ["stranger/*.py"]
[tool.flwr.app.components]
serverapp = "stranger.app:app"
clientapp = "stranger.app:app"
[tool.flwr.app.config]
""",
    "stranger/__init__.py": "",
    "stranger/app.py": "from pathlib import Path\nPath({mark!r}).touch()\nfrom flwr.serverapp import ServerApp\napp = ServerApp()\n",
}


class Server:
    """A SuperLink for members alone, which keeps its nodes and runs in a file, and ways to speak to it."""

    def __init__(self, state: Path) -> None:
        self.port, self.state = free_port(), state
        self.address = f"127.0.0.1:{self.port}"
        self.operator = Operator(self.address, operator_folder(state))
        self.trust = prepare_trust(state, "127.0.0.1", self.port)
        self.child = self._start()
        self._clients = ExitStack()

    def end(self) -> None:
        self._clients.close()
        end_all([self.child])

    def _start(self) -> Child:
        return start_superlink("127.0.0.1", self.port, self.state, trust=self.trust, keep=True)

    @property
    def authority(self) -> bytes:
        return self.trust.authority.certificate

    def restart(self) -> None:
        end_all([self.child])
        self.child = self._start()

    def client(self, kind: Any, *interceptors: Any) -> Any:
        """One of Flower's clients, which is closed with the server."""
        made = new_client(kind, self.address, self.authority, *interceptors)
        self._clients.callback(made.close)
        return made

    def ask(self, handler: str, request: Any) -> None:
        """Asks what answers nodes that join."""
        verified = ssl.create_default_context(cadata=self.authority.decode())
        answer = httpx.post(f"https://{self.address}{ROUTE}{handler}", json=dict(request), verify=verified)
        assert answer.status_code == 200, answer.text

    def flwr(self, *arguments: str, home: Path | None = None) -> dict[str, Any]:
        """Flower's own command, by default as the operator."""
        environment = {**child_environment(), "FLWR_HOME": str(home or self.operator.folder)}
        done = subprocess.run(
            ["flwr", *arguments, "--format", "json"],
            env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=WAIT_S, check=False,
        )  # fmt: skip
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("server"))
    try:
        yield made
    finally:
        made.end()


def refused(call: Any, request: Any) -> str:
    with pytest.raises(httpx.HTTPStatusError) as caught:
        call(request)
    assert caught.value.response.status_code in (401, 403, 404)
    return str(caught.value.response.json()["detail"])


def test_s3_a_stranger_registers_unregisters_and_submits_nothing(server: Server) -> None:
    public = public_key_to_bytes(generate_key_pairs()[1])
    for stranger in (server.client(ControlHttpClient), server.client(ControlHttpClient, Token("guessed"))):
        assert "only the operator" in refused(stranger.ListNodes, ListNodesRequest())
        assert "only the operator" in refused(stranger.ListRuns, ListRunsRequest())
        assert "only the operator" in refused(stranger.StartRun, StartRunRequest())
        refused(stranger.RegisterNode, RegisterNodeRequest(public_key=public))
        refused(stranger.UnregisterNode, UnregisterNodeRequest(node_id=1))
    operator = server.client(ControlHttpClient, Token(read_token(server.operator.folder)))
    assert not operator.ListNodes(ListNodesRequest()).nodes_info, "this test is the first one"
    assert "refused 127.0.0.1, '/v1/control/start-run': only the operator" in server.child.log.read_text()


def test_s3_every_route_is_closed_to_strangers_but_those_of_nodes(server: Server) -> None:
    """Live, over HTTP: nothing of the Control and Runtime API answers without a credential, and no page describes them."""
    verified = ssl.create_default_context(cadata=server.authority.decode())
    with httpx.Client(base_url=f"https://{server.address}", verify=verified) as stranger:
        for path, caller in ROUTES.items():
            status = stranger.post(path).status_code
            assert status in {Audience.ANYBODY: {405}, Audience.OPERATOR: {403}}.get(
                caller, {400, 401, 403, 415, 422}
            ), path
        for name in (LIST_RUNS, READ_RUN, STOP_RUN):
            assert stranger.post(f"/v1/edgelam/{name}", json={"run": "run"}).status_code == 403
        for path in ("/docs", "/openapi.json", "/v1/edgelam/unknown"):
            assert stranger.get(path).status_code == 404
        assert stranger.get("/health").status_code == 200
        assert stranger.get("/v1/edgelam/about").json().keys() == {"edgelam-fl", "flwr"}


def test_s1_the_operators_own_token_runs_no_foreign_app(server: Server, tmp_path: Path) -> None:
    mark = tmp_path / "MARK"
    for name, content in STRANGERS_APP.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content.replace("{mark!r}", repr(str(mark))))
    said = server.flwr("run", str(tmp_path))
    assert not said["success"]
    assert "this server runs its own Flower App alone (digest " in said["error-message"]
    assert "--allow-foreign-apps" in said["error-message"]
    said = server.flwr("run", "@nobody/stranger")
    assert "this server runs no App from elsewhere (got '@nobody/stranger')" in said["error-message"]
    assert not server.flwr("list")["runs"]
    assert not mark.exists()


def test_s2_s18_a_runs_task_cannot_be_taken_and_its_token_not_seen(server: Server, tmp_path: Path) -> None:
    """The thief asks from before the run is submitted until it has begun, on the server's own machine."""
    thief = server.client(RuntimeHttpClient)
    ask = AcquireTaskRequest(supported_task_types=["flwr-serverapp"])
    submission = Submission(server.operator, is_here=False)  # so that it is followed as from another machine
    config = parse_run_file("", source="test", overrides=["split.hosts=0", "federation.join_deadline_s=600"])
    submission.submit(config, tmp_path / "run")
    try:
        for event in submission.events(WAIT_S, meanwhile=lambda: refused(thief.AcquireTask, ask)):
            if isinstance(event, RunStarted):
                break
        with_a_guess = server.client(RuntimeHttpClient, RuntimeTokenHttpInterceptor(token="0" * 32))
        with pytest.raises(httpx.HTTPStatusError):
            with_a_guess.GetNodes(GetNodesRequest())
        (task,) = psutil.Process(server.child.pid).children()
        assert "--token" not in task.cmdline()
        assert "edgelam_fl.federation.task_process" in task.cmdline()
        see_and_stop(server.operator, submission, tmp_path / "run", config.federation.rounds)
    finally:
        submission.stop()


def see_and_stop(operator: Operator, submission: Submission, folder: Path, rounds: int) -> None:
    """Looks after a run as from another machine: nothing of the run's folder is used."""
    asked, name = ServerRuns(operator), str(folder)
    (line,) = asked.lines()[0]
    assert (line.state, line.round, line.rounds) == ("running", 0, rounds)
    assert asked.read(name, 1, 0)["alive"] is True
    source = ServerSource(asked, line.run)
    assert [type(event) for event in source.poll()] == [RunStarted]
    assert not source.poll(), "nothing is said twice"
    assert asked.stop(name) == line.run
    assert await_end(ServerSource(asked, name), WAIT_S) == "stopped"
    assert submission.status() == "finished:stopped"
    with pytest.raises(RunFailed, match=r"there is nothing to stop: run .*run is stopped"):
        asked.stop(name)
    with pytest.raises(ConfigError, match="this server has no run nobody; "):
        asked.stop("nobody")


def test_who_only_connects_keeps_no_place(server: Server) -> None:
    """Connections that say nothing, or half a request, are closed; what comes in between is answered."""
    verified = ssl.create_default_context(cadata=server.authority.decode())
    with ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port))) for _ in range(40)]
        silent = [stack.enter_context(verified.wrap_socket(each, server_hostname="127.0.0.1")) for each in silent]
        for half in silent[:20]:
            half.sendall(b"POST /v1/fleet/push-object HTTP/1.1\r\nHost: a\r\n")
        assert httpx.get(f"https://{server.address}/health", verify=verified).status_code == 200
        for each in silent:
            each.settimeout(WAIT_S)
            assert each.recv(1) == b""


def test_s20_what_the_server_keeps_is_its_owners(server: Server) -> None:
    for file in (server.operator.folder, server.operator.folder / "token", server.operator.folder / "credentials.yaml"):
        assert stat.S_IMODE(os.stat(file).st_mode) & 0o077 == 0, file


def fleet_client(server: Server, key: bytes, shown: bytes = b"") -> tuple[Any, bytes]:
    """A SuperNode's client with a private key (PEM), and the public one as Flower sends it. shown: whose public one it shows."""
    private = bytes_to_private_key(key)
    interceptor = NodeAuthHttpInterceptor(private, bytes_to_private_key(shown or key).public_key())
    return server.client(FleetHttpClient, interceptor), public_key_to_bytes(private.public_key())


def activate(server: Server, key: bytes) -> int:
    """Goes online as a SuperNode; returns the node's number."""
    client, public = fleet_client(server, key)
    answer = client.ActivateNode(ActivateNodeRequest(public_key=public, heartbeat_interval=30.0))
    return int(answer.node_id)


def join_with(server: Server, name: str, key: bytes) -> None:
    """Joins by an invite, as `edgelam client --join` does, but with a key that is given."""
    token = server.trust.members.invite(name, DEVICE, 3600.0)
    fields = {"purpose": JOIN, "name": name, "token": token, "public_key": public_key(key).decode()}
    server.ask(JOIN, sign_request(fields, key))


def test_s3_members_alone_go_online_and_a_revoked_one_no_more(server: Server) -> None:
    stranger, member = new_key(), new_key()
    client, public = fleet_client(server, stranger)
    assert "is no member" in refused(client.RegisterNode, RegisterNodeFleetRequest(public_key=public))
    assert "is no member" in refused(client.ActivateNode, ActivateNodeRequest(public_key=public))
    thief, _ = fleet_client(server, stranger, shown=member)  # with a member's public key, which is no secret
    assert "is no member" in refused(thief.RegisterNode, RegisterNodeFleetRequest(public_key=public))
    join_with(server, "ann", member)
    assert "is no member" in refused(thief.RegisterNode, RegisterNodeFleetRequest(public_key=public)), "also a member's"
    assert activate(server, member) == server.trust.members.find("ann").flower_id
    server.trust.members.revoke("ann")
    server.ask(SYNC, {})
    with pytest.raises(httpx.HTTPStatusError):
        activate(server, member)


def test_members_and_runs_are_kept_over_a_restart(server: Server) -> None:
    bob = new_key()
    join_with(server, "bob", bob)
    number = activate(server, bob)
    operator = server.client(ControlHttpClient, Token(read_token(server.operator.folder)))

    def known() -> tuple[list[int], list[int]]:
        nodes = [info.node_id for info in operator.ListNodes(ListNodesRequest()).nodes_info]
        return nodes, list(operator.ListRuns(ListRunsRequest()).run_dict)

    before = known()
    assert number in before[0], log_tail(server.child.log)
    assert before[1]
    server.restart()
    assert known() == before
    assert activate(server, bob) == number, "also while Flower still takes it for online"
