"""`edgelam runs`, `top`, `log`, `stop` and `report` on the folders of this machine: one truth about every run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from edgelam_fl.addresses import free_port
from edgelam_fl.cli.main import app, exit_code
from edgelam_fl.federation.operator import operator_folder, prepare_operator
from edgelam_fl.files import Hold
from tests.unit.test_run_folder import BEGAN, DONE, FAILED, STOPPED, WAITS, write

Edgelam = Callable[..., tuple[int, str]]


@pytest.fixture
def edgelam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Edgelam:
    """Runs a command in this process, in an empty folder; returns its exit code and all that it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")

    def run(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        status = exit_code(app, "edgelam", arguments)
        said = capsys.readouterr()
        return status, said.out + said.err

    return run


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """One run of each kind that needs no process."""
    folder = tmp_path / "runs"
    write(folder / "ready", BEGAN, DONE)
    write(folder / "broken", BEGAN, FAILED)
    write(folder / "ended", BEGAN, STOPPED)
    for name, lines in (("dead", [BEGAN]), ("empty", [])):
        with Hold(folder / name):
            if lines:
                write(folder / name, *lines)
    return folder


def test_runs_top_and_report_say_the_same_of_every_run(edgelam: Edgelam, runs: Path) -> None:
    expected = {"ready": "done", "broken": "failed", "ended": "stopped", "dead": "killed", "empty": "never begun"}
    status, said = edgelam("runs", "--json")
    assert status == 0
    assert {run["run"]: run["state"] for run in json.loads(said)} == expected
    status, listed = edgelam("runs")
    table = {line.split()[0]: line for line in listed.splitlines() if line.strip()}
    for name, state in expected.items():
        assert state in table[name]
        status, said = edgelam("top", name)
        assert (status, f"{said.splitlines()[0]}, ".partition(", ")[0].partition(": ")[2]) == (0, state), said
        assert f": {state}" in edgelam("report", name)[1], name
    words = " ".join(listed.split())  # a narrow terminal breaks a reason over lines
    assert "its operator stopped it" in words
    assert "no host is left" in words
    assert json.loads(edgelam("top", "dead", "--json")[1])["state"] == "killed"


def test_a_run_that_waits_says_behind_which_in_every_list(edgelam: Edgelam, tmp_path: Path) -> None:
    with Hold(write(tmp_path / "runs" / "next", WAITS)):
        for arguments in (["runs"], ["top"], ["log"]):
            assert "waits for run other, which uses ann" in edgelam(*arguments)[1], arguments


def test_a_run_that_is_none_is_one_message(edgelam: Edgelam, runs: Path) -> None:
    for command in ("top", "log", "stop"):
        status, said = edgelam(command, "redy")
        assert (status, len(said.splitlines())) == (2, 1)
        assert "there is no run redy" in said
        assert "did you mean 'ready'?" in said
    assert edgelam("top", "--server", "127.0.0.1:1")[0] == 2, "which run is not said"


def test_without_runs_there_is_a_way_out(edgelam: Edgelam) -> None:
    assert "no run in " in edgelam("runs")[1]
    status, said = edgelam("top")
    assert (status, "no run under" in said) == (2, True)


@pytest.mark.parametrize("name", ["ready", "broken", "ended", "empty"])
def test_what_does_not_go_on_cannot_be_stopped(edgelam: Edgelam, runs: Path, name: str) -> None:
    status, said = edgelam("stop", name)
    assert status == 4
    assert f"there is nothing to stop: run {name} is " in said


def test_a_run_is_stopped_at_its_own_server_or_at_the_operators(edgelam: Edgelam, tmp_path: Path) -> None:
    """Neither server answers, and the message says which one was asked."""
    own, other = free_port(), free_port()
    prepare_operator(operator_folder(tmp_path / "runs" / "mine" / "server"), f"127.0.0.1:{own}")
    prepare_operator(tmp_path / "operator", f"127.0.0.1:{other}")
    with Hold(write(tmp_path / "runs" / "mine", BEGAN)), Hold(write(tmp_path / "runs" / "far", BEGAN)):
        status, said = edgelam("stop", "mine")
        assert (status, f"the server at 127.0.0.1:{own} does not answer" in said) == (3, True), said
        status, said = edgelam("stop", "far", "--operator", "operator")
        assert (status, f"the server at 127.0.0.1:{other} does not answer" in said) == (3, True), said
        status, said = edgelam("stop", "far")
        assert (status, "is not the operator's folder of a server" in said) == (3, True), said
