"""The tasks, by the names that a run file has for them. Imports no torch: the server reads this table too.

A new task is one file with a class that keeps `tasks.base.Task`, and one line in `TASKS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgelam_fl.array_files import Array
from edgelam_fl.errors import ConfigError, nearest
from edgelam_fl.model.value_ends import ValueModel
from edgelam_fl.tasks.arrays import Sample, device_samples
from edgelam_fl.tasks.arrays import place_of as place_of_sample
from edgelam_fl.tasks.data import DataSettings, DevicePairs, Pair, TaskSettings, device_pairs, place_of
from edgelam_fl.tasks.metrics import check_metrics
from edgelam_fl.tasks.radio import BEAMFORMER, CELLS, CHANNELS, RadioSettings, beam_network, channel_ends

if TYPE_CHECKING:
    from edgelam_fl.tasks.base import Task


@dataclass(frozen=True)
class Values:
    """What a task reads and gives that learns from arrays of values in the place of texts."""

    arrays: tuple[Array, ...]
    """The arrays of a device's file."""
    ends: Callable[[RadioSettings], ValueModel]
    """Returns the sizes of what stands in the places of embedding and head, or the network in the place of a model."""
    settings: tuple[str, ...]
    """The keys of [radio] that the task uses."""
    model: str = ""
    """The one model.name of the task; empty: any language model."""


@dataclass(frozen=True)
class TaskKind:
    """One task as a run file knows it. A task that answers with a class needs `task.classes` and a model with a task head."""

    path: str  # module:class, imported when a node makes the task as class(tokenizer_folder, settings)
    answers: Literal["text", "class", "values"] = "text"
    values: Values | None = None  # of a task that answers with values


TASKS = {
    "causal-lm": TaskKind("edgelam_fl.tasks.causal_lm:CausalLm"),
    "classification": TaskKind("edgelam_fl.tasks.classification:Classification", answers="class"),
    "channel-prediction": TaskKind(
        "edgelam_fl.tasks.channel_prediction:ChannelPrediction",
        answers="values",
        values=Values(CHANNELS, channel_ends, ("snr_db", "history_slots", "future_slots", "series", "duplex", "base")),
    ),
    "beamforming": TaskKind(
        "edgelam_fl.tasks.beamforming:Beamforming",
        answers="values",
        values=Values(CELLS, beam_network, ("beam_snrs_db", "pilot_snrs_db"), BEAMFORMER),
    ),
}


def values_of(kind: str) -> Values | None:
    """Returns what a task of values reads and gives; None for a task of texts, and for an unknown one, which cannot be made."""
    return TASKS[kind].values if kind in TASKS else None


def points_alike(kind: str) -> bool:
    """Returns whether what honest devices learn does not pull them in opposite directions, whatever their data: texts have much in common.

    A device whose examples are all of one class points against those of another class; so may one with values of another range.
    """
    return kind in TASKS and TASKS[kind].answers == "text"


def device_data(path: Path, settings: DataSettings, eval_file: Path | None = None) -> DevicePairs:
    """Reads a device's file as the kind of the task says: pairs of texts, or samples of arrays.

    eval_file: has the examples to measure. Raises DataError if a file does not fit the task.
    """
    values = values_of(settings.kind)
    if values is None:
        return device_pairs(path, settings, eval_file)
    return device_samples(path, settings, values.arrays, eval_file)


def place_in(path: Path, example: Pair | Sample, settings: DataSettings) -> str:
    """Returns the place of an example in its device's file; empty if it is not there."""
    return place_of_sample(example.number) if isinstance(example, Sample) else place_of(path, example, settings)


def check_task(settings: TaskSettings) -> None:
    """Raises ConfigError for an unknown task, and for settings that are missing, doubled or not for this task."""
    classes, answers = list(settings.classes), _kind(settings.kind).answers
    if answers != "class" and classes:
        with_classes = " or ".join(repr(name) for name, kind in TASKS.items() if kind.answers == "class")
        raise ConfigError(f"task.classes is for task.kind = {with_classes}, got {settings.kind!r}")
    if answers == "text":
        if settings.loss_on == "assistant" and settings.template != "chat":
            raise ConfigError(
                "task.loss_on = 'assistant' learns every answer of a chat and needs task.template = 'chat', got "
                f"{settings.template!r:.60}; 'answer' or 'all' go with it"
            )
        if settings.packing and settings.weighting == "examples":
            raise ConfigError(
                f"task.packing = true cannot be combined with task.weighting = {settings.weighting!r}, which takes each row for one "
                f"example. Allowed: weighting = 'labels', or packing = false"
            )
        if settings.metrics and settings.loss_on == "all":
            raise ConfigError(
                f"task.metrics = {list(settings.metrics)} measures answers, and with task.loss_on = 'all' the whole text is learned, which "
                f"answers nothing. Allowed: loss_on = 'answer' or 'assistant', or no metrics"
            )
        check_metrics(settings.metrics)
    elif settings.metrics:
        gives = "a class, whose accuracy" if answers == "class" else "values, whose error"
        raise ConfigError(
            f"task.metrics = {list(settings.metrics)} measures texts as answers, and task.kind = {settings.kind!r} answers with {gives} "
            f"is measured anyway. Allowed: no metrics"
        )
    elif settings.packing:
        has = "one class" if answers == "class" else "one sample"
        raise ConfigError(
            f"task.packing = true is for task.kind = 'causal-lm', and {settings.kind!r} has {has} per row. Allowed: packing = false"
        )
    elif answers == "class" and not 2 <= len(set(classes)) == len(classes):
        raise ConfigError(f"task.classes = {classes!r:.80} must name at least 2 classes, each once")


def make_task(settings: TaskSettings, tokenizer_folder: Path) -> Task:
    """Makes the task of a run file's [task] section, or of a plan. Raises ConfigError as `check_task`."""
    check_task(settings)
    module, _, name = _kind(settings.kind).path.partition(":")
    task: Task = getattr(importlib.import_module(module), name)(tokenizer_folder, settings)
    return task


def _kind(name: str) -> TaskKind:
    if name not in TASKS:
        raise ConfigError(f"task.kind = {name!r} is not known: {nearest(name, TASKS)}")
    return TASKS[name]
