"""`edgelam chat` over the hosts of a live federation, through Flower and gRPC, against the same adapter on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.federation import Federation, Run

pytestmark = pytest.mark.processes

EDGELAM = str(Path(sys.executable).with_name("edgelam"))
PROMPT = "What does bin do?"


def chat(run: Run, *more: str) -> subprocess.CompletedProcess[str]:
    command = [EDGELAM, "chat", str(run.path), "--prompt", PROMPT, "--max-tokens", "16", *more]
    environment = {**os.environ, "PYTHONUTF8": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)


def test_the_answer_over_the_route_is_the_answer_at_home(averaged: Run, federation: Federation) -> None:
    assert federation.data_plane is not None
    before = len(federation.data_plane.connections)
    over_route = chat(averaged, "--server", federation.server)
    assert over_route.returncode == 0, f"{over_route.stderr}\n{federation.logs()}"
    assert len(federation.data_plane.connections) >= before + 2, "entry and exit to the edge server"
    at_home = chat(averaged)
    assert at_home.returncode == 0, at_home.stderr
    assert over_route.stdout == at_home.stdout
    assert len(at_home.stdout.strip()) > 3
    sent = b"".join(bytes(connection.up) for connection in federation.data_plane.connections[before:])
    assert PROMPT.encode() not in sent


def test_a_server_that_does_not_answer_is_said(averaged: Run) -> None:
    done = chat(averaged, "--server", "127.0.0.1:9")
    assert done.returncode == 3
    assert "no server answers at 127.0.0.1:9" in done.stderr


def test_the_model_as_it_came_is_only_here(averaged: Run) -> None:
    done = chat(averaged, "--server", "127.0.0.1:9", "--base")
    assert done.returncode == 2
    assert "--base and --server do not go together" in done.stderr
