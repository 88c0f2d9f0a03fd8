from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from edgelam_fl.config import parse_run_file
from edgelam_fl.errors import ConfigError, EnvironmentProblem
from edgelam_fl.model.source import ModelSource
from edgelam_fl.telemetry.events import Event, RoundDone, RoundProgress, RunResumed, TrackerFailed, of_kind, read_events
from edgelam_fl.telemetry.trackers import PROJECT, Tracker, Trackers, check_trackers, flat, mlflow_place, rows_of
from server.checks import check_changes, check_config
from server.run_folder import RunFolder
from tests.recorded import DEVICES, ROUNDS, STEPS, a_classification, a_run, as_events, of_privacy
from tests.support import run_config

CONFIG = {"model": {"name": "tiny"}, "lora": {"rank": 8, "targets": ["q_proj"]}, "split": {"fronts": {}}}


class Recorder:
    """A tracker that keeps what it gets, and is as slow or as broken as a test wants."""

    def __init__(self, fails_at: int | None = None, waits_for: threading.Event | None = None) -> None:
        self.config: dict[str, Any] = {}
        self.rows: list[tuple[int | None, dict[str, Any]]] = []
        self.finished = False
        self._fails_at, self._waits_for = fails_at, waits_for

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config |= values

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        if self._waits_for is not None:
            self._waits_for.wait()
        if step == self._fails_at:
            raise ConnectionError("api.example is down")
        self.rows.append((step, values))

    def finish(self) -> None:
        self.finished = True


def reported(
    events: list[Event], folder: Path, trackers: Mapping[str, Tracker] | None = None, names: tuple[str, ...] = ()
) -> list[Event]:
    """Hands a run's events to trackers, and closes them; returns what they emitted. trackers: in the place of real ones."""
    said: list[Event] = []
    opener = None if trackers is None else lambda name, _: trackers[name]
    found = Trackers(names or tuple(trackers or ()), folder, CONFIG, said.append, open_tracker=opener)
    for event in events:
        found(event)
    found.close(patience_s=60)
    return said


def mean_of(done: RoundDone) -> Any:
    return pytest.approx(sum(device.perplexity for device in done.devices) / len(done.devices), rel=1e-6)


def rounds_of(events: list[Event]) -> list[RoundDone]:
    return list(of_kind(events, RoundDone))


def test_every_figure_has_its_step_and_no_step_comes_back() -> None:
    rounds = rounds_of(as_events(a_run()))
    rows = [row for done in rounds for row in rows_of(done, STEPS * (done.round - 1))]
    steps = [step for step, _ in rows]
    assert steps == sorted(steps)
    losses = {step: values for step, values in rows if "train/loss" in values}
    assert list(losses) == list(range(1, ROUNDS * STEPS + 1))
    third = [device.step_losses[2] for device in rounds[1].devices]
    assert losses[STEPS + 3] == {
        "train/loss": pytest.approx(sum(third) / 3),
        **{f"device_loss/{name}": loss for name, loss in zip(DEVICES, third, strict=True)},
    }
    held_out = [(step, values) for step, values in rows if "eval/perplexity" in values]
    assert [step for step, _ in held_out] == [STEPS * number for number in range(ROUNDS + 1)]
    assert held_out[2][1]["eval/perplexity"] == mean_of(rounds[2])
    assert held_out[2][1]["device_perplexity/device-2"] == rounds[2].devices[1].perplexity
    costs = [(step, values) for step, values in rows if "round/seconds" in values]
    assert [(step, values["round/number"]) for step, values in costs] == [(STEPS * n, n) for n in range(1, ROUNDS + 1)]
    assert costs[0][1]["round/seconds"] == 25.0
    names = {name for _, values in rows for name in values}
    assert not [name for name in names if any(other.startswith(f"{name}/") for other in names)]
    assert costs[0][1]["round/link_bytes"] == 3 * (4_700_123 + 4_600_321)


def test_classes_are_measured_by_accuracy() -> None:
    done = rounds_of(as_events(a_classification()))[1]
    (_, first), *_ = rows_of(done, 10)
    shares = [device.metrics["accuracy"] for device in done.devices]
    assert first["eval/accuracy"] == pytest.approx(sum(shares) / len(shares))
    assert first["device_accuracy/ann"] == done.devices[0].metrics["accuracy"]
    assert "eval/perplexity" not in first


