"""The loss of a micro-batch at a stage with the head: of the positions that carry loss alone, a bounded number at a time.

Positions without a label would get a gradient of zero, so leaving them out changes nothing that is learned but for rounding.
Head and loss are taken forward and backward chunk by chunk, so that the logits of one chunk alone are in memory. Knows stages
and tasks; knows no links, and not who learns. Neighbours: `split.ends` and `split.passes`.

Shapes: N positions that carry loss, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from edgelam_fl.model.memory import head_chunk
from edgelam_fl.model.stage import Stage
from edgelam_fl.tasks.base import Task


@dataclass(frozen=True)
class Judged:
    """The loss of a micro-batch, and where its backward pass goes on."""

    loss: float  # the sum over the labels
    sums: dict[str, float]  # of the task's other metrics, by name
    output: torch.Tensor  # the stage's output, or the loss itself
    grad: (
        torch.Tensor | None
    )  # the gradient of `output`; None: `output` is the loss, already divided, or nothing learns


def judged(task: Task, stage: Stage, output: torch.Tensor, labels: torch.Tensor, divisor: int | None = None) -> Judged:
    """Computes the loss of `output`, what `stage` gives for the rows `task.loss_rows(labels)`.

    divisor: what the loss is divided by before its gradient is taken; None: it is only measured.
    """
    rows_N = task.loss_rows(labels)
    training = divisor is not None
    if rows_N is None:
        loss, sums = task.loss(output, labels, training=training)
        return Judged(float(loss.detach()), sums, loss / (divisor or 1), None)
    learns = training and output.requires_grad
    total, sums, grads = 0.0, {}, []
    size = head_chunk(stage.outputs)
    for states_CD, rows_C in zip(output.detach().split(size), rows_N.split(size), strict=True):
        with torch.set_grad_enabled(learns):
            loss, more = task.loss(stage.logits(states_CD.requires_grad_(learns)), labels, rows_C, training=training)
        total += float(loss.detach())
        sums = {name: sums.get(name, 0.0) + value for name, value in more.items()}
        if learns:
            grads += torch.autograd.grad(loss / (divisor or 1), states_CD)
    return Judged(total, sums, output, torch.cat(grads) if learns else None)
