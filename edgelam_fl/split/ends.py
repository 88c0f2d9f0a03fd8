"""A device's own layers in a round: the front before its hosts, the back after them, and the loss.

Knows micro-batches and gradients; knows no links. Neighbour: `split.driver` sends what the front makes, and brings what the
back needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch

from edgelam_fl.model.chip import off
from edgelam_fl.model.stage import Stage
from edgelam_fl.plan.modes import label_place
from edgelam_fl.plan.reading import unit_seed
from edgelam_fl.split.cut import CutDefence
from edgelam_fl.split.fronts import NamedFronts
from edgelam_fl.split.loss import judged
from edgelam_fl.tasks.base import Task, Unit
from edgelam_fl.wire import edgelam_pb2 as pb


class Ends:
    """The front and the back of one device; one and the same stage on a route over no host."""

    def __init__(
        self,
        plan: pb.Plan,
        stages: Sequence[Stage],
        task: Task,
        hidden_size: int,
        wire: torch.dtype,
        cut: CutDefence,
        fronts: NamedFronts | None = None,
    ) -> None:
        """`wire`: what hidden states travel in. `cut`: what happens to them before they leave. `fronts`: names the states of
        each example, which is then computed alone; None: a micro-batch's are computed together.
        """
        self._plan, self._task, self._cut, self.fronts = plan, task, cut, fronts
        self.hidden_size, self.wire = hidden_size, wire
        self._front, self._back = stages[0], stages[-1]
        own = plan.routes[0]
        self._is_split = bool(own.hops)
        self.has_labels = label_place(plan.labels).on_device
        front_trains = any(parameter.requires_grad for parameter in self._front.parameters())
        self._gradient_needed = self._is_split and (front_trains or plan.lora.train_hosts or plan.HasField("lowrank"))
        # Noise on gradients hides which positions have labels, and would hide nothing if the device named them.
        by_position = self.has_labels and self._back.span.first == self._back.span.last
        self._names_positions = self._is_split and by_position and not plan.cut.clip

    def asking(self, task: Task) -> Ends:
        """Returns the same ends before the loss of another task, for micro-batches that are measured and never kept at a host."""
        other = copy(self)
        other._task, other.fronts = task, None
        return other

    def forward_front(self, unit: Unit, step: int, number: int, *, training: bool) -> torch.Tensor:
        """Returns the hidden states [rows, tokens, hidden] of a micro-batch for the first host."""
        seed = self._seed(step, number) if training else None
        states = self._front(unit.inputs, unit.row_lengths, unit_seed=seed, segments=unit.segments)
        return self._cut.states(off(states), unit.row_lengths).to(self.wire)

    @torch.no_grad()
    def rows_of_front(self, unit: Unit, rows: Sequence[int]) -> torch.Tensor:
        """Returns the hidden states [1, N, hidden] of some rows for the first host, each computed alone, without padding."""
        lengths = unit.row_lengths
        each = [self._front(unit.inputs[row : row + 1, : lengths[row]], [lengths[row]]) for row in rows]
        return off(torch.cat(each, dim=1)).to(self.wire)

    def backward_front(self, unit: Unit, sent: torch.Tensor, grad: torch.Tensor, divisor: int) -> None:
        """Adds to the front's gradients. `sent`: what `forward_front` returned. `grad`: its gradient, from the first host."""
        sent.backward(self._cut.disguising(unit, sent, grad, divisor))

    def positions(self, unit: Unit) -> torch.Tensor | None:
        """Returns the positions [N] of a micro-batch whose states the back needs, row * tokens + place; None: all.

        A back without layers computes each position alone, and only what carries loss counts.
        """
        rows_N = self._task.loss_rows(unit.labels) if self._names_positions else None
        return rows_N if rows_N is not None and len(rows_N) else None

    def evaluate(self, unit: Unit, inputs: torch.Tensor) -> tuple[float, dict[str, float]]:
        """Returns a micro-batch's loss sum and its sums of other metrics. `inputs`: as of `train`."""
        found = judged(self._task, self._back, self._forward_back(unit, inputs, None), unit.labels)
        return found.loss, found.sums

    def train(
        self, unit: Unit, inputs: torch.Tensor, step: int, number: int, divisor: int
    ) -> tuple[float, torch.Tensor | None]:
        """Adds to the back's gradients; returns the loss sum and the gradient for the last host, None if none is needed.

        `inputs`: the last host's hidden states, those at `positions` as one row, with the values of the cut adapter beside
        them if the run has one, which are then all that the gradient is of; on a route over no host, token ids. `divisor`:
        labels of all devices in the turn, by which the loss is divided.
        """
        if self._gradient_needed:
            inputs.requires_grad_(True)
        output = self._forward_back(unit, inputs, self._seed(step, number))
        found = judged(self._task, self._back, output, unit.labels, divisor)
        if found.output.requires_grad:
            found.output.backward(found.grad)
        for parameter, of_head in found.of_head:
            parameter.grad = of_head if parameter.grad is None else parameter.grad + of_head
        grad, rank = inputs.grad, self._plan.lowrank.rank
        if grad is not None and rank:
            grad = grad[..., -rank:].contiguous()
        return found.loss, None if grad is None else self._cut.gradient(grad, unit.row_lengths)

    def _forward_back(self, unit: Unit, inputs: torch.Tensor, seed: int | None) -> torch.Tensor:
        inputs = inputs.to(self._back.dtype) if self._is_split else inputs
        if self.positions(unit) is None:
            rows = self._task.loss_rows(unit.labels)
            return self._back(inputs, unit.row_lengths, unit_seed=seed, rows=rows, segments=unit.segments)
        each_N1D = inputs.transpose(0, 1)
        count = len(each_N1D)
        return self._back(each_N1D, [1] * count, unit_seed=seed, rows=torch.arange(count))

    def _seed(self, step: int, number: int) -> int | None:
        return unit_seed(self._plan, self._plan.routes[0].device, step, number)
