"""The command that takes the place of Flower's, and the process that forks for it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgelam_fl.federation.child import Child, end_all
from edgelam_fl.federation.clientapps import COMMAND, folder, prepare
from edgelam_fl.federation.flower_app import app_folder


def call(state: Path, *arguments: str) -> None:
    """As SuperExec does, which finds the command on PATH."""
    path = f"{folder(state)}{os.pathsep}{os.environ['PATH']}"
    subprocess.run([COMMAND, *arguments], env={**os.environ, "PATH": path}, check=True, timeout=120)


def test_arguments_arrive_as_they_were(tmp_path: Path) -> None:
    state = tmp_path / "a state's folder"
    fifo = prepare(state)
    assert prepare(state) == fifo
    reader = os.open(fifo, os.O_RDWR)
    call(state, "--token", "a b", "*", "")
    call(state, "--insecure")
    assert os.read(reader, 4096) == b"--token\x1fa b\x1f*\x1f\n--insecure\n"
    os.close(reader)


@pytest.mark.processes
def test_each_call_is_flowers_own_command(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-m", "edgelam_fl.federation.clientapps", str(prepare(tmp_path)), str(app_folder())]
    child = Child("ClientApps", command, log)
    try:
        call(tmp_path, "--version")  # it waits until there is a reader, as at boot
        call(tmp_path, "--help")
        end = time.monotonic() + 120
        while "usage: flwr-clientapp" not in log.read_text() and time.monotonic() < end and not child.ended():
            time.sleep(0.1)
        assert "usage: flwr-clientapp" in log.read_text()
        assert not child.ended(), "what it forks ends, not it"
    finally:
        end_all([child])
