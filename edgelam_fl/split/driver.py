"""The device's end of a route: its batches through front, hosts and back, forward and backward, step by step.

Knows batches and losses; knows links only as something to send to. One activation's way: this file -> wire.link ->
wire.grpc -> split.group (lets the link in) -> split.host, and back.

    micro-batch u:   front forward --ACT--> hosts --ACT--> back forward, loss, back backward
                     front backward <--GRAD-- hosts <--GRAD--'

With `labels = "last-stage"` the last host has the back: the unit's labels go there, its loss comes back.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from edgelam_fl.errors import ProtocolError
from edgelam_fl.model.stage import Stage
from edgelam_fl.plan.modes import host_mode, label_place
from edgelam_fl.plan.reading import unit_seed
from edgelam_fl.split.route import Route
from edgelam_fl.split.timeline import Timeline
from edgelam_fl.split.trainee import Trainee, judge
from edgelam_fl.tasks.base import Example, Task, Unit
from edgelam_fl.tasks.data import batch_indices
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.link import Frame

_GRADIENTS = {pb.GRAD, pb.GRAD_END}  # one or the other ends a unit


@dataclass
class Measured:
    """What a driver's phases came to."""

    eval_loss_sum: float = 0.0
    eval_labels: int = 0
    eval_sums: dict[str, float] = field(default_factory=dict)  # of other metrics
    eval_seconds: float = 0.0
    train_seconds: float = 0.0
    compute_seconds: float = 0.0
    tokens_trained: int = 0
    labels_trained: int = 0
    steps: list[pb.StepReport] = field(default_factory=list)


class LeftOut(Exception):
    """The step was closed without this device."""


@dataclass
class _Open:
    """A micro-batch on its way."""

    hidden: torch.Tensor  # the front's output, until its gradient is back
    waits_for: set[int]  # kinds of frames that are still to come


