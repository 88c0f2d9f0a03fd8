"""A host's part in one round: forward and backward for several devices.

Knows layers, activations and gradients; knows nothing about tokens, about labels beyond their counts (except in a last stage
that holds the head), or about gRPC. Neighbours: `split.group` holds the links, `split.turns` decides when the adapter steps,
`node.service` starts a host and lets devices in.

The compute thread takes, in this order: control frames, backward passes, optimizer steps, the forward pass of the device
that waited longest. So an admitted micro-batch never waits for another one's memory.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise

import torch

from edgelam_fl.errors import ProtocolError
from edgelam_fl.model.stage import Stage
from edgelam_fl.plan.modes import host_mode, label_place
from edgelam_fl.plan.reading import unit_rows, unit_seed
from edgelam_fl.privacy.mechanism import secret_generator
from edgelam_fl.split.group import Group, relay
from edgelam_fl.split.inbox import Lost, Out
from edgelam_fl.split.judging import is_finite
from edgelam_fl.split.lane import Lane
from edgelam_fl.split.member import Member, check_unit, unit_id
from edgelam_fl.split.private import PrivateSum
from edgelam_fl.split.snapshot import NO_KEEPER, Keeper, SourceState, site_lane
from edgelam_fl.split.timeline import Timeline
from edgelam_fl.split.trainee import Trainee
from edgelam_fl.split.turns import DecidesTurns, FollowsTurns, Handler, Turns
from edgelam_fl.tasks.base import Task
from edgelam_fl.tasks.causal_lm import IGNORED
from edgelam_fl.telemetry.events import EmitInJob
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.link import Frame, Link

_GATHER_POLL_S = 0.05
_MOST_TAKEN = 256  # arrivals before work that is due: a flood of frames does not keep the host from computing
_OF_UNITS = {pb.ACT, pb.LABELS, pb.GRAD, pb.GRAD_END}  # kinds of frames that belong to a micro-batch


class Host:
    """One host of a site in one round. `run` works on the caller's thread."""

    def __init__(
        self,
        plan: pb.Plan,
        stage: Stage,
        group: Group,
        trainees: Sequence[Trainee],
        task: Task | None,
        emit: EmitInJob,
        keeper: Keeper = NO_KEEPER,
    ) -> None:
        """Prepares the lanes of a round.

        `trainees`: one per lane, in the order of `HostMode.sources`. `task`: at a last stage that holds the head; else None.
        `keeper`: keeps snapshots of the lanes.
        """
        self.plan, self.stage, self.group, self.task = plan, stage, group, task
        self.compute_seconds = 0.0
        self.timeline = Timeline("host")
        group.on_sent = self.timeline.sent
        mode = host_mode(plan.host_mode)
        members = [group.members[index] for index in sorted(group.members)]
        self._keeper = keeper
        lanes = [self._lane(own, trainee) for own, trainee in zip(mode.lanes(members), trainees, strict=True)]
        self._lane_of_source = dict(zip(mode.sources(plan.site, [m.route.device for m in members]), lanes, strict=True))
        turns = DecidesTurns if group.coordinates else FollowsTurns
        self.turns: Turns = turns(plan, group, lanes, self.timeline, emit, self._keep)
        self._from_previous, self._from_next = self._handlers()
        self._served: deque[int] = deque(
            group.members
        )  # device indices; the one whose forward pass is longest ago first
        self._backwards: deque[tuple[Member, Frame]] = deque()

    def _lane(self, members: list[Member], trainee: Trainee) -> Lane:
        plan = self.plan
        private = PrivateSum(plan.privacy, secret_generator()) if plan.privacy.step_clip else None
        mode = host_mode(plan.host_mode)
        source = site_lane(members[0].route.device if mode.has_copies else "")
        return Lane(members, trainee, mode, source, plan.HasField("privacy"), private)

    def restore(self, states: Mapping[str, SourceState]) -> None:
        """Goes on from the lanes' states after the plan's `first_step`, by source. Raises Damaged if they are not theirs."""
        for lane in self.turns.lanes:
            lane.restore(states[lane.source])
        newest = max((state.report.host for state in states.values()), key=lambda host: host.compute_seconds)
        self.compute_seconds = newest.compute_seconds
        self.group.counters.include(newest.bytes)

    def _keep(self, lane: Lane, after: int, until: int) -> None:
        """Keeps a snapshot of a lane if one is due at a number of steps above `after` and up to `until`."""
        steps = self._keeper.due(after, until)
        if steps:
            host = pb.HostPart(compute_seconds=self.compute_seconds, bytes=self.group.counters.report())
            self._keeper.take(lane.source, steps, lane.state(pb.JobReport(host=host)))
            for other in self.turns.lanes:
                if all(member.gone for member in other.members):
                    self._keeper.drop(other.source)  # of a device that left, with copies

    def run(self) -> None:
        """Serves the devices until each is done or gone. Raises PeerLost with fewer than `min_devices` of them."""
        if not self.group.coordinates:
            self.group.dial_next()
        self.group.gather(lambda: self._take(_GATHER_POLL_S))
        taken = 0  # arrivals since the last work
        while self.group.active() or self.turns.still_to_come():
            work = self._next_work()
            if (work is None or taken < _MOST_TAKEN) and self._take(0.0 if work else self.turns.patience_s()):
                taken += 1
                continue
            taken = 0
            if work is None:
                self.turns.give_up_on_the_late()
                continue
            began = time.monotonic()
            work()
            self.compute_seconds += time.monotonic() - began
        self.group.check_enough()

    @property
    def steps_over(self) -> int:
        """The training steps that all lanes are past; on any thread."""
        return min(lane.steps_over(self.plan.steps) for lane in self._lane_of_source.values())

    @property
    def labels_trained(self) -> int:
        """The labels of all devices that were counted, over all steps."""
        return sum(lane.labels_trained() for lane in self.turns.lanes)

    def clipped(self) -> tuple[int, int]:
        """Counts the devices' gradients that were measured for differential privacy, and those that were clipped."""
        sums = [lane.private for lane in self._lane_of_source.values() if lane.private is not None]
        return sum(one.measured for one in sums), sum(one.clipped for one in sums)

    def left_out(self) -> list[pb.DeviceLeftOut]:
        """Returns the devices that some step did not count, with the last reason."""
        return [
            pb.DeviceLeftOut(
                device=m.route.device, steps=m.missed_steps, reason=m.gone or m.missed_for, out=bool(m.gone)
            )
            for _, m in sorted(self.group.members.items())
            if m.missed_for or m.gone
        ]

    def labels_of(self, source: str, name: str) -> int:
        """Counts the labels that a source's tensor learned from: those of its devices whose routes cross the layer."""
        return self._lane_of_source[source].labels_trained(name)

    def _next_work(self) -> Callable[[], None] | None:
        if self._backwards:
            return self._next_backward
        return self.turns.next_work() or self._next_forward()

    def _next_backward(self) -> None:
        member, frame = self._backwards.popleft()
        with self.group.working_for(member, member.next):
            self._backward(member, frame)

    def _next_forward(self) -> Callable[[], None] | None:
        for index in self._served:
            member = self.group.members[index]
            if member.active and member.forwards and self._may_run(member):
                self._served.remove(index)
                self._served.append(index)
                return partial(self._next_forward_of, member)
        return None

    def _next_forward_of(self, member: Member) -> None:
        with self.group.working_for(member, member.previous):
            self._forward(member, member.forwards.popleft())

    def _may_run(self, member: Member) -> bool:
        """Returns whether a device's next forward pass may run: before its turn is open, it would see old weights."""
        header = member.forwards[0].header
        if self.task is not None and unit_id(header) not in member.labels:
            return False
        return header.phase == pb.EVAL or self.turns.lane_of[member.index].is_open(member.index, header.step)

    # ---------------------------------------------------------------- what arrives

    def _handlers(self) -> tuple[dict[int, Handler], dict[int, Handler]]:
        """Returns what to do with frames from the previous and from the next node of a route, by kind.

        Kinds that are not listed are dropped.
        """
        from_previous: dict[int, Handler] = {
            pb.DONE: lambda member, frame: self.group.done(member, member.previous, frame.header),
            pb.CANCEL: self._take_cancel,
            pb.STEP_READY: self.turns.take_norm_of_host,
            pb.ACT: self._take_activation,
        }
        from_next: dict[int, Handler] = {
            pb.DONE: lambda member, frame: self.group.done(member, member.next, frame.header),
            pb.CANCEL: self._take_cancel,
            pb.TABLE: self.turns.take_table,
            **self.turns.handlers_from_next(),
        }
        if self.task is None:
            from_next |= dict.fromkeys((pb.GRAD, pb.GRAD_END), self._take_gradient)
        else:
            from_next[pb.LABELS] = self._take_labels
        return from_previous, from_next

    def _take(self, wait_s: float) -> bool:
        """Handles the next arrival; returns False if none came for `wait_s` seconds."""
        arrival = self.group.inbox.get(wait_s)
        if arrival is None:
            return False
        if isinstance(arrival, Out):
            self.group.put_out(arrival)
            return True
        link, item = arrival
        member = self.group.owner(link)
        if isinstance(item, Lost):
            if not member.done or (link is member.next and self.turns.awaits_close(member)):
                self.group.lose(member, link, f"link {link.name}: {item.reason}")
            return True
        with self.group.working_for(member, link):
            self._read(member, link, item)
        return True

    def _read(self, member: Member, link: Link, frame: Frame) -> None:
        header = frame.header
        if header.kind in _OF_UNITS:
            check_phase(header, self.plan)
        of_training = header.kind in _OF_UNITS and header.phase == pb.TRAIN
        if of_training and self.turns.lane_of[member.index].is_past(member.index, header.step):
            return  # of a step that was closed without this device
        handler = (self._from_previous if link is member.previous else self._from_next).get(header.kind)
        if handler is not None:
            handler(member, frame)

    def _take_cancel(self, member: Member, frame: Frame) -> None:
        self.group.lose(member, member.previous, frame.header.cancel.reason)

    def _take_activation(self, member: Member, frame: Frame) -> None:
        check_activation(frame, member, self.plan, self.group.hidden_size, self.group.wire)
        check_positions(frame, self.plan)
        member.forwards.append(frame)

    def _take_labels(self, member: Member, frame: Frame) -> None:
        if len(member.labels) >= self.plan.window:
            raise ProtocolError(f"labels of more than {self.plan.window} micro-batches (split.window)")
        member.labels[unit_id(frame.header)] = check_labels(frame, self.plan)

    def _take_gradient(self, member: Member, frame: Frame) -> None:
        if sum(other is member for other, _ in self._backwards) >= 2 * self.plan.window:  # of a late step and the next
            raise ProtocolError(f"gradients of more than {self.plan.window} micro-batches a step (split.window)")
        self._backwards.append((member, frame))

    # ---------------------------------------------------------------- forward, backward

    def _forward(self, member: Member, frame: Frame) -> None:
        header, lane = frame.header, self.turns.lane_of[member.index]
        training = header.phase == pb.TRAIN
        if member.leaving or (training and (member.problem or not lane.is_open(member.index, header.step))):
            return  # of a step that was closed, or will be, without this device
        lane.trainee.use()
        inputs = frame.tensor
        assert inputs is not None
        if training:
            check_unit(header, inputs.shape, member)
            member.begun.add(unit_id(header))
        seed = unit_seed(self.plan, member.route.device, header.step, header.micro_batch) if training else None
        inputs.requires_grad_(training and self._previous_trains(member))
        with torch.set_grad_enabled(training), self.timeline.interval("forward", header, member.route.device):
            output = self.stage(
                inputs.to(self.stage.dtype), list(header.row_lengths), layers=member.layers, unit_seed=seed
            )
            if header.positions and self.group.coordinates:
                output = at_positions(output, list(header.positions))
            if self.task is None:
                output = output.to(self.group.wire)
        if self.task is not None:
            self._loss(self.task, member, header, inputs, output)
            return
        if training and not is_finite(output):
            self.turns.take_unusable_gradient(member, "hidden states that give values that are not finite")
            return
        if training:
            # With a cut adapter, the device's gradient is of its values alone, which follow the hidden states.
            cut_values = self.plan.HasField("lowrank") and self.group.coordinates
            learned = output[..., self.group.hidden_size :] if cut_values else output
            member.saved[unit_id(header)] = (inputs, learned)
        self._send(member.next, pb.ACT, header, output)

    def _loss(self, task: Task, member: Member, header: pb.Header, inputs: torch.Tensor, output: torch.Tensor) -> None:
        """Computes the loss at a last stage: its value goes to the device, its gradient back along the route."""
        labels = member.labels.pop(unit_id(header))
        check_targets(labels, output)
        loss, sums = task.loss(output, labels, training=header.phase == pb.TRAIN)
        if header.phase == pb.TRAIN and not math.isfinite(loss.item()):
            self.turns.take_unusable_gradient(member, "hidden states or labels whose loss is not finite")
            return
        answer = pb.Header(
            kind=pb.LABELS, phase=header.phase, step=header.step, micro_batch=header.micro_batch,
            device_index=header.device_index, loss_sum=float(loss.detach()), sums=sums,
        )  # fmt: skip
        relay(member.next, answer)
        if header.phase == pb.TRAIN:
            divisor = self.turns.lane_of[member.index].divisor_of(member)
            with self.timeline.interval("backward", header, member.route.device):
                self._differentiate(member, header, inputs, loss / divisor, None)

    def _backward(self, member: Member, frame: Frame) -> None:
        header, lane = frame.header, self.turns.lane_of[member.index]
        if self.turns.is_out(member) or member.problem or not lane.is_open(member.index, header.step):
            return
        saved = member.saved.pop(unit_id(header), None)
        if saved is None:
            self.group.dismiss(
                member, f"broke the protocol: gradient of micro-batch {header.micro_batch}, which is not open"
            )
            return
        inputs, output = saved
        if header.kind == pb.GRAD:
            problem = gradient_problem(frame.tensor, output, self.group.wire)
            if problem:
                self.turns.take_unusable_gradient(member, problem)
                return
        with self.timeline.interval("backward", header, member.route.device):
            self._differentiate(member, header, inputs, output if header.kind == pb.GRAD else None, frame.tensor)

    def _differentiate(
        self,
        member: Member,
        header: pb.Header,
        inputs: torch.Tensor,
        output: torch.Tensor | None,
        grad: torch.Tensor | None,
    ) -> None:
        """Adds to the device's gradient of the adapter, and sends the inputs' gradient to the previous node.

        `output`: None if nothing that comes later on the route trains.
        """
        parameters = self.turns.lane_of[member.index].trainee.parameters
        wanted = ([inputs] if inputs.requires_grad else []) + parameters
        grad_of_inputs = None
        if wanted and output is not None:
            found: list[torch.Tensor | None] = list(torch.autograd.grad(output, wanted, grad, allow_unused=True))
            if inputs.requires_grad:
                grad_of_inputs = found.pop(0)
            member.accumulate(found)
        if grad_of_inputs is not None and not is_finite(grad_of_inputs):
            self.turns.take_unusable_gradient(member, "a gradient that makes others that are not finite")
            return
        member.backwards_done += 1
        self._send(member.previous, pb.GRAD if grad_of_inputs is not None else pb.GRAD_END, header, grad_of_inputs)

    def _previous_trains(self, member: Member) -> bool:
        """Returns whether anything before this stage learns, so that it needs a gradient from here."""
        lora = self.plan.lora
        return (lora.train_front and member.route.front > 0) or (lora.train_hosts and self.group.position > 0)

    def _send(self, link: Link | None, kind: pb.Kind, of: pb.Header, tensor: torch.Tensor | None) -> None:
        assert link is not None
        header = pb.Header(
            kind=kind, phase=of.phase, step=of.step, micro_batch=of.micro_batch, device_index=of.device_index,
            row_lengths=of.row_lengths, positions=() if self.group.coordinates else of.positions,
        )  # fmt: skip
        link.note_progress(of.phase, of.step)
        link.send(header, tensor)