def test_many_devices_are_one_curve() -> None:
    lines = a_run()
    (done,) = (line for line in lines if line["event"] == "round_done" and line["round"] == 1)
    done["devices"] = [{**done["devices"][0], "name": f"d{number}"} for number in range(51)]
    names = {name for _, values in rows_of(rounds_of(as_events([done]))[0], 0) for name in values}
    assert {"train/loss", "eval/perplexity"} <= names
    assert not [name for name in names if name.startswith("device_")]


def test_privacy_that_is_spent_is_a_curve(tmp_path: Path) -> None:
    lines = a_run()
    _, *spent, _ = of_privacy()
    events = as_events([lines[0], spent[0], lines[7], spent[1]])
    tracker = Recorder()
    assert reported(events, tmp_path, {"tensorboard": tracker}) == []
    found = [(step, values["privacy/epsilon"]) for step, values in tracker.rows if "privacy/epsilon" in values]
    assert found == [(0, 2.5), (STEPS, 3.5)]
    assert tracker.config["lora.targets"] == '["q_proj"]'
    assert tracker.finished


def test_signs_of_life_within_a_round_come_before_its_end(tmp_path: Path) -> None:
    lines = a_run()
    signs = [RoundProgress(round=2, attempt=1, seconds=9.0, doing="training", step=s, steps=9, loss=3.0 - s, tokens_per_s=7.0)
             for s in (1, 1, 2)]  # fmt: skip
    silent = RoundProgress(round=2, attempt=1, seconds=1.0, doing="loading")
    tracker = Recorder()
    reported([*as_events([lines[0], lines[7]]), silent, *signs], tmp_path, {"trackio": tracker})
    assert [(step, values) for step, values in tracker.rows if "live/loss" in values] == [
        (STEPS, {"live/loss": 2.0, "live/step_of_round": 1.0, "live/tokens_per_s": 7.0}),
        (STEPS, {"live/loss": 1.0, "live/step_of_round": 2.0, "live/tokens_per_s": 7.0}),
    ]


def test_a_tracker_that_fails_is_said_once_and_costs_the_others_nothing(tmp_path: Path) -> None:
    events = as_events(a_run())
    broken, whole = Recorder(fails_at=STEPS), Recorder()
    said = reported(events, tmp_path, {"wandb": broken, "trackio": whole})
    assert said == [TrackerFailed(tracker="wandb", reason="ConnectionError: api.example is down")]
    assert len(broken.rows) == STEPS
    assert whole.rows[-1][0] == ROUNDS * STEPS


def test_a_tracker_that_cannot_be_opened_is_said(tmp_path: Path) -> None:
    assert reported(as_events(a_run()), tmp_path, {}, ("wandb",)) == [
        TrackerFailed(tracker="wandb", reason="KeyError: 'wandb'")
    ]


def test_a_tracker_that_hangs_does_not_hold_the_run(tmp_path: Path) -> None:
    said: list[Event] = []
    answers = threading.Event()
    trackers = Trackers(
        ("wandb",), tmp_path, CONFIG, said.append, open_tracker=lambda name, _: Recorder(waits_for=answers)
    )
    for event in as_events(a_run()):
        trackers(event)
    trackers.close(patience_s=0.01)
    answers.set()
    assert said == [TrackerFailed(tracker="wandb", reason="it did not take everything within 0.01 s")]


def test_steps_of_a_run_that_goes_on_are_counted_on(tmp_path: Path) -> None:
    tracker = Recorder()
    trackers = Trackers(("mlflow",), tmp_path, CONFIG, list[Event]().append, 20, lambda name, _: tracker)
    trackers(RunResumed(round=2))
    trackers(rounds_of(as_events(a_run()))[2])
    trackers.close()
    assert [step for step, _ in tracker.rows] == [20, *range(21, 31), 30]


