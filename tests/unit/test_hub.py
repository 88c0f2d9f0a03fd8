"""The hub's process: its port, its services, and its restart after it was killed."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import grpc
import pytest

from edgelam_fl.addresses import answers, free_port, hub_address
from edgelam_fl.errors import ConfigError, EnvironmentProblem
from edgelam_fl.federation.child import end_all
from edgelam_fl.federation.hub_process import HubProcess
from edgelam_fl.hub import OFFERS, PORT, STATE, echo
from edgelam_fl.hub.daemon import HubServer
from edgelam_fl.hub.passes import relay_key


def test_the_hub_listens_on_a_free_port_and_its_services_get_its_state_folder(tmp_path: Path) -> None:
    told: list[Path] = []
    services = [lambda state: told.append(state) or echo.make_service(state)]
    server = HubServer("127.0.0.1", 0, tmp_path / "hub", services)
    try:
        channel = grpc.insecure_channel(f"127.0.0.1:{server.port}")
        assert channel.unary_unary("/edgelam.v1.Echo/Ping")(b"", timeout=10) == b""
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/edgelam.v1.Nothing/AtAll")(b"", timeout=10)
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
        assert told == [tmp_path / "hub"]
        assert (tmp_path / "hub").is_dir()
    finally:
        server.stop()


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EnvironmentProblem, match=f"port {port} on 127.0.0.1 .*--data-plane"):
            HubServer("127.0.0.1", port, tmp_path)
        with pytest.raises(EnvironmentProblem, match=f"port {port} on 127.0.0.1 .*--data-plane"):
            HubProcess("127.0.0.1", port, tmp_path / "hub").start()


def test_where_the_hub_is() -> None:
    assert hub_address("10.0.0.1", 8000) == ("10.0.0.1", 8001)
    assert hub_address("10.0.0.1", 8000, "0.0.0.0:9") == ("0.0.0.0", 9)
    with pytest.raises(ConfigError, match="--data-plane"):
        hub_address("10.0.0.1", 65535)


@pytest.mark.processes
def test_a_hub_that_is_killed_is_started_again(tmp_path: Path) -> None:
    hub = HubProcess("127.0.0.1", free_port(), tmp_path / "hub")
    assert hub.environment == {PORT: str(hub.port), STATE: str(tmp_path / "hub")}
    (tmp_path / "hub" / OFFERS).mkdir(parents=True)
    key = relay_key(tmp_path / "hub")
    try:
        hub.start()
        assert not (tmp_path / "hub" / OFFERS).exists(), "runs of an earlier server offer nothing"
        assert relay_key(tmp_path / "hub") == key, "the tokens of nodes that still play are good"
        assert hub.child is not None
        with hub.child.log.open("a", encoding="utf-8") as log:
            log.write("refused a stranger\n" * 250_000)
        assert hub.watch() == ""
        assert 0 < hub.child.log.stat().st_size <= 256 << 10, "strangers do not fill the disk"
        os.kill(hub.child.pid, signal.SIGKILL)
        end, news = time.monotonic() + 30, ""
        while not news and time.monotonic() < end:
            news = hub.watch()
            time.sleep(0.05)
        assert "status -9" in news
        assert "started again" in news
        while not answers(hub.host, hub.port) and time.monotonic() < end:
            time.sleep(0.05)
        assert answers(hub.host, hub.port)
    finally:
        end_all([hub.child] if hub.child else [])
