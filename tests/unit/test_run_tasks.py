"""What becomes of a run whose ServerApp has ended, with Flower's own state and stand-ins for the processes."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
from flwr.cli.build import build_fab_from_disk
from flwr.cli.install import install_from_fab
from flwr.common.config import get_project_config, get_project_dir
from flwr.common.constant import NOOP_FLWR_AID, SubStatus
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID
from flwr.supercore.fab import Fab
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.superlink.federation import NoOpFederationManager
from sqlalchemy.exc import OperationalError

from edgelam_fl.bounds import Bounds
from edgelam_fl.federation.run_tasks import MOST_RESTARTS, RunTask, RunTasks, unpack_app
from edgelam_fl.federation.superlink_daemon import end_stopped_runs
from edgelam_fl.files import Hold
from edgelam_fl.telemetry.events import (
    Event,
    EventLog,
    RoundDone,
    RunDone,
    RunFailure,
    RunInterrupted,
    RunStarted,
    read_events,
)

pytestmark = pytest.mark.filterwarnings("ignore:No path_separator:DeprecationWarning")  # of Flower's database


@dataclass
class Process:
    """Stands for a task's process; the test ends it."""

    task: RunTask
    returncode: int | None = None

    def poll(self) -> int | None:
        return self.returncode

    def terminate(self) -> None:
        self.returncode = -15


@dataclass
class Server:
    """One SuperLink's state and tasks, and a run that was submitted to it."""

    folder: Path
    database: str
    started: list[Process] = field(default_factory=list)

    def __post_init__(self) -> None:
        factory = LinkStateFactory(self.database, NoOpFederationManager(), ObjectStoreFactory())
        self.links: Any = factory.state()
        self.tasks = RunTasks(self.links, self._start, Bounds(runs=self.folder), say=lambda text: None)

    def _start(self, task: RunTask) -> subprocess.Popen[bytes]:
        """Takes a task as a ServerApp does, which makes the run's folder."""
        (self.folder / "one").mkdir(exist_ok=True)
        assert self.links.activate_task(task.number)
        self.started.append(Process(task))
        return cast("subprocess.Popen[bytes]", self.started[-1])

    def queue(self, out: str, command: str = "run") -> int:
        """A run that no ServerApp has taken yet."""
        fab = self.links.store_fab(Fab("", b"app", {}))
        given = {"out": out, "command": command}
        run: int = self.links.create_run(
            "app", "1", fab, given, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, "flwr-serverapp"
        )
        return run

    def submit(self, command: str = "run") -> int:
        run = self.queue("one", command)
        assert self.tasks.look()
        return run

    def kill(self, status: int = -9) -> None:
        self.started[-1].returncode = status
        self.tasks.look()

    def status(self, run: int) -> tuple[str, str]:
        found = self.links.get_run_status({run})[run]
        return found.status, found.sub_status

    def emit(self, event: Event) -> None:
        EventLog(self.folder / "one" / "events.jsonl")(event)

    def events(self) -> list[Event]:
        return list(read_events(self.folder / "one" / "events.jsonl"))


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path, str(tmp_path / "superlink.db"))


def test_a_serverapp_that_was_killed_is_started_again_for_the_same_run(server: Server) -> None:
    run = server.submit()
    server.emit(RunStarted(run="one", config={}, versions={}))
    server.kill()
    assert server.tasks.look()
    first, second = (process.task for process in server.started)
    assert (second.number, second.run, second.again, first.again) == (first.number, run, True, False)
    assert second.token != first.token
    (interrupted,) = [event for event in server.events() if isinstance(event, RunInterrupted)]
    assert (interrupted.reason, interrupted.restart) == ("its process ended with status -9", 1)
    assert server.status(run) == ("running", "")


