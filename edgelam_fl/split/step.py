"""One step of a device: its micro-batches through its own layers and its hosts, at most a window's worth at a time.

    front forward --ACT--> hosts --ACT--> back forward, loss, back backward
    front backward <--GRAD-- hosts <--GRAD--'

With `labels = "last-stage"` the last host has the back: the labels go there, the loss comes back. Knows links only as
something to send to, and layers only through `split.ends`; knows no optimizer (`split.driver` has it). An activation goes
from here to `wire.link`, and on to `split.host` at the other end.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from edgelam_fl.errors import ProtocolError
from edgelam_fl.plan.modes import host_mode
from edgelam_fl.split.ends import Ends
from edgelam_fl.split.fronts import NamedFronts
from edgelam_fl.split.judging import is_finite
from edgelam_fl.split.route import Route
from edgelam_fl.split.timeline import Timeline
from edgelam_fl.split.trainee import check_verdict
from edgelam_fl.tasks.base import Unit
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.link import Frame

_GRADIENTS = {pb.GRAD, pb.GRAD_END}  # one or the other ends a micro-batch


class LeftOut(Exception):
    """The coordinator closed the step without this device."""


@dataclass
class _Way:
    """A micro-batch under way."""

    header: pb.Header  # of the hidden states, as they were sent
    hidden: torch.Tensor | None  # the front's output; None: it does not learn, and has gone
    returns: list[int]  # shape of what the last host sends back
    waits_for: set[int]  # kinds of frames that are still to come

    def takes(self, kind: int) -> bool:
        """Returns whether a frame of a kind may come now."""
        return kind in self.waits_for or (kind == pb.MISSING and len(self.header.kept_rows) > 0)


class DeviceStep:
    """The micro-batches of one step: those that wait, those under way, and what came back."""

    def __init__(
        self,
        plan: pb.Plan,
        ends: Ends,
        route: Route,
        timeline: Timeline,
        units: Sequence[Unit],
        *,
        phase: pb.Phase,
        number: int = 0,
        divisor: int = 1,
    ) -> None:
        """`units`: the micro-batches. `number`: of the step in its phase. `divisor`: what losses are divided by."""
        self.units, self.number, self.phase, self.divisor = list(units), number, phase, divisor
        self.losses = [0.0] * len(units)  # loss sums
        self.sums: dict[str, float] = {}  # of the task's other metrics, by name; in evaluation
        self.compute_seconds = 0.0
        self.units_over = 0  # read on other threads, too
        self._ends, self._route, self._timeline = ends, route, timeline
        self._hops = list(plan.routes[0].hops)
        self._index, self._mode = plan.routes[0].device_index, host_mode(plan.host_mode)
        self._patience_s = self._mode.patience_s(plan.deadlines)
        self._cut_rank = plan.lowrank.rank  # values per token beside the last host's hidden states
        self._waiting = deque(range(len(units)))
        self._under_way: dict[int, _Way] = {}
        self._gradients_due = len(units) if self._trains and ends.has_labels else 0  # those that are not sent yet
        self._is_closed = route.exit is None  # by the coordinator, with this device counted
        self._handlers: dict[int, Callable[[int, pb.Header, torch.Tensor | None], None]] = {
            pb.ACT: self._take_activation,
            pb.LABELS: self._take_loss,
            pb.GRAD: self._take_gradient,
            pb.GRAD_END: lambda *_: None,  # the hosts are through with the micro-batch, and the front learns nothing
            pb.MISSING: self._take_missing,
        }

    @property
    def labels(self) -> int:
        """The labels of all micro-batches."""
        return sum(unit.count for unit in self.units)

    @property
    def _trains(self) -> bool:
        return self.phase == pb.TRAIN

    # ---------------------------------------------------------------- receive, forward, send

    def run(self) -> None:
        """Takes all micro-batches over the route. Raises LeftOut, PeerLost, ProtocolError."""
        if self._route.entry is None:
            for number, unit in enumerate(self.units):
                self._forward_back(number, pb.Header(step=self.number, micro_batch=number), unit.inputs)
                self.units_over += 1
            return
        while self._waiting or self._under_way:
            if self._may_start():
                self._start(self._waiting.popleft())
                continue
            header, tensor = self._receive()
            self._handlers[header.kind](header.micro_batch, header, tensor)
            way = self._under_way[header.micro_batch]
            way.waits_for -= _GRADIENTS if header.kind in _GRADIENTS else {header.kind}
            if not way.waits_for:
                del self._under_way[header.micro_batch]
                self.units_over += 1

    def _may_start(self) -> bool:
        """Returns whether the next micro-batch may start: there is room, and nothing that has arrived comes first.

        With nothing under way, what is in the inbox may concern other devices alone, so it is not asked.
        """
        if not self._waiting or len(self._under_way) >= self._route.window:
            return False
        return not self._under_way or self._route.inbox.empty()

    def _start(self, number: int) -> None:
        """Takes a micro-batch through the front, and sends its hidden states."""
        assert self._route.entry is not None
        assert self._route.exit is not None
        unit = self.units[number]
        fields: dict[str, Any] = {
            "phase": self.phase, "step": self.number, "micro_batch": number, "device_index": self._index,
        }  # fmt: skip
        if not self._ends.has_labels:
            self._route.exit.send(pb.Header(kind=pb.LABELS, **fields), unit.labels)
        positions_N = self._ends.positions(unit)
        positions = [] if positions_N is None else positions_N.tolist()
        header = pb.Header(
            kind=pb.ACT, row_lengths=unit.row_lengths, positions=positions, segment_lengths=chain(*unit.segments), **fields
        )  # fmt: skip
        with self._computing("forward", header):
            hidden = sent = None
            if self._ends.fronts is None:
                hidden = sent = self._ends.forward_front(unit, self.number, number, training=self._trains)
            else:
                sent = self._named(header, unit, self._ends.fronts)
        returns = [*([1, len(positions)] if positions else unit.shape), self._ends.hidden_size + self._cut_rank]
        answer = pb.ACT if self._ends.has_labels else pb.LABELS
        self._under_way[number] = _Way(header, hidden, returns, {answer, *_GRADIENTS} if self._trains else {answer})
        self._route.entry.send(header, sent)

    def _named(self, header: pb.Header, unit: Unit, fronts: NamedFronts) -> torch.Tensor | None:
        """Returns the states of the rows that the first host is not known to keep, None if there are none; names all in the header."""
        assert self._route.entry is not None
        known = fronts.sent.at(self._route.entry.terms.front_cache)
        header.row_names[:] = fronts.names(unit)
        header.kept_rows[:] = [row for row, name in enumerate(header.row_names) if known.is_there(name)]
        come = [row for row in range(len(header.row_names)) if row not in header.kept_rows]
        for row in come:
            known.sent(header.row_names[row])
        return self._ends.rows_of_front(unit, come) if come else None

    def _take_missing(self, number: int, header: pb.Header, _: torch.Tensor | None) -> None:
        """Sends the states of a whole micro-batch, of which the first host lacks some."""
        assert self._route.entry is not None
        assert self._ends.fronts is not None
        way, unit, missing = self._under_way[number], self.units[number], set(header.kept_rows)
        if not missing or not missing <= set(way.header.kept_rows):
            raise ProtocolError(
                f"host {self._hops[0].node} lacks rows that it was not taken to have kept: {sorted(missing)[:8]}"
            )
        known = self._ends.fronts.sent.at(self._route.entry.terms.front_cache)
        for row in missing:
            known.lacks(way.header.row_names[row])
        again = pb.Header()
        again.CopyFrom(way.header)  # the link may still be at work on the first one
        again.ClearField("kept_rows")
        way.header = again
        with self._computing("forward", header):
            states = self._ends.rows_of_front(unit, range(len(unit.row_lengths)))
        self._route.entry.send(again, states)

    def _receive(self) -> tuple[pb.Header, torch.Tensor | None]:
        """Returns the next frame of a micro-batch under way. Drops frames of steps that were closed without this device."""
        while True:
            frame = self._next()
            header = frame.header
            if header.kind == pb.STEP_CLOSE and self._concerns(header):
                # It comes by the exit link and may overtake the entry link's last GRAD, which is still waited for.
                self._take_close(frame)
                if self._gradients_due:
                    raise ProtocolError(
                        f"step {self.number} was closed with this device before its gradients were sent"
                    )
            if header.kind not in self._handlers or (header.phase, header.step) != (self.phase, self.number):
                continue
            way = self._under_way.get(header.micro_batch)
            lacks_tensor = frame.tensor is None and header.kind in (pb.ACT, pb.GRAD)
            if way is None or not way.takes(header.kind) or lacks_tensor:
                raise ProtocolError(
                    f"{pb.Kind.Name(header.kind)} for micro-batch {header.micro_batch}, which does not wait for it"
                )
            return header, frame.tensor

    def _take_activation(self, number: int, header: pb.Header, tensor: torch.Tensor | None) -> None:
        """Takes the last host's hidden states through the back, and sends their gradient."""
        way = self._under_way[number]
        returned = self._checked(tensor, way.returns, host=-1)
        grad = self._forward_back(number, header, returned)
        if self._trains:
            self._send_back(number, grad)

    def _take_loss(self, number: int, header: pb.Header, _: torch.Tensor | None) -> None:
        """Notes the loss of a micro-batch whose back is at the last host."""
        if self._trains and not math.isfinite(header.loss_sum):
            raise ProtocolError(f"host {self._hops[-1].node} sent a loss of {header.loss_sum}")
        self.losses[number] = header.loss_sum
        if not self._trains:
            self._add_sums(dict(header.sums))

    def _take_gradient(self, number: int, header: pb.Header, tensor: torch.Tensor | None) -> None:
        """Takes the first host's gradient through the front."""
        hidden = self._under_way[number].hidden
        if hidden is None or not hidden.requires_grad:
            raise ProtocolError(f"host {self._hops[0].node} sent a gradient for a front that does not learn")
        grad = self._checked(tensor, list(hidden.shape), host=0)
        with self._computing("backward", header):
            self._ends.backward_front(self.units[number], hidden, grad, self.divisor)

    def _forward_back(self, number: int, header: pb.Header, inputs: torch.Tensor) -> torch.Tensor | None:
        """Notes the loss of a micro-batch; returns the gradient for the last host, None if none is needed."""
        unit = self.units[number]
        with self._computing("forward", header):
            if self._trains:
                self.losses[number], grad = self._ends.train(unit, inputs, self.number, number, self.divisor)
                return grad
            self.losses[number], sums = self._ends.evaluate(unit, inputs)
        self._add_sums(sums)
        return None

    def _send_back(self, number: int, grad: torch.Tensor | None) -> None:
        assert self._route.exit is not None
        kind = pb.GRAD if grad is not None else pb.GRAD_END
        header = pb.Header(kind=kind, phase=pb.TRAIN, step=self.number, micro_batch=number, device_index=self._index)
        self._route.exit.send(header, grad)
        self._gradients_due -= 1

    def _add_sums(self, sums: dict[str, float]) -> None:
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    @contextmanager
    def _computing(self, kind: str, header: pb.Header) -> Iterator[None]:
        """Counts the time of the block as computing, and notes it in the timeline."""
        began = time.monotonic()
        with self._timeline.interval(kind, header):
            yield
        self.compute_seconds += time.monotonic() - began

    # ---------------------------------------------------------------- what the coordinator decides

    def await_close(self) -> None:
        """Waits until the coordinator has closed the step. Raises LeftOut if it did so without this device."""
        while not self._is_closed:
            frame = self._next()
            if frame.header.kind == pb.STEP_CLOSE and self._concerns(frame.header):
                self._take_close(frame)

    def agree_on_scale(self, own: pb.StepReady) -> pb.StepApply:
        """Sends the coordinator this stage's part of the gradient's norm; returns what it decides for all stages."""
        assert self._route.exit is not None
        self._route.exit.send(
            pb.Header(kind=pb.STEP_READY, phase=pb.TRAIN, step=self.number, device_index=self._index, step_ready=own)
        )
        while True:
            header = self._next().header
            if header.kind == pb.STEP_APPLY and self._concerns(header):
                check_verdict(header.step_apply)
                return header.step_apply

    def _concerns(self, header: pb.Header) -> bool:
        """Returns whether a decision is about this device's turn of the step."""
        turn_index = self._mode.turn_index
        return header.step == self.number and turn_index(header.device_index) == turn_index(self._index)

    def _take_close(self, frame: Frame) -> None:
        close = frame.header.step_close
        if self._index not in close.counted:
            reasons = [left.reason for left in close.left_out if left.device_index == self._index]
            raise LeftOut(reasons[0] if reasons else "left out")
        self._is_closed = True

    def _next(self) -> Frame:
        return self._route.receive(self._patience_s, "federation.step_deadline_s")

    def _checked(self, tensor: torch.Tensor | None, shape: list[int], host: int) -> torch.Tensor:
        """Returns a tensor that the route's `host` sent. Raises ProtocolError, with the host's name, if it cannot be used.

        In training its values must be finite too: an honest host leaves a device out of the step instead.
        """
        name, dtype = self._hops[host].node, self._ends.wire
        if tensor is None or list(tensor.shape) != shape or tensor.dtype != dtype:
            got = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            raise ProtocolError(f"host {name} sent {got}; expected was {dtype} {shape}")
        if self._trains and not is_finite(tensor):
            raise ProtocolError(f"host {name} sent values that are not finite, in step {self.number}")
        return tensor
