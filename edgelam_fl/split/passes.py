"""The passes of one micro-batch through a host's layers: forward, loss, backward.

Tensors and numbers in, tensors and numbers out: they change nothing that two of them share, so any thread may compute them, one
beside another. Knows neither devices nor links. Neighbour: `split.host` decides which are due, and what their results mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch

from edgelam_fl.errors import ProtocolError
from edgelam_fl.model.chip import off
from edgelam_fl.model.stage import AdapterSet, Stage
from edgelam_fl.split.judging import is_finite
from edgelam_fl.split.loss import judged
from edgelam_fl.tasks.base import Task
from edgelam_fl.tasks.causal_lm import IGNORED


@dataclass(frozen=True, eq=False)
class Crossing:
    """A micro-batch at a host: its hidden states, and how they cross the layers."""

    inputs: torch.Tensor  # hidden states [rows, tokens, hidden]; require a gradient if something before them learns
    row_lengths: list[int]
    layers: tuple[int, int]
    adapter: AdapterSet
    seed: int | None  # of dropout; None: it is off
    training: bool
    positions: list[int]  # row * tokens + place of the outputs that are asked for; empty: all
    timed: Callable[[str], AbstractContextManager[None]]  # notes the block as an interval of this kind
    segments: Sequence[Sequence[int]] = ()  # of packed rows, as of `Stage.forward`

    def through(self, view: Stage, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Returns what the layers make of the inputs, where it is asked for. `rows`: as of `Stage.forward`."""
        view.use(self.adapter)
        inputs = self.inputs.to(view.dtype)
        output = view(
            inputs, self.row_lengths, layers=self.layers, unit_seed=self.seed, rows=rows, segments=self.segments
        )
        return at_positions(output, self.positions) if self.positions else output


@dataclass(frozen=True, eq=False)
class Forwarded:
    """The result of a forward pass."""

    output: torch.Tensor
    is_finite: bool
    view: Stage  # that it was computed on


@dataclass(frozen=True, eq=False)
class Gradients:
    """The result of a backward pass. `found` is empty if nothing here learns, nor anything before."""

    found: list[torch.Tensor | None]  # by parameter of the adapter
    of_inputs: torch.Tensor | None  # None: nothing before needs it
    is_finite: bool  # of the inputs


@dataclass(frozen=True, eq=False)
class Learned:
    """The loss of a micro-batch at a last stage, and its gradients; None in evaluation, and if the loss is not finite."""

    loss_sum: float
    sums: dict[str, float]
    gradients: Gradients | None


def forward(view: Stage, crossing: Crossing, wire: torch.dtype) -> Forwarded:
    """Takes a micro-batch through the layers. `wire`: what hidden states travel in."""
    with torch.set_grad_enabled(crossing.training), crossing.timed("forward"):
        output = off(crossing.through(view).to(wire))
    return Forwarded(output, not crossing.training or is_finite(output), view)


def forward_to_loss(
    view: Stage,
    crossing: Crossing,
    task: Task,
    labels: torch.Tensor,
    divisor: int,
    parameters: Sequence[torch.Tensor],
) -> Learned:
    """Takes a micro-batch through the layers, the head and the loss, and in training back. `divisor`: of the loss.

    Raises ProtocolError if the labels do not fit the inputs.
    """
    check_targets(labels, crossing.inputs, view)
    with torch.set_grad_enabled(crossing.training), crossing.timed("forward"):
        output = crossing.through(view, task.loss_rows(labels))
        found = judged(task, view, output, labels, divisor if crossing.training else None)
    if not crossing.training or not math.isfinite(found.loss):
        return Learned(found.loss, found.sums, None)
    gradients = backward(view, crossing, found.output if found.output.requires_grad else None, found.grad, parameters)
    return Learned(found.loss, found.sums, with_head(gradients, parameters, found.of_head))


def with_head(
    gradients: Gradients, parameters: Sequence[torch.Tensor], of_head: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> Gradients:
    """Returns the gradients with those of a head that learns, which the backward pass through the layers does not reach."""
    if not of_head:
        return gradients
    heads = {id(parameter): gradient for parameter, gradient in of_head}
    found = gradients.found or [None] * len(parameters)
    joined = [heads.get(id(parameter), known) for parameter, known in zip(parameters, found, strict=True)]
    return replace(gradients, found=joined)


def backward(
    _: Stage,
    crossing: Crossing,
    output: torch.Tensor | None,
    grad: torch.Tensor | None,
    parameters: Sequence[torch.Tensor],
) -> Gradients:
    """Returns the gradients of the adapter and of the inputs. `output`: None if nothing that comes later on the route trains."""
    inputs = crossing.inputs
    wanted = [*([inputs] if inputs.requires_grad else []), *parameters]
    if not wanted or output is None:
        return Gradients([], None, True)
    with crossing.timed("backward"):
        found: list[torch.Tensor | None] = list(torch.autograd.grad(output, wanted, grad, allow_unused=True))
    of_inputs = found.pop(0) if inputs.requires_grad else None
    return Gradients(found, of_inputs, of_inputs is None or is_finite(of_inputs))


def at_positions(states_BTD: torch.Tensor, positions: list[int]) -> torch.Tensor:
    """Returns the states at some positions, row * tokens + place, as one row [1, N, D]."""
    return states_BTD.flatten(0, 1)[torch.tensor(positions, device=states_BTD.device)][None]


def check_targets(labels: torch.Tensor, inputs: torch.Tensor, stage: Stage) -> None:
    """Raises ProtocolError if labels are not those of `inputs` [rows, tokens, hidden], one per token or, in classification, row."""
    every_row = stage.family.task_head is not None  # has a label, in classification
    expected = inputs.shape[:1] if every_row else inputs.shape[:2]
    if labels.shape != expected:
        raise ProtocolError(f"labels of shape {list(labels.shape)} for outputs of shape {list(expected)}")
    labelled = labels[labels != IGNORED]
    least, most = (bound.item() for bound in labelled.aminmax()) if labelled.numel() else (0, 0)
    if least < 0 or most >= stage.outputs or (every_row and len(labelled) < len(labels)):
        raise ProtocolError(
            f"labels from {least} to {most}, {len(labelled)} of them; there are {stage.outputs} outputs"
        )