def test_a_database_that_is_locked_for_a_while_costs_no_run(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    run, pauses = server.submit(), list[float]()
    server.emit(RunStarted(run="one", config={}, versions={}))
    server.started[-1].returncode = -9
    read, locked = server.links.get_run_info, [OperationalError("UPDATE task", None, Exception("database is locked"))]

    def get_run_info(**asked: Any) -> Any:
        if locked:
            raise locked.pop()
        return read(**asked)

    monkeypatch.setattr(server.links, "get_run_info", get_run_info)
    monkeypatch.setattr("edgelam_fl.federation.run_tasks.open_tasks", lambda links: [])

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(server.started) == 2 or len(pauses) == 3:
            raise Over

    with pytest.raises(Over):
        server.tasks.serve(pause)
    assert not locked
    assert len(server.started) == 2, "the killed ServerApp was started again"
    assert server.status(run) == ("running", "")


class Over(BaseException):
    """The end of a loop that has none."""


def test_a_run_that_makes_no_progress_is_given_up(server: Server) -> None:
    run = server.submit()
    for _ in range(MOST_RESTARTS):
        server.kill()
        assert server.tasks.look()
    server.emit(
        RoundDone(
            round=1,
            attempt=1,
            steps=1,
            seconds=1.0,
            devices=(),
            hosts=(),
            bytes_by_kind={},
            checkpoint="adapter",
            aggregation_error=None,
            aggregation={},
        )
    )
    for _ in range(MOST_RESTARTS):
        server.kill()
        assert server.tasks.look()
    server.kill()
    assert not server.tasks.look()
    failure = server.events()[-1]
    assert isinstance(failure, RunFailure)
    assert "ended with status -9, for the 4th time without a finished round" in failure.reason
    assert server.status(run) == ("finished", "failed")


def test_a_run_that_said_its_last_word_is_left_alone(server: Server) -> None:
    run = server.submit()
    server.emit(RunDone(summary="summary.json"))
    server.kill(0)
    assert not server.tasks.look()
    assert [type(event) for event in server.events()] == [RunDone]
    assert server.status(run)[0] == "finished"


def test_a_run_that_its_operator_stopped_says_so(server: Server) -> None:
    run = server.submit()
    server.links.stop_run(run)
    server.kill(0)
    assert not server.tasks.look()
    (failure,) = server.events()
    assert isinstance(failure, RunFailure)
    assert (failure.reason, failure.exit_code) == ("its operator stopped it", 130)


def test_the_process_of_a_stopped_run_ends_at_once(server: Server) -> None:
    """By `edgelam stop` and by `flwr stop`: both come to Flower's state."""
    end_stopped_runs(server.links, server.tasks.end)
    run = server.submit()
    other = server.queue("two")
    assert server.links.stop_run(run)
    assert not server.links.stop_run(run), "once"
    assert server.tasks.look(), "the other one is taken meanwhile"
    assert [process.returncode for process in server.started] == [-15, None]
    (failure,) = server.events()
    assert isinstance(failure, RunFailure)
    assert failure.exit_code == 130
    assert server.status(other)[0] == "running"


def test_an_error_before_the_first_event_is_the_runs_last_event(server: Server) -> None:
    server.submit()
    server.links.finish_task(server.started[0].task.number, SubStatus.FAILED, "ServerApp failed: no torch")
    server.kill(1)
    assert not server.tasks.look()
    (failure,) = server.events()
    assert isinstance(failure, RunFailure)
    assert "no torch" in failure.reason


def test_the_folder_of_another_run_is_not_written_to(server: Server) -> None:
    server.submit()
    hold = Hold(server.folder / "one")
    server.links.finish_task(server.started[0].task.number, SubStatus.FAILED, "out exists")
    server.kill(1)
    hold.release()
    assert not (server.folder / "one" / "events.jsonl").exists()


@pytest.mark.parametrize("command", ["plan", "chat"])
def test_what_does_not_train_is_not_started_again(server: Server, command: str) -> None:
    server.submit(command)
    server.kill()
    assert not server.tasks.look()
    assert isinstance(server.events()[-1], RunFailure)


def test_a_superlink_goes_on_with_the_runs_of_an_earlier_one(server: Server, tmp_path: Path) -> None:
    run = server.submit()
    server.emit(RunStarted(run="one", config={}, versions={}))
    later = Server(tmp_path, server.database)
    later.tasks.take_over()
    assert later.tasks.look()
    assert (later.started[0].task.run, later.started[0].task.again) == (run, True)
    last = later.events()[-1]
    assert isinstance(last, RunInterrupted)
    assert last.reason == "the SuperLink ended"


def test_a_superlink_may_end_before_it_starts_a_killed_serverapp_again(server: Server, tmp_path: Path) -> None:
    run = server.submit()
    server.emit(RunStarted(run="one", config={}, versions={}))
    server.kill()
    later = Server(tmp_path, server.database)
    later.tasks.take_over()
    assert later.tasks.look()
    (started,) = later.started
    assert (started.task.run, started.task.again) == (run, True), "it must find the run's folder and go on"
    later.kill()
    reasons = [event.reason for event in later.events() if isinstance(event, RunInterrupted)]
    assert reasons == 2 * ["its process ended with status -9"]


def test_without_a_database_a_killed_serverapp_ends_its_run_at_once(tmp_path: Path) -> None:
    server = Server(tmp_path, FLWR_IN_MEMORY_DB_NAME)
    run = server.submit()
    server.kill()
    assert not server.tasks.look()
    assert isinstance(server.events()[-1], RunFailure)
    assert server.status(run) == ("finished", "failed")


# ---------------------------------------------------------------- a run's App


def an_app(folder: Path) -> bytes:
    """Builds an App as `flwr` does."""
    folder.mkdir()
    (folder / "app.py").write_text("server = client = None\n", encoding="utf-8")
    (folder / "pyproject.toml").write_text(
        """[project]
name = "one"
version = "1.0.0"
description = "an App"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "somebody"
[tool.flwr.app.components]
serverapp = "app:server"
clientapp = "app:client"
""",
        encoding="utf-8",
    )
    return build_fab_from_disk(folder)


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # of Flower's builder
@pytest.mark.parametrize("before", ["nothing", "half of it", "all of it"])
def test_a_runs_app_is_whole_before_its_process_starts(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    fab = an_app(tmp_path / "somebody")
    kept = server.links.store_fab(Fab("", fab, {}))
    run = server.links.create_run(
        "somebody/one", "1.0.0", kept, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, "flwr-serverapp"
    )
    place = get_project_dir("somebody/one", "1.0.0", kept)
    if before == "half of it":
        place.mkdir(parents=True)
        (place / "app.py").write_text("server", encoding="utf-8")
    elif before == "all of it":
        install_from_fab(fab, skip_prompt=True)
        (place / "app.py").touch()
    known = place.stat().st_ino if before == "all of it" else 0
    unpack_app(server.links, run)
    assert get_project_config(place)["project"]["name"] == "one"
    assert (place / "app.py").read_text(encoding="utf-8") == "server = client = None\n"
    assert [each.name for each in place.parent.iterdir()] == [place.name], "nothing else is left"
    assert known in (0, place.stat().st_ino), "what is whole is left alone"


def test_an_app_that_is_none_is_left_to_its_run_to_say(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    said = list[str]()
    unpack_app(server.links, server.queue("one"), said.append)
    assert len(said) == 1
    assert "cannot be unpacked" in said[0]
