"""How a run goes on: which folders are refused, which keys may change, and what nodes may still know of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from edgelam_fl.errors import ConfigError, ModelError
from edgelam_fl.files import Hold
from edgelam_fl.telemetry.events import EventLog, RunDone, RunFailure, RunResumed, RunStarted, read_events
from edgelam_fl.telemetry.run_folder import state_now
from edgelam_fl.telemetry.summary import build_summary
from edgelam_fl.wire import edgelam_pb2 as pb
from server.checkpoint import load_newest, save
from server.resuming import check_can_resume, resumption
from server.state import FederationState
from tests.by_hand import FederationByHand
from tests.unit.conftest import MakeFederation


@pytest.fixture
def stopped(federation: MakeFederation) -> FederationByHand:
    """A run that ended early after its first round."""
    run = federation("ab", "e")
    run.rounds.round_after(FederationState())
    return run


def test_a_folder_that_is_no_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not a run's folder \(no events.jsonl, no config.toml\)"):
        check_can_resume(tmp_path)


def test_a_run_that_is_alive_or_done_is_refused(stopped: FederationByHand) -> None:
    folder = stopped.folder.path
    check_can_resume(folder)
    hold = Hold(folder)
    with pytest.raises(ConfigError, match=r"is alive: `edgelam top .*` shows it"):
        check_can_resume(folder)
    assert state_now(folder, list(read_events(folder / "events.jsonl"))) == "running"
    hold.release()
    check_can_resume(folder)
    assert state_now(folder, list(read_events(folder / "events.jsonl"))) == "killed"
    stopped.folder.emit(RunDone(summary=""))
    with pytest.raises(ConfigError, match="is done, so there is nothing to go on with"):
        check_can_resume(folder)


def test_a_run_without_a_finished_round_is_refused_unless_the_server_begins_it_again(
    federation: MakeFederation,
) -> None:
    run = federation("ab", "e")
    with pytest.raises(ConfigError, match="the run has not finished a round"):
        resumption(run.folder.path)
    again = resumption(run.folder.path, begins_again=True)
    assert (again.saved, again.round, again.config) == (None, 0, run.config)
    run.folder.emit(RunStarted(run="run", config={}, versions={}, name_at_nodes="run-77"))
    assert resumption(run.folder.path, begins_again=True).name == "run-77", "nodes may still play for it"


def test_a_run_of_another_version_is_refused(stopped: FederationByHand) -> None:
    saved, _ = load_newest(stopped.folder.path)
    save(stopped.folder.path, replace(saved, versions={"edgelam-fl": "0.0.1"}))
    with pytest.raises(ConfigError, match=r"a run of edgelam-fl 0\.0\.1, and this is .*: install that version"):
        resumption(stopped.folder.path)


@pytest.mark.parametrize(
    ("override", "refused"),
    [
        ("federation.rounds=9", False),
        ("federation.min_nodes=2", False),
        ("federation.round_deadline_s=7", False),
        ("federation.local_steps=7", True),
        ("lora.rank=2", True),
        ("optimizer.lr=0.1", True),
    ],
)
def test_rounds_and_waits_may_change_and_nothing_that_training_depends_on(
    stopped: FederationByHand, override: str, refused: bool
) -> None:
    if refused:
        key = override.partition("=")[0]
        with pytest.raises(
            ConfigError, match=rf"^{key} was .* cannot change while a run goes on\. What can: federation\.rounds"
        ):
            resumption(stopped.folder.path, [override])
    else:
        section, _, key = override.partition("=")[0].partition(".")
        config = resumption(stopped.folder.path, [override]).config
        assert str(getattr(getattr(config, section), key)).removesuffix(".0") == override.partition("=")[2]


def test_another_model_is_refused(stopped: FederationByHand) -> None:
    resumed = resumption(stopped.folder.path)
    resumed.check_model(stopped.spec)
    assert resumed.saved is not None
    other = replace(resumed, saved=replace(resumed.saved, model={**resumed.saved.model, "model.safetensors": "0" * 64}))
    with pytest.raises(ModelError, match="the run trained on another model than"):
        other.check_model(stopped.spec)


def test_a_damaged_checkpoint_is_passed_over_and_said(stopped: FederationByHand) -> None:
    saved, _ = load_newest(stopped.folder.path)
    newest = save(stopped.folder.path, replace(saved, state=replace(saved.state, round=2)))
    (newest / "tensors.safetensors").write_bytes(b"x")
    resumed = resumption(stopped.folder.path)
    assert resumed.round == 1
    assert "checkpoints/r000002 is damaged: tensors.safetensors" in resumed.problem


def test_no_job_of_an_earlier_process_is_handed_over_again(
    stopped: FederationByHand, federation: MakeFederation
) -> None:
    plan = stopped.events("plan")[-1]
    with (stopped.folder.path / "events.jsonl").open("a") as file:  # as it began two attempts at round 2 and was killed
        file.write("".join(json.dumps({**plan, "round": 2, "attempt": attempt}) + "\n" for attempt in (1, 2)))
    resumed = resumption(stopped.folder.path)
    assert (resumed.round, resumed.attempts, resumed.nodes) == (1, 2, frozenset("abe"))
    second = federation("ab", "e")
    second.go_on(stopped, resumed.attempts)
    second.rounds.end_earlier_attempts()
    second.run()
    assert [(p["round"], p["attempt"]) for p in second.events("plan")] == [(1, 1), (2, 1), (2, 2), (2, 3), (3, 1)]


@pytest.mark.parametrize(
    ("has", "attempts", "goes_on"),
    [
        ({"a": 4, "b": 4, "e": 4}, 1, (4, 1)),
        ({"a": 4, "b": 4}, 1, (0, 0)),  # the host has none
        ({"a": 4, "b": 4, "e": 4}, 2, (0, 0)),  # a later attempt was begun, of which nothing is known
    ],
)
def test_a_run_that_goes_on_begins_its_round_where_all_nodes_have_a_snapshot(
    federation: MakeFederation, has: dict[str, int], attempts: int, goes_on: tuple[int, int]
) -> None:
    """Round 2 was under way when the ServerApp was killed."""

    def killed(plan: pb.Plan | None) -> bool:
        raise KeyboardInterrupt

    stopped = federation("ab", "e", "federation.snapshot_every=2")
    state = stopped.rounds.round_after(FederationState())
    for name, steps in has.items():
        stopped.nodes[name].kept = [(1, steps)]
    stopped.nodes["e"].loses = killed
    with pytest.raises(KeyboardInterrupt):
        stopped.rounds.round_after(state)
    stopped.nodes["e"].loses = lambda plan: False
    second = federation("ab", "e", "federation.snapshot_every=2")
    second.go_on(stopped, attempts)
    second.roster.refresh()
    second.rounds.look_for_snapshots()
    second.run()
    plans = [plan for plan in second.nodes["e"].plans if plan.round == 2]
    assert [(plan.first_step, plan.resume_attempt) for plan in plans] == [goes_on]
    assert not (stopped.folder.path / "attempt.json").exists(), "the run is over"


def test_a_run_that_had_failed_and_went_on_has_not_failed(stopped: FederationByHand) -> None:
    log = EventLog(stopped.folder.path / "events.jsonl")
    log(RunFailure(reason="no host", kept=""))
    events = lambda: list(read_events(log.path))  # noqa: E731
    assert build_summary(events()).state == "failed"
    log(RunResumed(round=1))
    assert build_summary(events()).state == "running"