def test_tensorboard_reads_the_values_of_the_events(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = as_events(a_run())
    assert reported(events, tmp_path, names=("tensorboard",)) == []
    reader = EventAccumulator(str(tmp_path / "tensorboard"))
    reader.Reload()
    losses = [(point.step, point.value) for point in reader.Scalars("device_loss/device-1")]
    first = [loss for done in rounds_of(events) for loss in done.devices[0].step_losses]
    assert losses == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in enumerate(first, 1)]
    held_out = [(point.step, point.value) for point in reader.Scalars("eval/perplexity")]
    assert held_out == [(STEPS * number, mean_of(done)) for number, done in enumerate(rounds_of(events))]


def test_mlflow_reads_the_values_of_the_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database takes seconds to make
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tmp_path.as_uri() + "/mlruns")
    events = as_events(a_run())
    said: list[Event] = []
    for name in ("mine", "broken"):
        trackers = Trackers(("mlflow",), tmp_path / name, CONFIG, said.append)
        for event in events[: len(events) if name == "mine" else 1]:
            trackers(event)
        trackers.close(failed=name == "broken", patience_s=60)
    assert said == []
    client = MlflowClient(tmp_path.as_uri() + "/mlruns")
    runs = client.search_runs([client.get_experiment_by_name(PROJECT).experiment_id])
    assert {(run.info.run_name, run.info.status) for run in runs} == {("mine", "FINISHED"), ("broken", "FAILED")}
    (run,) = (run for run in runs if run.info.run_name == "mine")
    assert run.data.params == {
        "model.name": "tiny", "lora.rank": "8", "lora.targets": '["q_proj"]', "split.fronts": "{}",
    }  # fmt: skip
    history = client.get_metric_history(run.info.run_id, "device_loss/device-2")
    second = [loss for done in rounds_of(events) for loss in done.devices[1].step_losses]
    assert [(point.step, point.value) for point in history] == list(enumerate(second, 1))
    seconds = client.get_metric_history(run.info.run_id, "round/seconds")
    assert [(point.step, point.value) for point in seconds] == [(STEPS * n, 24.0 + n) for n in range(1, ROUNDS + 1)]


def test_mlflow_keeps_its_database_beside_the_runs_unless_it_is_told_otherwise(tmp_path: Path) -> None:
    assert mlflow_place(tmp_path / "mine", {}) == f"sqlite:///{tmp_path}/mlflow.db"
    assert mlflow_place(tmp_path / "mine", {"MLFLOW_TRACKING_URI": "http://tracker:5000"}) == "http://tracker:5000"


def test_a_runs_folder_reports_where_the_run_file_says(tiny: ModelSource, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    spec = check_config(run_config(tiny.name, "run.report_to=tensorboard"))
    folder = RunFolder(tmp_path / "mine", spec)
    for event in as_events(a_run())[:-1]:
        folder.emit(event)
    folder.finish()
    reader = EventAccumulator(str(folder.path / "tensorboard"))
    reader.Reload()
    assert len(reader.Scalars("train/loss")) == ROUNDS * STEPS
    assert not list(of_kind(read_events(folder.path / "events.jsonl"), TrackerFailed))


def test_a_missing_package_is_refused_before_anything_starts() -> None:
    with pytest.raises(EnvironmentProblem, match=r"'trackio'.*`pip install trackio` there, or leave 'trackio' out"):
        check_trackers(("tensorboard", "trackio"), installed=lambda package: package == "tensorboardX")
    with pytest.raises(ConfigError, match=r"names 'mlflow' twice"):
        check_trackers(("mlflow", "mlflow"), installed=lambda package: True)


def test_a_name_that_is_no_tracker_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"run\.report_to.*tensorboard"):
        parse_run_file('[run]\nreport_to = ["tensorbord"]\n', source="mine.toml")


def test_a_run_that_goes_on_may_report_elsewhere() -> None:
    then = parse_run_file("", source="mine.toml")
    check_changes(then, parse_run_file('[run]\nreport_to = "mlflow"\n', source="mine.toml"))


def test_a_run_file_is_flattened() -> None:
    assert flat({"a": {"b": {"c": 1}, "d": [1, 2]}, "e": {}, "f": None, "g": True}) == {
        "a.b.c": 1, "a.d": "[1, 2]", "e": "{}", "f": "null", "g": True,
    }  # fmt: skip
