"""The device's end of a route: its batches through front, hosts and back, forward and backward, step by step.

Knows tokens and losses; knows links only as something to send to. One activation's way: this file -> wire.link ->
wire.grpc_link -> split.daemon (lets the link in) -> split.host, and back.

    micro-batch u:   front forward --ACT--> hosts --ACT--> back forward, loss, back backward
                     front backward <--GRAD-- hosts <--GRAD--'
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from edgelam_fl.errors import PeerLost, ProtocolError
from edgelam_fl.model.stage import Stage
from edgelam_fl.split.job import Inbox, Lost
from edgelam_fl.tasks.base import Example, Unit
from edgelam_fl.tasks.causal_lm import loss_sum, make_units
from edgelam_fl.tasks.data import batch_indices
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.link import Frame, Link


@dataclass
class Route:
    """The links of one device and the inbox behind them. Both links are None on a route over no host."""

    inbox: Inbox
    entry: Link | None = None
    exit: Link | None = None


@dataclass
class Measured:
    """What a driver's phases came to."""

    eval_loss_sum: float = 0.0
    eval_labels: int = 0
    eval_seconds: float = 0.0
    train_seconds: float = 0.0
    compute_seconds: float = 0.0
    tokens_trained: int = 0
    labels_trained: int = 0
    steps: list[pb.StepReport] = field(default_factory=list)


class LeftOut(Exception):
    """The step was closed without this device."""


