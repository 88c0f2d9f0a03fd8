"""A node's examples and its task, as a plan asks for them."""

from __future__ import annotations

from pathlib import Path

from edgelam_fl.tasks.base import Task
from edgelam_fl.tasks.kinds import make_task
from edgelam_fl.wire import edgelam_pb2 as pb


def task_of(plan: pb.Plan, tokenizer_folder: Path) -> Task:
    task = plan.task
    return make_task(
        task.kind, tokenizer_folder, template=task.template, max_tokens=task.max_tokens, loss_on=task.loss_on,
        classes=tuple(task.classes), weighting=task.weighting or "labels",
    )  # fmt: skip
