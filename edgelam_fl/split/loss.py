"""The loss of a micro-batch at a stage with the head: of the positions that carry loss alone, a bounded number at a time.

Positions without a label would get a gradient of zero, so leaving them out changes nothing that is learned but for rounding.
Head and loss are taken forward and backward chunk by chunk, so that the logits of one chunk alone are in memory, and once: the loss
is taken of a few positions at a time, whose gradient then replaces their logits. A head that learns gets its gradient here, and all
before it from the gradient of its inputs. Knows stages and tasks; knows no links, and not who learns. Neighbours: `split.ends` and
`split.passes`.

Shapes: N positions that carry loss, C of them in a chunk, P in a piece of it, D hidden, O logits or values.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from edgelam_fl.model.memory import head_chunk, loss_piece
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
    )  # the gradient of `output`; None: `output` is the loss, already divided, or nothing before the head learns
    of_head: list[tuple[nn.Parameter, torch.Tensor]] = field(
        default_factory=list
    )  # what learns of the head, with its gradient; none if `output` is the loss


def judged(task: Task, stage: Stage, output: torch.Tensor, labels: torch.Tensor, divisor: int | None = None) -> Judged:
    """Computes the loss of `output`, what `stage` gives for the rows `task.loss_rows(labels)`.

    divisor: what the loss is divided by before its gradient is taken; None: it is only measured.
    """
    rows_N = task.loss_rows(labels)
    training = divisor is not None
    if rows_N is None:
        loss, sums = task.loss(output, labels, training=training)
        return Judged(float(loss.detach()), sums, loss / (divisor or 1), None)
    heads = stage.head_parameters() if training else []
    passes_on = training and output.requires_grad
    learns = passes_on or bool(heads)
    losses, sums = list[torch.Tensor](), dict[str, float]()
    grads, of_head = list[torch.Tensor](), [torch.zeros(())] * len(heads)
    chunk, piece = head_chunk(stage.outputs), loss_piece(stage.outputs)
    for states_CD, rows_C in zip(output.detach().split(chunk), rows_N.split(chunk), strict=True):
        with torch.set_grad_enabled(learns):
            output_CO = stage.logits(states_CD.requires_grad_(learns))
        grad_CO = output_CO.detach()  # the same memory
        for grad_PO, rows_P in zip(grad_CO.split(piece), rows_C.split(piece), strict=True):
            output_PO = grad_PO.detach().requires_grad_(learns)
            with torch.set_grad_enabled(learns):
                loss, more = task.loss(output_PO, labels, rows_P, training=training)
            losses.append(loss.detach())
            sums = {name: sums.get(name, 0.0) + value for name, value in more.items()}
            if learns:
                grad_PO.copy_(*torch.autograd.grad(loss / (divisor or 1), output_PO))
        if learns:
            grad, *more_of_head = torch.autograd.grad(output_CO, [states_CD, *heads], grad_CO)
            of_head = [new if not grads else old + new for old, new in zip(of_head, more_of_head, strict=True)]
            grads.append(grad)
    total = sum(map(float, losses))  # only here, so that a chip that computes by itself is not waited for before
    return Judged(total, sums, output, torch.cat(grads) if passes_on else None, list(zip(heads, of_head, strict=True)))
