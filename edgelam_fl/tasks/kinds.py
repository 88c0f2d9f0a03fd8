"""The tasks, by the names that a run file has for them. Imports no torch: the server reads this table too.

A new task is one file with a class that keeps `tasks.base.Task`, and one line in `TASKS`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgelam_fl.errors import ConfigError, nearest
from edgelam_fl.tasks.data import TaskSettings
from edgelam_fl.tasks.metrics import check_metrics

if TYPE_CHECKING:
    from edgelam_fl.tasks.base import Task


@dataclass(frozen=True)
class TaskKind:
    """One task as a run file knows it. A task that answers with a class needs `task.classes` and a model with a task head."""

    path: str  # module:class, imported when a node makes the task as class(tokenizer_folder, settings)
    answers: Literal["text", "class"] = "text"


TASKS = {
    "causal-lm": TaskKind("edgelam_fl.tasks.causal_lm:CausalLm"),
    "classification": TaskKind("edgelam_fl.tasks.classification:Classification", answers="class"),
}


def check_task(settings: TaskSettings) -> None:
    """Raises ConfigError for an unknown task, and for settings that are missing, doubled or not for this task."""
    classes = list(settings.classes)
    if _kind(settings.kind).answers == "text":
        if classes:
            with_classes = " or ".join(repr(name) for name, kind in TASKS.items() if kind.answers == "class")
            raise ConfigError(f"task.classes is for task.kind = {with_classes}, got {settings.kind!r}")
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
        raise ConfigError(
            f"task.metrics = {list(settings.metrics)} measures texts as answers, and task.kind = {settings.kind!r} answers with a class, "
            f"whose accuracy is measured anyway. Allowed: no metrics"
        )
    elif settings.packing:
        raise ConfigError(
            f"task.packing = true is for task.kind = 'causal-lm', and {settings.kind!r} has one class per row. Allowed: packing = false"
        )
    elif not 2 <= len(set(classes)) == len(classes):
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