def check_phase(header: pb.Header, plan: pb.Plan) -> None:
    """Raises ProtocolError if a micro-batch belongs to no step of the plan."""
    if header.phase not in (pb.EVAL, pb.TRAIN) or (header.phase == pb.TRAIN and header.step >= plan.steps):
        raise ProtocolError(
            f"a micro-batch of step {header.step} in phase {header.phase}; the plan has {plan.steps} steps"
        )


def check_activation(frame: Frame, member: Member, plan: pb.Plan, hidden_size: int, dtype: torch.dtype) -> None:
    """Raises ProtocolError if hidden states do not fit the model, the plan or the member's window."""
    header, tensor = frame.header, frame.tensor
    if tensor is None or tensor.dim() != 3 or tensor.shape[2] != hidden_size or tensor.dtype != dtype:
        got = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
        raise ProtocolError(f"hidden states must be {dtype} [rows, tokens, {hidden_size}], got {got}")
    rows, tokens, _ = tensor.shape
    if not (1 <= rows <= unit_rows(plan) and 1 <= tokens <= plan.task.max_tokens):
        raise ProtocolError(
            f"hidden states of {rows} rows of {tokens} tokens; the plan allows 1 to {unit_rows(plan)} rows of 1 to "
            f"{plan.task.max_tokens}"
        )
    if len(header.row_lengths) != rows or not all(1 <= length <= tokens for length in header.row_lengths):
        raise ProtocolError(f"row lengths {list(header.row_lengths)[:8]} do not fit {rows} rows of {tokens} tokens")
    if len(member.forwards) + len(member.saved) >= plan.window:
        raise ProtocolError(f"more than {plan.window} micro-batches in flight (split.window)")


