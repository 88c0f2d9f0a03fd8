"""Copies of a run's figures in the experiment trackers that its user has: TensorBoard, MLflow, Weights & Biases, trackio.

Knows events, and accelerate's trackers. Knows nothing of how a run goes on, and can neither end it nor slow it down: each
tracker has a thread of its own, and the first error of a tracker is its last word.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from edgelam_fl.errors import ConfigError, EnvironmentProblem
from edgelam_fl.names import printable
from edgelam_fl.telemetry.events import (
    Emit,
    Event,
    PrivacySpent,
    RoundDone,
    RoundProgress,
    RunResumed,
    RunStarted,
    TrackerFailed,
)
from edgelam_fl.telemetry.human import total
from edgelam_fl.telemetry.summary import ADAPTER_BYTES, LINK_BYTES, is_training_round, steps_of

PACKAGES: Mapping[str, tuple[str, ...]] = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "mlflow": ("mlflow", "mlflow-skinny"),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
}
"""The distributions per tracker, of which one is enough; the first is the one to install."""
PROJECT = "edgelam-fl"  # what MLflow calls an experiment
CURVES_OF_DEVICES = 50  # of more devices in a round, a tracker gets means alone
MLFLOW_FILE = "mlflow.db"
_PATIENCE_S = 30.0  # for trackers at the end of a run

Row = tuple[int, dict[str, float]]  # an optimizer step of the run, and values by name


class Tracker(Protocol):
    """The part of accelerate's GeneralTracker that is used."""

    def store_init_configuration(self, values: dict[str, Any]) -> None: ...
    def log(self, values: dict[str, Any], step: int | None = None) -> None: ...
    def finish(self) -> None: ...


OpenTracker = Callable[[str, Path], Tracker]  # takes a tracker's name and the run's folder


def is_installed(package: str) -> bool:
    """Returns whether a distribution is installed. A folder of the same name, as trackers leave them, does not count."""
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True


def check_trackers(names: Iterable[str], installed: Callable[[str], bool] = is_installed) -> None:
    """Raises EnvironmentProblem for the first tracker whose package is not installed, ConfigError for one that is there twice."""
    given = tuple(names)
    for name in given:
        if given.count(name) > 1:
            raise ConfigError(f"run.report_to = {list(given)} names {name!r} twice; each tracker may be there once")
        if not any(map(installed, PACKAGES[name])):
            raise EnvironmentProblem(
                f"run.report_to names {name!r}, and the package {PACKAGES[name][0]} is not installed on the machine where the run's server "
                f"is: `pip install {PACKAGES[name][0]}` there, or leave {name!r} out of run.report_to"
            )


class Trackers:
    """Hands a run's events to its trackers as they happen. Without names it does nothing at all."""

    def __init__(
        self,
        names: Iterable[str],
        folder: Path,
        config: Mapping[str, Any],
        emit: Emit,
        first_step: int = 0,
        open_tracker: OpenTracker | None = None,
    ) -> None:
        """config: the run file by sections. emit: told of a tracker's failure. first_step: optimizer steps that the run did before.

        open_tracker: makes a tracker that is ready; None: `open_of_accelerate`.
        """
        self._waiting = [(name, folder, open_tracker or open_of_accelerate, emit) for name in names]
        self._config, self._step = flat(config), first_step
        self._heard = (0, 0, 0)  # round, attempt and step of the last sign of life
        self._threads: list[_TrackerThread] = []

    def __call__(self, event: Event) -> None:
        """Takes an event of the run. The trackers are opened when the run begins or goes on, not while it waits for its turn.

        A sign of life within a round counts for the step that the round began with: the round's own figures come later, and no
        step may come back.
        """
        match event:
            case RunStarted() | RunResumed():
                self._threads += [_TrackerThread(*each) for each in self._waiting]
                self._waiting = []
                self._put(self._config)
            case PrivacySpent():
                self._put((self._step, {"privacy/epsilon": event.epsilon}))
            case RoundProgress() if event.loss is not None and (event.round, event.attempt, event.step) > self._heard:
                self._heard = (event.round, event.attempt, event.step)
                speed = {"live/tokens_per_s": event.tokens_per_s} if event.tokens_per_s is not None else {}
                self._put((self._step, {"live/loss": event.loss, "live/step_of_round": float(event.step), **speed}))
            case RoundDone():
                for row in rows_of(event, self._step):
                    self._put(row)
                self._step += steps_of(event)

    def close(self, *, failed: bool = False, patience_s: float = _PATIENCE_S) -> None:
        """Waits until the trackers have everything, together `patience_s` at most; later events are dropped."""
        threads, self._threads = self._threads, []
        for thread in threads:
            thread.put(_End(failed))
        end = time.monotonic() + patience_s
        for thread in threads:
            thread.wait(max(0.0, end - time.monotonic()), patience_s)

    def _put(self, what: Row | dict[str, Any]) -> None:
        for thread in self._threads:
            thread.put(what)


class _End:
    """The last thing that a tracker is given."""

    def __init__(self, failed: bool) -> None:
        self.failed = failed


