"""How a run stands is said by its folder: by its events, and by whether a process holds it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from edgelam_fl.errors import INTERRUPTED, ConfigError, EdgelamError, EnvironmentProblem
from edgelam_fl.federation.local import recorded_end
from edgelam_fl.files import Hold
from edgelam_fl.telemetry.events import RunFailure, read_events
from edgelam_fl.telemetry.report.incidents import failure
from edgelam_fl.telemetry.run_folder import (
    COMMAND_LOCK,
    end_with,
    find_run,
    newest_run,
    run_folders,
    run_line,
    state_now,
    state_of,
)
from edgelam_fl.telemetry.summary import build_summary
from tests.recorded import as_events

BEGAN = {"event": "run_started", "time": 10.0, "run": "mine", "config": {"federation": {"rounds": 3}}, "versions": {}}
WAITS = {"event": "run_waits", "time": 1.0, "run": "other", "nodes": ["ann"], "runs_ahead": 1, "seconds": 0.0}
DONE = {"event": "run_done", "time": 30.0, "summary": "summary.json"}
FAILED = {"event": "run_failed", "time": 20.0, "reason": "no host is left", "kept": "nothing", "exit_code": 4}
STOPPED = {**FAILED, "reason": "its operator stopped it", "exit_code": INTERRUPTED}
RESUMED = {"event": "run_resumed", "time": 25.0, "round": 1}
Line = Mapping[str, Any]


def write(folder: Path, *lines: Line) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "events.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


@pytest.mark.parametrize(
    ("lines", "alive", "state"),
    [
        ([], True, "starting"),
        ([], False, "never begun"),
        ([], None, "never begun"),
        ([WAITS], True, "waiting"),
        ([WAITS], False, "killed"),
        ([WAITS, BEGAN], True, "running"),
        ([BEGAN], None, "running"),
        ([BEGAN], False, "killed"),
        ([BEGAN, DONE], False, "done"),
        ([BEGAN, FAILED], False, "failed"),
        ([BEGAN, STOPPED], False, "stopped"),
        ([STOPPED], True, "stopped"),
        ([BEGAN, FAILED, WAITS], True, "waiting"),
        ([BEGAN, STOPPED, RESUMED], True, "running"),
    ],
)
def test_every_state_has_its_word(lines: list[Line], alive: bool | None, state: str) -> None:
    assert state_of(as_events(lines), alive) == state


@pytest.mark.parametrize("lock", [".lock", COMMAND_LOCK])
def test_a_run_lives_as_long_as_a_process_holds_its_folder(tmp_path: Path, lock: str) -> None:
    """Be it the ServerApp or the command whose processes are the whole federation."""
    folder = write(tmp_path / "mine", BEGAN)
    with Hold(folder, lock=lock):
        assert state_now(folder, as_events([BEGAN])) == "running"
        assert state_now(folder, []) == "starting"
    assert state_now(folder, as_events([BEGAN])) == "killed"
    assert state_now(folder, []) == "never begun"


def test_a_stopped_run_is_stopped_in_summary_and_report() -> None:
    events = as_events([BEGAN, STOPPED])
    summary = build_summary(events)
    assert (summary.state, summary.seconds) == ("stopped", 10.0)
    assert dict(failure(events))["What"] == "its operator stopped it"


def test_the_last_word_is_said_once(tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", BEGAN)
    assert end_with(folder, "its command was ended")
    assert not end_with(folder, "and something else")
    (last,) = (event for event in read_events(folder / "events.jsonl") if isinstance(event, RunFailure))
    assert (last.reason, last.exit_code) == ("its command was ended", INTERRUPTED)
    assert last.kept == "no round was finished"
    assert end_with(tmp_path, "nothing was begun"), "a folder without events gets its first"
    assert state_now(tmp_path, list(read_events(tmp_path / "events.jsonl"))) == "stopped"


# ---------------------------------------------------------------- lists


def test_a_line_says_how_far_a_run_is_and_why_it_is_no_farther(tmp_path: Path) -> None:
    done = {"event": "round_done", "time": 15.0, "round": 1, "devices": [{"name": "ann", "loss": 1.0}]}
    line = run_line(write(tmp_path / "mine", BEGAN, done, FAILED))
    assert (line.run, line.state, line.round, line.rounds) == ("mine", "failed", 1, 3)
    assert (line.began, line.seconds, line.note) == (10.0, 10.0, "no host is left")
    with Hold(write(tmp_path / "next", WAITS)):
        line = run_line(tmp_path / "next")
    assert (line.state, line.began, line.seconds) == ("waiting", None, None)
    assert line.note == "waits for run other, which uses ann"
    os.utime(write(tmp_path / "dead", BEGAN) / "events.jsonl", (17.0, 17.0))
    with Hold(tmp_path / "dead"):
        pass
    line = run_line(tmp_path / "dead", "runs/dead")
    assert (line.run, line.state, line.seconds, line.note) == ("runs/dead", "killed", 7.0, "")


def test_a_damaged_file_of_events_is_one_line_of_the_list(tmp_path: Path) -> None:
    (write(tmp_path / "mine") / "events.jsonl").write_text("no event\n")
    line = run_line(tmp_path / "mine")
    assert line.state == "unreadable"
    assert "line 1 is not an event" in line.note


def test_runs_are_found_by_path_and_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run under"):
        newest_run(tmp_path)
    for age, name in enumerate(("new", "old")):
        os.utime(write(tmp_path / name) / "events.jsonl", (1000 - age, 1000 - age))
    (tmp_path / "other").mkdir()
    assert [folder.name for folder in run_folders(tmp_path)] == ["new", "old"]
    assert newest_run(tmp_path) == tmp_path / "new"
    assert find_run(tmp_path / "old", tmp_path) == find_run(Path("old"), tmp_path) == tmp_path / "old"
    with pytest.raises(ConfigError, match=r"there is no run odl, neither as a folder nor in .*; did you mean 'old'\?"):
        find_run(Path("odl"), tmp_path)
    with pytest.raises(ConfigError, match=r"other is not a run's folder: it has no events.jsonl"):
        find_run(Path("other"), tmp_path)


def test_a_folder_that_a_command_holds_or_held_is_a_runs(tmp_path: Path) -> None:
    with Hold(tmp_path / "mine", lock=COMMAND_LOCK):
        assert run_line(newest_run(tmp_path)).state == "starting"
    assert run_line(newest_run(tmp_path)).state == "never begun"


# ---------------------------------------------------------------- what a command of this machine leaves


@contextmanager
def that_ends_with(error: BaseException | None, begun: bool) -> Iterator[None]:
    """Stands for the processes of a federation: ends at its start, or after it has begun."""
    if error is not None and not begun:
        raise error
    yield
    if error is not None:
        raise error


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (None, "stopped"),
        (KeyboardInterrupt(), "stopped"),
        (EnvironmentProblem("the SuperLink did not start: no space"), "failed"),
    ],
)
@pytest.mark.parametrize("begun", [False, True])
def test_a_run_of_this_machine_says_how_it_ended(
    tmp_path: Path, error: BaseException | None, state: str, begun: bool
) -> None:
    folder = tmp_path / "mine"
    with suppress(KeyboardInterrupt, EnvironmentProblem):
        with recorded_end(folder, that_ends_with(error, begun)):
            with (
                pytest.raises(ConfigError, match="is alive; `edgelam top"),
                recorded_end(folder, that_ends_with(error, begun)),
            ):
                pytest.fail("two commands play the same run")
    assert run_line(folder).state == state


def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path: Path) -> None:
    wrong: EdgelamError = ConfigError("nothing can be learned from it")
    with pytest.raises(ConfigError), recorded_end(tmp_path / "mine", that_ends_with(wrong, begun=False)):
        pytest.fail("it begins")
    assert not (tmp_path / "mine").exists()
    with pytest.raises(ConfigError), recorded_end(write(tmp_path / "old", BEGAN), that_ends_with(wrong, begun=False)):
        pytest.fail("it begins")
    assert (tmp_path / "old" / "events.jsonl").exists(), "that of a run that goes on stays"