def check_positions(frame: Frame, plan: pb.Plan) -> None:
    """Raises ProtocolError if the positions that a device wants back are not some of its micro-batch's, each once, in order."""
    positions, states = list(frame.header.positions), frame.tensor
    assert states is not None
    if positions and not label_place(plan.labels).on_device:
        raise ProtocolError("positions of hidden states to send back, and this route's last host has the labels")
    rising = all(before < after for before, after in pairwise(positions))
    if positions and not (rising and positions[-1] < states.shape[0] * states.shape[1]):
        raise ProtocolError(
            f"{len(positions)} positions to send back, up to {max(positions)}, of {states.shape[0]} rows of {states.shape[1]} tokens: "
            "each may come once, in order"
        )


def at_positions(states_BTD: torch.Tensor, positions: list[int]) -> torch.Tensor:
    """Returns the states at some positions, row * tokens + place, as one row [1, N, D]."""
    return states_BTD.flatten(0, 1)[torch.tensor(positions)][None]


def check_labels(frame: Frame, plan: pb.Plan) -> torch.Tensor:
    """Returns the labels of a micro-batch, at a last stage. Raises ProtocolError if they do not fit the plan."""
    tensor = frame.tensor
    if tensor is None or tensor.dtype != torch.int64 or tensor.dim() not in (1, 2) or not tensor.numel():
        raise ProtocolError("labels must be int64 [rows] or [rows, tokens]")
    if tensor.shape[0] > unit_rows(plan) or (tensor.dim() == 2 and tensor.shape[1] > plan.task.max_tokens):
        raise ProtocolError(f"labels of shape {list(tensor.shape)} do not fit the plan")
    return tensor


def check_targets(labels: torch.Tensor, output: torch.Tensor) -> None:
    """Raises ProtocolError if labels are not those of the outputs, [rows, tokens, vocabulary] or [rows, classes]."""
    if labels.shape != output.shape[:-1]:
        raise ProtocolError(f"labels of shape {list(labels.shape)} for outputs of shape {list(output.shape[:-1])}")
    labelled = labels[labels != IGNORED]
    least, most = (bound.item() for bound in labelled.aminmax()) if labelled.numel() else (0, 0)
    every_row = labels.dim() == 1  # classification
    if least < 0 or most >= output.shape[-1] or (every_row and len(labelled) < len(labels)):
        raise ProtocolError(
            f"labels from {least} to {most}, {len(labelled)} of them; there are {output.shape[-1]} outputs"
        )


def gradient_problem(grad: torch.Tensor | None, output: torch.Tensor, dtype: torch.dtype) -> str:
    """Returns why a gradient cannot be used; empty if it can. `dtype`: what hidden states travel in."""
    if grad is None or grad.shape != output.shape or grad.dtype != dtype:
        return "a gradient of another shape or dtype than the activation"
    if not is_finite(grad):
        return "a gradient that is not finite"
    return ""
