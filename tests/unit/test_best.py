"""Early stopping, and the best adapter as the result of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from edgelam_fl.errors import ConfigError, RunFailed
from edgelam_fl.model import adapter as adapters
from edgelam_fl.telemetry.events import EVENTS_FILE, read_events
from edgelam_fl.telemetry.report.incidents import incidents
from edgelam_fl.telemetry.summary import build_summary
from edgelam_fl.wire import edgelam_pb2 as pb
from server.best import Best, best_after, held_out_loss
from tests.by_hand import FederationByHand, moves
from tests.unit.conftest import MakeFederation

PATIENT = ("federation.rounds=6", "federation.early_stopping_patience=2")


def with_losses(run: FederationByHand, losses: Sequence[float]) -> FederationByHand:
    """Has every device measure these losses per label, in the order of the rounds; the last one from then on."""
    for node in run.nodes.values():
        node.loss_sum = lambda plan: 2 * losses[min(plan.round, len(losses)) - 1]
    return run


def after(losses: Sequence[float], threshold: float = 0.0) -> Best | None:
    best = None
    for number, loss in enumerate(losses):
        best = best_after(best, Best(round=number, loss=loss), threshold)
    return best


@pytest.mark.parametrize(
    ("losses", "threshold", "expected"),
    [
        ([3.0], 0.0, (0, 3.0, 0)),
        ([3.0, 2.0, 2.0, 2.5], 0.0, (1, 2.0, 2)),
        ([3.0, 2.99, 2.98, 2.0], 0.1, (3, 2.0, 0)),
        ([3.0, 2.99, 2.98], 0.1, (2, 2.98, 2)),  # the best so far, but not better by enough
        ([3.0, math.nan, math.inf], 0.0, (0, 3.0, 2)),
        ([math.nan, 3.0], 0.0, (1, 3.0, 0)),
    ],
)
def test_the_best_of_some_evaluations(losses: list[float], threshold: float, expected: tuple[int, float, int]) -> None:
    best = after(losses, threshold)
    assert best is not None
    assert (best.round, best.loss, best.in_vain) == expected


def test_a_loss_is_a_mean_over_labels_not_over_devices() -> None:
    reports = [
        pb.JobReport(eval_loss_sum=6.0, eval_labels=1),
        pb.JobReport(eval_loss_sum=6.0, eval_labels=5),
        pb.JobReport(),
    ]
    assert held_out_loss(reports) == 2.0
    assert held_out_loss([pb.JobReport()]) is None


def test_a_run_ends_when_its_patience_does_and_its_result_is_the_best_adapter(federation: MakeFederation) -> None:
    """Losses of what rounds 0, 1, 2 ... made: after round 2 nothing is better, which rounds 4 and 5 measure."""
    run = with_losses(federation("ab", "e", *PATIENT, "federation.load_best=true"), [3.0, 2.0, 1.0, 1.5, 1.0, 4.0])
    run.run()
    (stopped,), (taken,) = run.events("stopped_early"), run.events("best_taken")
    assert [stopped[key] for key in ("round", "planned", "evaluations", "best_round", "best_loss")] == [5, 6, 2, 2, 1.0]
    assert [taken[key] for key in ("round", "loss", "last_round")] == [2, 1.0, 5]
    result = adapters.from_bytes((run.folder.path / "adapter" / "adapter_model.safetensors").read_bytes())
    assert moves(result, run.start) == {0: 2, 1: 2, 2: 4, 3: 4, 4: 2, 5: 2}
    events = list(read_events(run.folder.path / EVENTS_FILE))
    summary = build_summary(events)
    assert summary.best_round == 2
    assert {device.perplexity_after for device in summary.devices} == {math.exp(1.0)}, (
        "of the adapter that is the result"
    )
    told = [f"{what} {why}" for _, what, _, why in incidents(events)]
    assert told == [
        "the run ended early after round 5 of 6, as 2 evaluations in a row gave no lower held-out loss than 1.0000, after round 2",
        "the result is not the last adapter the one after round 2 of 5, as it had the lowest held-out loss: 1.0000",
    ]


def test_without_the_settings_all_rounds_are_made_and_the_last_adapter_is_the_result(
    federation: MakeFederation,
) -> None:
    run = with_losses(federation("ab", "e", "federation.rounds=3"), [1.0, 2.0])
    assert moves(run.run(), run.start)[0] == 3
    assert not run.events("stopped_early") + run.events("best_taken")
    assert run.folder.path.joinpath("adapter").is_dir()


def test_training_that_never_helps_leaves_the_adapter_that_the_run_started_from(federation: MakeFederation) -> None:
    run = with_losses(federation("ab", "e", "federation.load_best=true"), [1.0, 2.0])
    run.run()
    result = adapters.from_bytes((run.folder.path / "adapter" / "adapter_model.safetensors").read_bytes())
    assert set(moves(result, run.start).values()) == {0}
    assert run.events("best_taken")[0]["round"] == 0


def test_a_device_gets_back_what_it_had_of_its_own_when_the_run_was_at_its_best(federation: MakeFederation) -> None:
    settings = ("split.hosts=0", "strategy.aggregation=none", "federation.load_best=true", "federation.rounds=3")
    run = with_losses(federation("ab", "", *settings), [3.0, 1.0, 2.0])
    run.run()
    own = adapters.from_bytes((run.folder.path / "adapters" / "a" / "adapter_model.safetensors").read_bytes())
    assert set(moves(own, run.start).values()) == {1}


def test_devices_have_nothing_of_their_own_in_the_adapter_that_the_run_started_from(federation: MakeFederation) -> None:
    settings = ("split.hosts=0", "strategy.aggregation=none", "federation.load_best=true")
    run = with_losses(federation("ab", "", *settings), [1.0, 3.0])
    run.run()
    assert [path.name for path in run.folder.path.glob("adapter*")] == ["adapter"]


def test_a_run_that_goes_on_knows_what_was_best(federation: MakeFederation) -> None:
    """A checkpoint holds the best adapter and the patience that is left."""
    losses = [3.0, 1.0, 2.0, 2.0]
    settings = (*PATIENT, "federation.load_best=true")
    stopped, other = (with_losses(federation("ab", "e", *settings), losses) for _ in range(2))
    for node in stopped.nodes.values():
        node.fails = lambda plan: "no memory" if plan.round == 3 else ""
    with pytest.raises(RunFailed, match="round 3 failed"):
        stopped.run()
    for node in stopped.nodes.values():
        node.fails = lambda plan: ""
    other.go_on(stopped)
    other.run()
    assert (other.events("stopped_early")[0]["round"], other.events("best_taken")[0]["round"]) == (4, 1)
    result = adapters.from_bytes((other.folder.path / "adapter" / "adapter_model.safetensors").read_bytes())
    assert moves(result, stopped.start)[0] == 1


@pytest.mark.parametrize("setting", ["load_best=true", "early_stopping_patience=2"])
def test_losses_that_nobody_measures_cannot_decide(federation: MakeFederation, setting: str) -> None:
    run = federation("ab", "e", f"federation.{setting}")
    for node in run.nodes.values():
        node.profile.held_out = 0
    with pytest.raises(ConfigError, match=r"needs held-out losses, and no device holds examples out.*--eval-data"):
        run.run()
    assert not run.events("plan")