class Driver:
    """One device's part in one round."""

    def __init__(
        self,
        plan: pb.Plan,
        stages: list[Stage],
        trainee: Trainee,
        route: Route,
        task: Task,
        wire: torch.dtype,
        emit: Callable[..., None],
    ) -> None:
        self.plan, self.route, self.trainee, self.task, self.wire, self.emit = plan, route, trainee, task, wire, emit
        self.front, self.back = stages[0], stages[-1]  # one and the same on a route over no host
        self.measured = Measured()
        self.timeline = Timeline("device")
        own = plan.routes[0]
        self._index, self._device = own.device_index, own.device
        self._front_trains = any(p.requires_grad for p in self.front.parameters())
        self._grad_below = self._front_trains or bool(own.hops and plan.lora.train_hosts)
        self._keeps_labels = label_place(plan.labels).on_device
        self._mode = host_mode(plan.host_mode)
        self._gradients_due = 0  # micro-batches of the open step whose gradient was not sent yet
        self._closed_step = -1  # the newest that the coordinator closed with this device counted
        self._patience_s = self._mode.patience_s(plan.deadlines)

    # ---------------------------------------------------------------- phases

    @torch.no_grad()
    def evaluate(self, examples: list[Example]) -> None:
        """Loss sum and label count over the held-out examples, with the adapter as it is."""
        began = time.monotonic()
        rows = -(-self.plan.batch_size // self.plan.micro_batches)
        units = self.task.units(examples, -(-len(examples) // rows))
        losses = self._run(units, pb.EVAL, 0, self._evaluate_unit)
        self.measured.eval_loss_sum = sum(losses)
        self.measured.eval_labels = sum(unit.count for unit in units)
        self.measured.eval_seconds = time.monotonic() - began
        self.emit(
            "evaluated", loss_sum=self.measured.eval_loss_sum, labels=self.measured.eval_labels,
            seconds=round(self.measured.eval_seconds, 3),
        )  # fmt: skip

    def train(self, examples: list[Example]) -> None:
        """`plan.steps` optimizer steps; those beyond `own_steps` are the others'."""
        batches = [self._batch(examples, step) for step in range(self.plan.steps)]
        divisors = self._agree_on_labels(batches)
        began = time.monotonic()
        self.timeline.open()
        for step, units in enumerate(batches):
            if units:
                self._train_step(step, units, divisors[step])
        self.measured.train_seconds = time.monotonic() - began

    def finish(self) -> None:
        """Tells the hosts that nothing more comes, and closes the links."""
        for link in (self.route.exit, self.route.entry):
            if link is not None:
                done = pb.Done(
                    loss_sum=sum(s.loss_sum for s in self.measured.steps), labels=self.measured.labels_trained
                )
                link.send(pb.Header(kind=pb.DONE, done=done))
                link.close()

    def _batch(self, examples: list[Example], step: int) -> list[Unit]:
        if step >= self.plan.own_steps:
            return []
        chosen = batch_indices(
            len(examples), self.plan.batch_size, self.plan.cursor + step, self.plan.seed, self.plan.node
        )
        return self.task.units([examples[number] for number in chosen], self.plan.micro_batches)

    def _agree_on_labels(self, batches: list[list[Unit]]) -> list[int]:
        """What each step's losses are divided by: the union's labels in joint mode, told by the coordinator; else its own."""
        own = [sum(unit.count for unit in units) for units in batches]
        if self.route.exit is None:
            return own
        rows = [
            pb.StepRow(labels=n, rows=[len(u.row_lengths) for u in units], tokens=[u.ids_BT.shape[1] for u in units])
            for n, units in zip(own, batches, strict=True)
        ]
        self.route.exit.send(pb.Header(kind=pb.TABLE, phase=pb.TRAIN, table=pb.Table(steps=rows)))
        while True:
            frame = self._next(self.plan.deadlines.round_s)
            if frame.header.kind == pb.TABLE_ALL:
                totals = [total.labels for total in frame.header.table_all.steps]
                if len(totals) != len(own) or any(total < n for total, n in zip(totals, own, strict=True)):
                    raise ProtocolError(
                        f"TABLE_ALL counts {totals[:3]}... labels a step; this device alone has {own[:3]}..."
                    )
                return [self._mode.divisor(total, n) for total, n in zip(totals, own, strict=True)]

    def _train_step(self, step: int, units: list[Unit], divisor: int) -> None:
        began = time.monotonic()
        labels = sum(unit.count for unit in units)
        self._gradients_due = len(units) if self._keeps_labels else 0
        reason = ""
        losses: list[float] = []
        try:
            losses = self._run(
                units, pb.TRAIN, step, lambda unit, hidden, seed: self._train_unit(unit, hidden, seed, divisor)
            )
            self._await_close(step)
            self._apply(step, divisor / labels)
        except LeftOut as error:
            reason = str(error)
        else:
            self.measured.labels_trained += labels
            self.measured.tokens_trained += sum(sum(unit.row_lengths) for unit in units)
        self.trainee.clear()
        report = pb.StepReport(
            step=step,
            loss_sum=sum(losses),
            labels=labels,
            seconds=time.monotonic() - began,
            counted=not reason,
            reason=reason,
        )
        self.measured.steps.append(report)
        self.emit("step", step=step, loss=report.loss_sum / labels, labels=labels, seconds=round(report.seconds, 3))

    def _apply(self, step: int, own_share: float) -> None:
        """`own_share`: N_s / n_k,s, because own layers learn from the local mean."""
        if own_share != 1.0:
            for parameter in self.trainee.parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(own_share)
        scale = 1.0
        if self.plan.optimizer.clip == "global":
            verdict = self._agree_on_scale(step)
            if verdict.skip:
                return
            scale = verdict.scale
        with self.timeline.interval("step", pb.Header(step=step)):
            self.trainee.step(step, scale)

    def _agree_on_scale(self, step: int) -> pb.StepApply:
        """clip = "global": this stage's part of the norm to the coordinator, which answers with everyone's scale."""
        own = self.trainee.squared_norm()
        if self.route.exit is None:
            return judge([own], self.plan.optimizer.max_norm)
        self.route.exit.send(
            pb.Header(kind=pb.STEP_READY, phase=pb.TRAIN, step=step, device_index=self._index, step_ready=own)
        )
        while True:
            header = self._next(self._patience_s).header
            if header.kind == pb.STEP_APPLY and self._concerns(header, step):
                return header.step_apply

    # ---------------------------------------------------------------- micro-batches

    def _run(
        self,
        units: list[Unit],
        phase: pb.Phase,
        step: int,
        finish: Callable[[Unit, torch.Tensor, int | None], tuple[float, torch.Tensor | None]],
    ) -> list[float]:
        """All units of a step through the route, at most `window` of them in flight; returns their loss sums.

        `finish` is the back's part: hidden states and dropout seed in, loss sum and the gradient for the hosts out.
        """
        seeds = [unit_seed(self.plan, self._device, step, n) if phase == pb.TRAIN else None for n in range(len(units))]
        if self.route.entry is None:
            return [
                self._timed("forward", pb.Header(step=step, micro_batch=n), finish, unit, unit.ids_BT, seeds[n])[0]
                for n, unit in enumerate(units)
            ]
        waiting = deque(enumerate(units))
        open_units: dict[int, _Open] = {}
        losses = [0.0] * len(units)
        while waiting or open_units:
            # What lies in the inbox may be about others alone: with nothing in flight there is nothing to wait for.
            if waiting and len(open_units) < self.route.window and (not open_units or self.route.inbox.empty()):
                number, unit = waiting.popleft()
                open_units[number] = self._send_forward(unit, phase, step, number, seeds[number])
                continue
            header, tensor = self._next_unit(phase, step, open_units)
            number = header.micro_batch
            unit, state = units[number], open_units[number]
            if header.kind == pb.ACT:
                hidden = _shaped(tensor, state.hidden)
                losses[number], grad = self._timed("forward", header, finish, unit, hidden, seeds[number])
                if phase == pb.TRAIN:
                    self._send_back(step, number, grad)
            elif header.kind == pb.LABELS:
                losses[number] = header.loss_sum
                if phase == pb.EVAL:
                    self._add_sums(dict(header.sums))
            elif header.kind == pb.GRAD:
                self._timed("backward", header, state.hidden.backward, _shaped(tensor, state.hidden))
            state.waits_for -= _GRADIENTS if header.kind in _GRADIENTS else {header.kind}
            if not state.waits_for:
                del open_units[number]
        return losses

    def _send_forward(self, unit: Unit, phase: pb.Phase, step: int, number: int, seed: int | None) -> _Open:
        assert self.route.entry is not None
        assert self.route.exit is not None
        fields: dict[str, Any] = {"phase": phase, "step": step, "micro_batch": number, "device_index": self._index}
        if not self._keeps_labels:
            self.route.exit.send(pb.Header(kind=pb.LABELS, **fields), unit.labels)
        header = pb.Header(kind=pb.ACT, row_lengths=unit.row_lengths, **fields)
        hidden = self._timed("forward", header, self._front_of, unit, seed)
        self.route.entry.send(header, hidden)
        answer = pb.ACT if self._keeps_labels else pb.LABELS
        return _Open(hidden, {answer, *_GRADIENTS} if phase == pb.TRAIN else {answer})

    def _front_of(self, unit: Unit, seed: int | None) -> torch.Tensor:
        return self.front(unit.ids_BT, unit.row_lengths, unit_seed=seed).to(self.wire)

    def _evaluate_unit(self, unit: Unit, inputs: torch.Tensor, _: int | None) -> tuple[float, None]:
        loss, sums = self.task.loss(self._back_of(unit, inputs, None), unit.labels)
        self._add_sums(sums)
        return float(loss), None

    def _train_unit(
        self, unit: Unit, inputs: torch.Tensor, seed: int | None, divisor: int
    ) -> tuple[float, torch.Tensor | None]:
        """Loss sum, and the gradient of (loss sum / N_s) for the hidden states that came in."""
        if self.route.exit is not None and self._grad_below:
            inputs.requires_grad_(True)
        loss, _ = self.task.loss(self._back_of(unit, inputs, seed), unit.labels)
        if loss.requires_grad:
            (loss / divisor).backward()
        return float(loss.detach()), inputs.grad

    def _back_of(self, unit: Unit, inputs: torch.Tensor, seed: int | None) -> torch.Tensor:
        inputs = inputs if self.route.exit is None else inputs.to(self.back.dtype)
        return self.back(inputs, unit.row_lengths, unit_seed=seed)

    def _add_sums(self, sums: dict[str, float]) -> None:
        for name, value in sums.items():
            self.measured.eval_sums[name] = self.measured.eval_sums.get(name, 0.0) + value

    def _send_back(self, step: int, number: int, grad: torch.Tensor | None) -> None:
        header = pb.Header(
            kind=pb.GRAD if grad is not None else pb.GRAD_END, phase=pb.TRAIN, step=step, micro_batch=number
        )
        header.device_index = self._index
        assert self.route.exit is not None
        self.route.exit.send(header, grad)
        self._gradients_due -= 1

    # ---------------------------------------------------------------- waiting

    def _next_unit(
        self, phase: pb.Phase, step: int, open_units: dict[int, _Open]
    ) -> tuple[pb.Header, torch.Tensor | None]:
        """The next frame of an open unit of this step. Frames of a step that was closed without us are dropped."""
        while True:
            frame = self._next(self._patience_s)
            header = frame.header
            if header.kind == pb.STEP_CLOSE and self._concerns(header, step):
                # It comes by the exit link and may overtake the entry link's last GRAD, which is still waited for.
                self._read_close(frame)
                if self._gradients_due:
                    raise ProtocolError(f"step {step} was closed with this device before its gradients were sent")
                self._closed_step = step
            units = pb.ACT, pb.GRAD, pb.GRAD_END, pb.LABELS
            if header.kind not in units or (header.phase, header.step) != (phase, step):
                continue
            state = open_units.get(header.micro_batch)
            empty = frame.tensor is None and header.kind in (pb.ACT, pb.GRAD)
            if state is None or header.kind not in state.waits_for or empty:
                raise ProtocolError(
                    f"{pb.Kind.Name(header.kind)} for micro-batch {header.micro_batch}, which does not wait for it"
                )
            return header, frame.tensor

    def _concerns(self, header: pb.Header, step: int) -> bool:
        """Returns whether a close or its verdict is about this device's turn of a step."""
        turn_index = self._mode.turn_index
        return header.step == step and turn_index(header.device_index) == turn_index(self._index)

    def _await_close(self, step: int) -> None:
        if self.route.exit is None or self._closed_step == step:
            return
        while True:
            frame = self._next(self._patience_s)
            if frame.header.kind == pb.STEP_CLOSE and self._concerns(frame.header, step):
                self._read_close(frame)
                return

    def _read_close(self, frame: Frame) -> None:
        if self._index not in frame.header.step_close.counted:
            reasons = [left.reason for left in frame.header.step_close.left_out if left.device_index == self._index]
            raise LeftOut(reasons[0] if reasons else "left out")

    def _next(self, timeout_s: float) -> Frame:
        return self.route.next(timeout_s, "federation.step_deadline_s")

    def _timed(self, kind: str, header: pb.Header, work: Callable[..., Any], *arguments: Any) -> Any:
        began = time.monotonic()
        with self.timeline.interval(kind, header):
            result = work(*arguments)
        self.measured.compute_seconds += time.monotonic() - began
        return result


def _shaped(tensor: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    if tensor is None or tensor.shape != like.shape or tensor.dtype != like.dtype:
        got = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
        raise ProtocolError(f"expected a tensor of {like.dtype} {list(like.shape)}, got {got}")
    return tensor
