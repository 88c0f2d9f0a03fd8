"""Submitting a run and following its events, with a stand-in for Flower's answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from edgelam_fl.config import RunConfig
from edgelam_fl.errors import ConfigError, EnvironmentProblem, RunFailed
from edgelam_fl.federation import runs
from edgelam_fl.federation.app_archive import app_alone
from edgelam_fl.federation.operator import Operator, prepare_operator
from edgelam_fl.federation.server_runs import ServerRuns, ServerTail
from edgelam_fl.federation.submission import FollowTiming, ServerWatch, Submission, run_events
from edgelam_fl.telemetry.console import RunView
from edgelam_fl.telemetry.events import Event, RoundProgress
from edgelam_fl.telemetry.events.table import kind_of
from edgelam_fl.telemetry.progress import write_progress

ROOT = Path(__file__).parents[2]


def _files(folder: Path, pattern: str) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob(pattern) if file.is_file()}


def test_flower_is_handed_the_app_alone(tmp_path: Path) -> None:
    (tmp_path / "app" / "server").mkdir(parents=True)
    (tmp_path / "app" / "server" / "of_an_earlier_version.py").touch()
    app = app_alone(tmp_path / "app")
    parts = {f"{part}/{file}" for part in ("server", "clients", "strategies") for file in _files(ROOT / part, "*.py")}
    assert {file for file in _files(app, "*") if file.endswith(".py")} == parts
    assert (app / "pyproject.toml").read_bytes() == (ROOT / "pyproject.toml").read_bytes()
    assert not list(app.rglob("__pycache__"))


# ---------------------------------------------------------------- following a run

AT_ONCE = FollowTiming(poll_s=0.0, silence_s=0.0, look_s=0.0, gone_s=0.0, lag_s=0.0)
NEVER_ASKS = FollowTiming(poll_s=0.0, silence_s=3600.0)


class Writer:
    """Writes a run's events, some at each of the follower's looks."""

    def __init__(self, file: Path, *looks: list[str]) -> None:
        self.file, self._looks = file, iter(looks)

    def __call__(self) -> None:
        for event in next(self._looks, []):
            with self.file.open("a") as out:
                out.write(json.dumps({"event": event}) + "\n")


def never() -> str:
    pytest.fail("Flower was asked although the run was heard")


def kinds(events: Iterator[Event]) -> list[str]:
    return [kind_of(event) for event in events]


def test_the_newest_progress_comes_between_the_events_and_an_older_one_of_the_file_does_not(tmp_path: Path) -> None:
    def progress(step: int) -> RoundProgress:
        return RoundProgress(round=1, attempt=1, seconds=3.0, doing="training", step=step, steps=6)

    looks = iter(
        [lambda: write_progress(tmp_path, progress(1)), lambda: None, lambda: write_progress(tmp_path, progress(2))]
    )
    write = Writer(tmp_path / "events.jsonl", ["run_started"], ["progress"], [], [], ["run_done"])

    def meanwhile() -> None:
        write()
        next(looks, lambda: None)()

    found = list(run_events(tmp_path / "events.jsonl", never, meanwhile=meanwhile, timing=NEVER_ASKS))
    assert [event.step for event in found if isinstance(event, RoundProgress)] == [1, 2]
    assert [kind_of(event) for event in found][-1] == "run_done"


@pytest.mark.parametrize("last", ["run_done", "run_failed"])
def test_events_come_as_they_are_written_and_end_with_the_last(tmp_path: Path, last: str) -> None:
    file = tmp_path / "events.jsonl"
    write = Writer(file, [], ["run_started", "plan"], [], [last, "written later"])
    followed = run_events(file, never, meanwhile=write, timing=NEVER_ASKS)
    assert kind_of(next(followed)) == "run_started"
    assert kinds(followed) == ["plan", last]


def test_flower_is_asked_only_after_a_silence(tmp_path: Path) -> None:
    file, asked = tmp_path / "events.jsonl", []
    write = Writer(file, ["run_started"], ["plan"], [], [], ["run_done"])

    def status() -> str:
        asked.append(file.read_text().count("\n"))
        return "running"

    assert kinds(run_events(file, status, meanwhile=write, timing=AT_ONCE)) == ["run_started", "plan", "run_done"]
    assert asked == [1, 2, 3], "before the first event and in two looks behind the plan; not when events came"


def test_a_sign_of_life_from_elsewhere_keeps_flower_from_being_asked(tmp_path: Path) -> None:
    write = Writer(tmp_path / "events.jsonl", *[[]] * 5, ["run_done"])

    def node_was_heard() -> bool:
        write()
        return True

    followed = run_events(tmp_path / "events.jsonl", never, meanwhile=node_was_heard, timing=AT_ONCE)
    assert kinds(followed) == ["run_done"]


class Elsewhere(ServerRuns):
    """A server on another machine, which says one piece at a time; an exception is raised in the place of one."""

    def __init__(self, *pieces: str | Exception) -> None:
        self._pieces, self._given = list(pieces), 0

    def read(self, run: str, part: int, offset: int) -> dict[str, Any]:
        if self._pieces and offset == self._given:
            piece = self._pieces.pop(0)
            if isinstance(piece, Exception):
                raise piece
            self._given += 1
            return {"lines": f'{{"event": "{piece}"}}\n', "part": 1, "offset": self._given, "alive": True}
        return {"lines": "", "part": part, "offset": offset, "alive": True}


def test_a_run_on_another_machine_is_followed_before_it_has_a_folder_and_through_a_silence(tmp_path: Path) -> None:
    gone = EnvironmentProblem("the server does not answer")
    runs = Elsewhere(ConfigError("no such run"), "run_resumed", gone, gone, "run_done")
    file = tmp_path / "nowhere" / "events.jsonl"
    followed = run_events(file, never, tail=ServerTail(runs, "mine"), timing=NEVER_ASKS)
    assert kinds(followed) == ["run_resumed", "run_done"]


def test_a_run_that_flower_has_not_begun_is_said(tmp_path: Path) -> None:
    write, said = Writer(tmp_path / "events.jsonl", [], [], [], ["run_done"]), list[str]()
    answers = iter(["unknown", "pending", "starting", "running", "running"])
    list(run_events(tmp_path / "events.jsonl", lambda: next(answers), meanwhile=write, say=said.append, timing=AT_ONCE))
    assert said[0] == "nothing was heard of the run for 0 s; Flower says that it is pending"
    assert len(said) <= 2, "running and unknown are no news"


def test_a_run_that_ends_without_a_word_fails_with_flowers_log(tmp_path: Path) -> None:
    followed = run_events(
        tmp_path / "events.jsonl", lambda: "finished:failed", log=lambda: "no space left on device", timing=AT_ONCE
    )
    with pytest.raises(RunFailed) as caught:
        list(followed)
    assert str(caught.value) == (
        "Flower says that the run is finished:failed, and it left no reason: no space left on device. No round was finished, "
        f"and {tmp_path} holds no event of it."
    )


def test_a_last_event_that_is_written_while_flower_is_asked_counts(tmp_path: Path) -> None:
    write = Writer(tmp_path / "events.jsonl", ["run_done"])

    def status() -> str:
        write()
        return "finished:completed"

    patient = FollowTiming(poll_s=0.0, silence_s=0.0, lag_s=3600.0)
    assert kinds(run_events(tmp_path / "events.jsonl", status, timing=patient)) == ["run_done"]


def test_the_deadline_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"^the server's plan did not come within 0 s$"):
        list(run_events(tmp_path / "none", never, 0.0, awaited="the server's plan", timing=NEVER_ASKS))


def test_a_server_that_comes_back_is_waited_for(tmp_path: Path) -> None:
    write, said = Writer(tmp_path / "events.jsonl", ["run_started"], [], [], [], [], ["run_done"]), list[str]()
    server_answers = iter([False, True])
    patient = FollowTiming(poll_s=0.0, silence_s=3600.0, look_s=0.0, gone_s=3600.0)
    server = ServerWatch("192.0.2.1:8000", lambda: next(server_answers, True), patient)
    followed = run_events(
        tmp_path / "events.jsonl", never, server=server, meanwhile=write, say=said.append, timing=patient
    )
    assert kinds(followed) == ["run_started", "run_done"]
    assert said == [
        "the server at 192.0.2.1:8000 does not answer since 0 s; the run goes on when it is back",
        "the server at 192.0.2.1:8000 answers again",
    ]


def test_a_server_that_stays_away_is_given_up_with_the_command_that_goes_on(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    server = ServerWatch("192.0.2.1:8000", lambda: False, AT_ONCE)
    with pytest.raises(EnvironmentProblem, match=r"has not answered for 0 s\. .*`edgelam run --resume") as caught:
        list(run_events(tmp_path / "events.jsonl", never, server=server, timing=AT_ONCE))
    assert f"`edgelam run --resume {tmp_path}` goes on" in str(caught.value)


@pytest.mark.parametrize("before", [["round_done"], []])
def test_a_failure_names_the_command_that_goes_on_if_a_round_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: list[str]
) -> None:
    events = [*before, "run_failed"]

    class Ended(Flower):
        def submit(self, config: RunConfig | None, out: Path, *_: Any, **__: Any) -> int:
            Writer(out / "events.jsonl", events)()
            self._out = out
            return 1

    monkeypatch.setattr(runs, "Submission", lambda operator: Ended(tmp_path, "running"))
    (run := tmp_path / "my run").mkdir()
    console, config = Console(quiet=True), RunConfig()
    with pytest.raises(RunFailed) as failed:
        runs.follow(console, RunView(console, 1, 1), config, run, Operator("127.0.0.1:1", tmp_path / "operator"))
    line = f"`edgelam run --resume '{run}' --server 127.0.0.1:1 --operator {tmp_path / 'operator'}` goes on"
    assert (line in str(failed.value)) == bool(before)


def test_a_run_that_flower_does_not_know_is_given_up(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="the server does not say what became of the run"):
        list(run_events(tmp_path / "events.jsonl", lambda: "unknown", timing=AT_ONCE))


class Flower(Submission):
    """Answers in place of Flower's command."""

    def __init__(self, home: Path, state: str) -> None:
        prepare_operator(home / "operator", "127.0.0.1:1")
        super().__init__(Operator("127.0.0.1:1", home / "operator"))
        self.state, self.calls = state, list[str]()

    def server_answers(self) -> bool:
        return True

    def flwr(self, command: str, *arguments: str, deadline_s: float = 0.0) -> dict[str, Any]:
        self.calls.append(command)
        if command == "stop" and self.state.startswith("finished"):
            raise RunFailed("`flwr stop` failed: run is already finished")
        return {"runs": [{"status": self.state}]}


def test_a_run_that_ended_needs_no_stop_and_its_own_reason_is_kept(tmp_path: Path) -> None:
    Flower(tmp_path, "finished:completed").stop()
    ended, running = Flower(tmp_path, "finished:failed"), Flower(tmp_path, "running")
    for submission in (ended, running):
        with pytest.raises(RunFailed, match="the server could not plan"), submission.stopped_on_error():
            raise RunFailed("the server could not plan: no device is here")
    assert running.calls == ["stop"]