class _TrackerThread:
    """One tracker, opened, fed and closed on one thread: MLflow keeps the run that it writes to per thread."""

    def __init__(self, name: str, folder: Path, open_tracker: OpenTracker, emit: Emit) -> None:
        self._name, self._folder, self._open, self._emit = name, folder, open_tracker, emit
        self._queue: SimpleQueue[Row | dict[str, Any] | _End] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def put(self, what: Row | dict[str, Any] | _End) -> None:
        if self._thread.is_alive():
            self._queue.put(what)

    def wait(self, seconds: float, patience_s: float) -> None:
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._emit(TrackerFailed(tracker=self._name, reason=f"it did not take everything within {patience_s:g} s"))

    def _run(self) -> None:
        try:
            tracker = self._open(self._name, self._folder)
            while not isinstance(what := self._queue.get(), _End):
                if isinstance(what, dict):
                    tracker.store_init_configuration(what)
                else:
                    step, values = what
                    tracker.log(values, step=step)
            _finish(self._name, tracker, what.failed)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a tracker raises, the run goes on without it
            reason = printable(f"{type(error).__name__}: {error}", 500)
            self._emit(TrackerFailed(tracker=self._name, reason=reason))


def rows_of(done: RoundDone, first_step: int) -> Iterator[Row]:
    """Yields the figures of a round in the order of their steps. first_step: optimizer steps that the run did before it.

    What is held out is measured with the adapter that the round starts from, so it belongs to `first_step`. Means are over the
    devices, each of which counts once. No name continues another one with a slash: MLflow's file store has a folder per part of
    a name.
    """
    named = len(done.devices) <= CURVES_OF_DEVICES
    yield first_step, {"round/number": float(done.round - 1), **_held_out(done, named)}
    for step in range(steps_of(done)):
        losses = {device.name: _at(device.step_losses, step) for device in done.devices}
        known = {name: loss for name, loss in losses.items() if loss is not None}
        if known:
            each = {f"device_loss/{name}": loss for name, loss in known.items()} if named else {}
            yield first_step + step + 1, {"train/loss": sum(known.values()) / len(known), **each}
    if is_training_round(done):
        yield first_step + steps_of(done), {"round/number": float(done.round), **_costs(done)}


def _held_out(done: RoundDone, named: bool) -> dict[str, float]:
    """Returns the mean of each measure over the devices that have it. named: also per device."""
    values: dict[str, dict[str, float]] = {}
    for device in done.devices:
        for measure, value in {"perplexity": device.perplexity, **device.metrics}.items():
            if value is not None:
                values.setdefault(measure, {})[device.name] = value
    found = {f"eval/{measure}": sum(each.values()) / len(each) for measure, each in values.items()}
    for measure, each in values.items() if named else ():
        found |= {f"device_{measure}/{name}": value for name, value in each.items()}
    return found


def _costs(done: RoundDone) -> dict[str, float]:
    tokens = total(device.tokens for device in done.devices)
    slowest = max((device.train_seconds or 0.0 for device in done.devices), default=0.0)
    found = {
        "round/seconds": done.seconds,
        "round/devices": float(len(done.devices)),
        "round/tokens_per_s": tokens / slowest if tokens and slowest else None,
        "round/link_bytes": _bytes(done, LINK_BYTES),
        "round/adapter_bytes": _bytes(done, ADAPTER_BYTES),
        "round/aggregation_error": done.aggregation_error,
        "round/virtual_seconds": done.virtual.seconds if done.virtual else None,
        "round/joules": done.virtual.joules if done.virtual else None,
    }  # fmt: skip
    return {name: float(value) for name, value in found.items() if value is not None}


def _bytes(done: RoundDone, keys: Iterable[str]) -> float | None:
    count: float | None = total(getattr(device, key) for device in done.devices for key in keys)
    return count


def _at(losses: tuple[float | None, ...], step: int) -> float | None:
    return losses[step] if step < len(losses) else None


def flat(config: Mapping[str, Any], path: str = "") -> dict[str, str | int | float | bool]:
    """Returns a run file's values by "section.key"; what no tracker has a type for, as a list, as JSON."""
    found: dict[str, str | int | float | bool] = {}
    for key, value in config.items():
        name = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping) and value:
            found |= flat(value, name)
        else:
            found[name] = value if isinstance(value, str | int | float) else json.dumps(value, ensure_ascii=False)
    return found


# ---------------------------------------------------------------- accelerate


def open_of_accelerate(name: str, folder: Path) -> Tracker:
    """Opens one of accelerate's trackers for the run in `folder`.

    TensorBoard writes into RUN/tensorboard. MLflow writes where MLFLOW_TRACKING_URI says, else into the database mlflow.db beside the
    runs. Weights & Biases and trackio go by their own settings.
    """
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState(cpu=True)  # the trackers ask for it, and made by them it would take hold of an accelerator
    made = {
        "tensorboard": {"run_name": "tensorboard", "logging_dir": str(folder)},
        "mlflow": {"experiment_name": PROJECT, "run_name": folder.name},
        "wandb": {"run_name": PROJECT, "name": folder.name, "dir": str(folder)},
        "trackio": {"run_name": PROJECT, "name": folder.name},
    }[name]
    if name == "mlflow":
        import mlflow

        mlflow.set_tracking_uri(mlflow_place(folder, os.environ))
    tracker: Any = LOGGER_TYPE_TO_CLASS[name](**made)
    tracker.start()
    return tracker


def mlflow_place(folder: Path, environment: Mapping[str, str]) -> str:
    """Returns the URI of the place that MLflow writes the run in `folder` to."""
    return environment.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.absolute().parent / MLFLOW_FILE}"


def _finish(name: str, tracker: Any, failed: bool) -> None:
    """Closes a tracker. A run that failed is said to have failed, if the tracker has a word for it."""
    if failed and name == "mlflow":
        import mlflow

        mlflow.end_run("FAILED")
    elif failed and name == "wandb":
        tracker.tracker.finish(exit_code=1)
    else:
        tracker.finish()
