"""A node's examples and its task, as a plan asks for them."""

from __future__ import annotations

from pathlib import Path

from edgelam_fl.tasks.base import Task
from edgelam_fl.tasks.kinds import make_task
from edgelam_fl.wire import edgelam_pb2 as pb


def task_of(plan: pb.Plan, tokenizer_folder: Path) -> Task:
    return make_task(plan.task, tokenizer_folder)
