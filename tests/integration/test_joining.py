"""From `edgelam invite` to a node that Flower knows, and to its end by `edgelam revoke`, as real processes on loopback."""

from __future__ import annotations

import base64
import datetime
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import HTTPException
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes, sign_message
from flwr.superlink.routers.fleet import node_auth

from edgelam_fl.addresses import free_port
from edgelam_fl.federation.child import Child, end_all, log_tail
from edgelam_fl.federation.superlink_daemon import tolerate_drifting_clocks
from tests.integration.conftest import Edgelam
from tests.support import WAIT_S

EDGELAM = str(Path(sys.executable).with_name("edgelam"))


@pytest.fixture
def children() -> Iterator[list[Child]]:
    started: list[Child] = []
    yield started
    end_all(started)


def wait_for(done: Callable[[], bool], *children: Child) -> None:
    end = time.monotonic() + WAIT_S
    while not done():
        ended = [child.ended() for child in children if child.ended()]
        assert not ended, ended
        assert time.monotonic() < end, [log_tail(child.log) for child in children]
        time.sleep(0.1)


@pytest.mark.processes
def test_one_pasted_line_joins_a_node_and_revoking_ends_it(
    tmp_path: Path, edgelam: Edgelam, children: list[Child]
) -> None:
    def at_the_server(*arguments: str) -> str:
        done = edgelam(*arguments, "--state", "server")
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start(name: str, *arguments: str) -> Child:
        child = Child(name, ["env", "-C", str(tmp_path), EDGELAM, *arguments], tmp_path / f"{name}.log")
        children.append(child)
        return child

    def says(log: Path, words: str) -> Callable[[], bool]:
        return lambda: log.exists() and words in log.read_text(encoding="utf-8")

    server = start("server", "server", "--listen", f"127.0.0.1:{free_port(count=2)}", "--state", "server")
    wait_for(says(server.log, "not announced on the network: it listens on this machine alone"), server)
    said = server.log.read_text(encoding="utf-8")
    for line in ("edgelam invite NAME", "export FLWR_HOME=", 'flwr run . --run-config "federation.rounds=2"'):
        assert line in said
    text = json.loads(at_the_server("invite", "edge", "--role", "host", "--json"))["text"]
    node = start("edge", "client", "--join", text, "--threads", "1")
    wait_for(says(tmp_path / "server" / "superlink.log", "Activated node_id"), server, node)
    assert "edge has joined the federation" in node.log.read_text(encoding="utf-8")
    state = tmp_path / ".edgelam" / "edge"
    wait_for((state / "events.jsonl").exists, server, node)
    files = [state, *(state / name for name in ("events.jsonl", "stage-host.log", "supernode.log"))]
    assert {file.name: file.stat().st_mode & 0o077 for file in files} == dict.fromkeys((f.name for f in files), 0)
    (known,) = json.loads(at_the_server("nodes", "--json"))
    assert (known["name"], known["role"], known["revoked"]) == ("edge", "host", None)

    assert "edge is revoked" in at_the_server("revoke", "edge")
    wait_for(lambda: bool(node.ended()), server)
    assert "the membership of edge was ended on the server" in log_tail(node.log, 3)
    without_a_word = start("again", "client")
    wait_for(lambda: bool(without_a_word.ended()), server)
    assert "the membership of edge was ended on the server" in log_tail(without_a_word.log, 3)


def request_signed(ahead_s: float, key: Any) -> Any:
    """Returns a request of a SuperNode whose clock is ahead, as far as Flower looks at it."""
    private, public = key
    known = public_key_to_bytes(public)
    at = (datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=ahead_s)).isoformat()
    headers = {
        node_auth.FLEET_HTTP_PUBLIC_KEY_HEADER: base64.b64encode(known).decode(),
        node_auth.FLEET_HTTP_SIGNATURE_HEADER: base64.b64encode(sign_message(private, at.encode())).decode(),
        node_auth.TIMESTAMP_HEADER: at,
    }
    return SimpleNamespace(
        headers=headers, state=SimpleNamespace(protobuf_request=ActivateNodeRequest(public_key=known))
    )


def test_flower_accepts_nodes_whose_clocks_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_auth, "SYSTEM_TIME_TOLERANCE", node_auth.SYSTEM_TIME_TOLERANCE)  # to be put back
    key = generate_key_pairs()
    with pytest.raises(HTTPException):
        node_auth.authenticate_node(request_signed(60.0, key))
    tolerate_drifting_clocks()
    for ahead_s in (-3600.0, 0.0, 60.0, 3600.0):
        node_auth.authenticate_node(request_signed(ahead_s, key))
    with pytest.raises(HTTPException):
        node_auth.authenticate_node(request_signed(7 * 86400.0, key))
