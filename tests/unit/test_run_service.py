"""What a server answers its operator about runs: which there are, what each said, and that one is stopped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME

from edgelam_fl.bounds import Bounds
from edgelam_fl.federation.run_service import LIST_RUNS, MOST_LISTED, READ_RUN, STOP_RUN, RunService
from edgelam_fl.files import Hold
from edgelam_fl.telemetry.events import EventLog, RoundProgress, RunStarted
from edgelam_fl.telemetry.progress import progress_of, write_progress
from tests.unit.test_run_tasks import Server

pytestmark = pytest.mark.filterwarnings("ignore:No path_separator:DeprecationWarning")  # of Flower's database


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path / "runs", FLWR_IN_MEMORY_DB_NAME)  # a database on the disk takes a second to make


def ask(server: Server, request: str, **asked: Any) -> tuple[int, dict[str, Any]]:
    return RunService(server.links, Bounds(runs=server.folder)).handlers[request](asked)


def states(server: Server) -> Mapping[str, str]:
    return {run["run"]: run["state"] for run in ask(server, LIST_RUNS)[1]["runs"]}


def test_runs_are_listed_with_and_without_a_folder(server: Server) -> None:
    assert ask(server, LIST_RUNS) == (200, {"runs": [], "left_out": 0})
    server.folder.mkdir()
    for name in ("older", "one"):
        EventLog(server.folder / name / "events.jsonl")(RunStarted(run=name, config={}, versions={}))
    server.submit()
    waiting = server.queue("two")
    with Hold(server.folder / "one"), Hold(server.folder / "older"):
        assert states(server) == {"older": "running", "one": "running", "two": "starting"}
    assert states(server)["older"] == "killed"
    assert ask(server, STOP_RUN, run="two") == (200, {"name": "two"})
    assert server.status(waiting) == ("finished", "stopped")
    assert states(server)["two"] == "never begun"


def test_the_newest_are_listed_and_the_others_counted(server: Server) -> None:
    for number in range(MOST_LISTED + 2):
        EventLog(server.folder / f"run-{number}" / "events.jsonl")
    status, answer = ask(server, LIST_RUNS)
    assert (status, len(answer["runs"]), answer["left_out"]) == (200, MOST_LISTED, 2)


def test_a_run_is_stopped_once_and_others_are_named(server: Server) -> None:
    server.folder.mkdir()
    run = server.submit()
    assert ask(server, STOP_RUN, run="one") == (200, {"name": "one"})
    assert server.status(run) == ("finished", "stopped")
    server.kill(0)
    assert states(server) == {"one": "stopped"}
    assert ask(server, STOP_RUN, run="one") == (409, {"detail": "there is nothing to stop: run one is stopped"})
    assert ask(server, STOP_RUN, run="onne") == (400, {"detail": "this server has no run onne; did you mean 'one'?"})
    for wrong in ("../elsewhere", "/etc", "", 7, None):
        assert ask(server, STOP_RUN, run=wrong)[0] == 400
        assert ask(server, READ_RUN, run=wrong)[0] == 400


def test_what_a_run_said_is_handed_out_from_where_the_reader_is(server: Server) -> None:
    log = EventLog(server.folder / "one" / "events.jsonl")
    log(RunStarted(run="one", config={}, versions={}))
    status, piece = ask(server, READ_RUN, run="one")
    assert (status, piece["name"], piece["alive"]) == (200, "one", None)
    assert piece["lines"].count("\n") == 1
    place = {"part": piece["part"], "offset": piece["offset"]}
    assert ask(server, READ_RUN, run="one", **place)[1]["lines"] == ""
    log(RunStarted(run="again", config={}, versions={}))
    assert '"again"' in ask(server, READ_RUN, run="one", **place)[1]["lines"]
    assert ask(server, READ_RUN, run="one", part="x")[0] == 400
    assert piece["progress"] is None
    write_progress(server.folder / "one", RoundProgress(round=1, attempt=1, seconds=3.0, doing="training", steps=6))
    now = progress_of(ask(server, READ_RUN, run="one", **place)[1]["progress"])
    assert now is not None
    assert now.words() == "step 0 of 6"


def test_the_server_of_one_run_answers_for_that_run_alone(server: Server) -> None:
    """As that of `edgelam run --local`."""
    EventLog(server.folder / "mine" / "events.jsonl")(RunStarted(run="mine", config={}, versions={}))
    service = RunService(server.links, Bounds(runs=server.folder, run=server.folder / "mine"))
    (run,) = service.handlers[LIST_RUNS]({})[1]["runs"]
    assert run["run"] == "mine"
    assert "mine" in service.handlers[READ_RUN]({"run": "/etc"})[1]["lines"]
