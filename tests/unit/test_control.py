"""The local control of a stage host: who can open it, and with which token."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.control import ControlServer, NoStageHost, control
from edgelam_fl.wire.grpc.services import stub
from tests.support import WAIT_S


@contextmanager
def serving(state: Path) -> Iterator[str]:
    """Serves Wait, which answers with the job; yields the address."""
    server = ControlServer(state, lambda node: {"Wait": lambda request: pb.JobReport(job=request.job)})
    yield json.loads((state / "endpoint.json").read_text())["address"]
    server.stop()


def asked(state: Path) -> str:
    with control(state, 10) as client:
        return client.call("Wait", pb.WaitRequest(job="run/1"), 20).job


def test_the_socket_is_the_owners_alone(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with serving(tmp_path) as address:
        assert address == f"unix:{tmp_path}/control.sock"
        for file in ("control.sock", "endpoint.json"):
            assert stat.S_IMODE((tmp_path / file).stat().st_mode) & 0o077 == 0, file
        assert asked(tmp_path) == "run/1"


def test_whoever_reaches_it_needs_the_token(tmp_path: Path) -> None:
    with serving(tmp_path) as address, grpc.insecure_channel(address) as channel:
        for metadata in ((), (("token", ""),), (("token", "0" * 64),)):
            with pytest.raises(grpc.RpcError) as caught:
                stub(channel, "Control", "Wait")(pb.WaitRequest(), timeout=WAIT_S, metadata=metadata)
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("name", ["100%", "%23", "a#b", "a?b", "a b", "é"])
def test_any_folder_holds_the_socket(tmp_path: Path, name: str) -> None:
    """gRPC takes the address for a URI."""
    with serving(tmp_path / name):
        assert (tmp_path / name / "control.sock").exists()
        assert asked(tmp_path / name) == "run/1"


def test_a_state_folder_with_a_long_path_gets_a_port(tmp_path: Path) -> None:
    state = tmp_path / ("x" * 120)
    with serving(state) as address:
        assert address.startswith("127.0.0.1:")
        assert asked(state) == "run/1"


def test_a_socket_that_was_left_behind_is_in_nobodys_way(tmp_path: Path) -> None:
    """As after a stage host that was killed."""
    (tmp_path / "endpoint.json").write_text("{}")
    for _ in range(2):
        with serving(tmp_path):
            assert asked(tmp_path) == "run/1"
            endpoint = (tmp_path / "endpoint.json").read_text()
    assert not (tmp_path / "endpoint.json").exists(), "whoever calls now waits for the next one"
    (tmp_path / "endpoint.json").write_text(endpoint)
    with pytest.raises(NoStageHost, match="did not answer Wait"):
        asked(tmp_path)
