"""A node at boot, when its server comes back, and when its command is killed: nobody has to start or end anything by hand."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from edgelam_fl.addresses import free_port
from edgelam_fl.federation.child import Child, end_all, log_tail
from edgelam_fl.federation.superlink import start_superlink
from edgelam_fl.trust.authority import issue
from edgelam_fl.trust.identity import HOST, save_identity
from edgelam_fl.trust.server import prepare_trust
from tests.support import WAIT_S

pytestmark = pytest.mark.processes


def test_a_client_waits_for_its_server_and_joins_it_again_after_a_restart(tmp_path: Path) -> None:
    port, log, supernode = free_port(), tmp_path / "client.log", tmp_path / "node" / "supernode.log"
    trust = prepare_trust(tmp_path / "server", "127.0.0.1", port)
    keys = issue(trust.authority, "board", HOST)
    save_identity(keys, tmp_path / "node" / "identity")
    trust.members.add(keys)
    state = tmp_path / "node"
    command = [str(Path(sys.executable).with_name("edgelam")), "client", "--server", f"127.0.0.1:{port}"]
    client = Child("client", [*command, "--state", str(tmp_path / "node")], log)
    children = [client]

    def until(happened: Callable[[], bool], seconds: float = 180) -> None:
        end = time.monotonic() + seconds
        while not happened():
            assert not client.ended(), client.ended()
            assert time.monotonic() < end, f"{log_tail(log)}; {log_tail(supernode, 10)}"
            time.sleep(0.2)

    def said(text: str, file: Path) -> int:
        return file.read_text(encoding="utf-8").count(text) if file.exists() else 0

    try:
        until(lambda: said(f"no server answers at 127.0.0.1:{port}; trying on", log) == 1)
        assert not supernode.exists()
        children.append(start_superlink("127.0.0.1", port, tmp_path / "server", trust=trust))
        until(lambda: said("SuperNode ID: ", supernode) == 1)
        end_all([children.pop()])
        children.append(
            start_superlink("127.0.0.1", port, tmp_path / "server", trust=trust)
        )  # it has forgotten its nodes
        until(lambda: said("SuperNode ID: ", supernode) == 2)
        until(lambda: said("it was started again", log) == 1)
        second = subprocess.run(
            [*command, "--state", str(state)], capture_output=True, text=True, timeout=WAIT_S, check=False
        )
        assert (second.returncode, "uses the state folder" in second.stderr) == (3, True), second.stderr
        until((state / "endpoint.json").exists)
        own = psutil.Process(client.pid).children(recursive=True)
        assert len(own) == 2, own
        os.kill(client.pid, signal.SIGKILL)
        gone, left = psutil.wait_procs(own, WAIT_S)
        assert not left
        assert len(gone) == 2
        assert not [file.name for file in state.iterdir() if file.name in ("endpoint.json", "control.sock")]
    finally:
        end_all(children)