class Driver:
    """One device's part in one round."""

    def __init__(
        self,
        plan: pb.Plan,
        stages: list[Stage],
        optimizer: torch.optim.Optimizer | None,
        route: Route,
        emit: Callable[..., None],
    ) -> None:
        self.plan = plan
        self.route = route
        self.front, self.back = stages[0], stages[-1]  # one and the same on a route over no host
        self.optimizer = optimizer
        self.parameters = [p for stage in stages for p in stage.parameters() if p.requires_grad]
        self.emit = emit
        self.measured = Measured()
        hops = plan.routes[0].hops
        self._front_trains = any(p.requires_grad for p in self.front.parameters())
        self._grad_below = self._front_trains or bool(hops and plan.lora.train_hosts)
        self._own_share = 1.0  # N_s / n_k,s: own layers learn from the local mean
        self._gradients_due = 0  # micro-batches of the open step whose gradient was not sent yet
        self._closed_step = -1  # the newest that the coordinator closed with this device counted

    # ---------------------------------------------------------------- phases

    @torch.no_grad()
    def evaluate(self, examples: list[Example]) -> None:
        """Loss sum and label count over the held-out examples, with the adapter as it is."""
        began = time.monotonic()
        rows = -(-self.plan.batch_size // self.plan.micro_batches)
        units = make_units(examples, -(-len(examples) // rows))
        losses = self._run(units, pb.EVAL, 0, self._evaluate_unit)
        self.measured.eval_loss_sum = sum(losses)
        self.measured.eval_labels = sum(unit.count for unit in units)
        self.measured.eval_seconds = time.monotonic() - began
        self.emit(
            "evaluated", loss_sum=self.measured.eval_loss_sum, labels=self.measured.eval_labels,
            seconds=round(self.measured.eval_seconds, 3),
        )  # fmt: skip

    def train(self, examples: list[Example]) -> None:
        """`plan.steps` optimizer steps."""
        batches = [self._batch(examples, step) for step in range(self.plan.steps)]
        union_labels = self._agree_on_labels(batches)
        began = time.monotonic()
        for step, units in enumerate(batches):
            self._train_step(step, units, union_labels[step])
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
        index = self.plan.optimizer.step_offset + step
        chosen = batch_indices(len(examples), self.plan.batch_size, index, self.plan.seed, self.plan.node)
        return make_units([examples[number] for number in chosen], self.plan.micro_batches)

    def _agree_on_labels(self, batches: list[list[Unit]]) -> list[int]:
        """N_s of every step: the union's label counts, told by the coordinator; this device's own without hosts."""
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
                return totals

    def _train_step(self, step: int, units: list[Unit], union_labels: int) -> None:
        began = time.monotonic()
        labels = sum(unit.count for unit in units)
        self._own_share = union_labels / labels
        self._gradients_due = len(units)
        reason = ""
        losses: list[float] = []
        try:
            losses = self._run(units, pb.TRAIN, step, lambda unit, hidden: self._train_unit(unit, hidden, union_labels))
            self._await_close(step)
        except LeftOut as error:
            reason = str(error)
        else:
            self._apply()
            self.measured.labels_trained += labels
            self.measured.tokens_trained += sum(sum(unit.row_lengths) for unit in units)
        for parameter in self.parameters:
            parameter.grad = None
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

    def _apply(self) -> None:
        if self.optimizer is None:
            return
        if self._own_share != 1.0:
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(self._own_share)
        self.optimizer.step()

    # ---------------------------------------------------------------- micro-batches

    def _run(
        self, units: list[Unit], phase: pb.Phase, step: int, finish: Callable[[Unit, torch.Tensor], Any]
    ) -> list[float]:
        """All units of a step through the route, at most `window` of them in flight; returns their loss sums.

        `finish` is the back's part: hidden states in, loss sum and (training) the gradient for the hosts out.
        """
        if self.route.entry is None:
            return [self._whole(unit, finish) for unit in units]
        waiting = deque(enumerate(units))
        open_units: dict[int, torch.Tensor] = {}  # front outputs, until their gradient is back
        losses = [0.0] * len(units)
        while waiting or open_units:
            if waiting and len(open_units) < self.plan.window and self.route.inbox.empty():
                number, unit = waiting.popleft()
                open_units[number] = self._forward_front(unit, phase, step, number)
                continue
            header, tensor = self._next_unit(phase, step, open_units)
            if header.kind == pb.ACT:
                losses[header.micro_batch], grad = self._timed(finish, units[header.micro_batch], tensor)
                if phase == pb.EVAL:
                    del open_units[header.micro_batch]
                else:
                    self._send_back(step, header.micro_batch, grad)
            else:
                hidden = open_units.pop(header.micro_batch)
                if header.kind == pb.GRAD:
                    self._timed(hidden.backward, _shaped(tensor, hidden))
        return losses

    def _whole(self, unit: Unit, finish: Callable[[Unit, torch.Tensor], Any]) -> float:
        return self._timed(finish, unit, unit.ids_BT)[0]

    def _forward_front(self, unit: Unit, phase: pb.Phase, step: int, number: int) -> torch.Tensor:
        hidden = self._timed(self.front, unit.ids_BT, unit.row_lengths)
        assert self.route.entry is not None
        header = pb.Header(kind=pb.ACT, phase=phase, step=step, micro_batch=number, row_lengths=unit.row_lengths)
        header.device_index = self.plan.routes[0].device_index
        self.route.entry.send(header, hidden)
        return hidden

    def _evaluate_unit(self, unit: Unit, inputs: torch.Tensor) -> tuple[float, None]:
        return float(loss_sum(self.back(inputs, unit.row_lengths), unit.labels)), None

    def _train_unit(self, unit: Unit, inputs: torch.Tensor, union_labels: int) -> tuple[float, torch.Tensor | None]:
        """Loss sum, and the gradient of (loss sum / N_s) for the hidden states that came in."""
        if self.route.exit is not None and self._grad_below:
            inputs.requires_grad_(True)
        loss = loss_sum(self.back(inputs, unit.row_lengths), unit.labels)
        if loss.requires_grad:
            (loss / union_labels).backward()
        return float(loss.detach()), inputs.grad

    def _send_back(self, step: int, number: int, grad: torch.Tensor | None) -> None:
        header = pb.Header(
            kind=pb.GRAD if grad is not None else pb.GRAD_END, phase=pb.TRAIN, step=step, micro_batch=number
        )
        header.device_index = self.plan.routes[0].device_index
        assert self.route.exit is not None
        self.route.exit.send(header, grad)
        self._gradients_due -= 1

    # ---------------------------------------------------------------- waiting

    def _next_unit(
        self, phase: pb.Phase, step: int, open_units: dict[int, torch.Tensor]
    ) -> tuple[pb.Header, torch.Tensor | None]:
        """The next ACT, GRAD or GRAD_END of this step. Frames of a step that was closed without us are dropped."""
        while True:
            frame = self._next(2 * self.plan.deadlines.step_s)
            header = frame.header
            if header.kind == pb.STEP_CLOSE and header.step == step:
                # It comes by the exit link and may overtake the entry link's last GRAD, which is still waited for.
                self._read_close(frame)
                if self._gradients_due:
                    raise ProtocolError(f"step {step} was closed with this device before its gradients were sent")
                self._closed_step = step
            if header.kind not in (pb.ACT, pb.GRAD, pb.GRAD_END) or (header.phase, header.step) != (phase, step):
                continue
            if header.micro_batch not in open_units or (header.kind != pb.GRAD_END and frame.tensor is None):
                raise ProtocolError(
                    f"{pb.Kind.Name(header.kind)} for micro-batch {header.micro_batch}, which is not open"
                )
            if header.kind == pb.ACT:
                return header, _shaped(frame.tensor, open_units[header.micro_batch])
            return header, frame.tensor

    def _await_close(self, step: int) -> None:
        if self.route.exit is None or self._closed_step == step:
            return
        while True:
            frame = self._next(2 * self.plan.deadlines.step_s)  # the coordinator itself waits step_s for the others
            if frame.header.kind == pb.STEP_CLOSE and frame.header.step == step:
                self._read_close(frame)
                return

    def _read_close(self, frame: Frame) -> None:
        index = self.plan.routes[0].device_index
        if index not in frame.header.step_close.counted:
            reasons = [left.reason for left in frame.header.step_close.left_out if left.device_index == index]
            raise LeftOut(reasons[0] if reasons else "left out")

    def _next(self, timeout_s: float) -> Frame:
        arrival = self.route.inbox.get(timeout_s)
        if arrival is None:
            raise PeerLost(f"nothing came from the hosts for {timeout_s:.0f} s (federation.step_deadline_s)")
        link, item = arrival
        if isinstance(item, Lost):
            raise PeerLost(f"link {link.name}: {item.reason}")
        if item.header.kind == pb.CANCEL:
            raise PeerLost(f"{link.name} ended the job: {item.header.cancel.reason}")
        return item

    def _timed(self, work: Callable[..., Any], *arguments: Any) -> Any:
        began = time.monotonic()
        result = work(*arguments)
        self.measured.compute_seconds += time.monotonic() - began
        return result


def _shaped(tensor: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    if tensor is None or tensor.shape != like.shape or tensor.dtype != like.dtype:
        got = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
        raise ProtocolError(f"expected a tensor of {like.dtype} {list(like.shape)}, got {got}")
    return tensor
