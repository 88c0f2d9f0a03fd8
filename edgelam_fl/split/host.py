"""A host's part in one round: forward and backward for several devices, and the optimizer steps of its adapter.

Knows layers, adapters and gradients; knows nothing about tokens or labels beyond their counts (but with
`labels = "last-stage"`), and nothing about gRPC. Neighbours: `split.group` holds the links, `split.lane` the order of steps,
`split.stage_host` starts this and lets devices in.

The compute thread takes, in this order: what control frames say, backward passes, optimizer steps, the forward pass of
the device that waited longest. So an admitted micro-batch never waits for another one's memory.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from functools import partial

import torch

from edgelam_fl.errors import ProtocolError, RunFailed
from edgelam_fl.model.stage import Stage
from edgelam_fl.plan.modes import host_mode
from edgelam_fl.plan.reading import unit_seed
from edgelam_fl.split.group import Group, relay
from edgelam_fl.split.inbox import Lost
from edgelam_fl.split.lane import Lane, TurnId, accumulate
from edgelam_fl.split.member import (
    Gradients,
    Member,
    check_activation,
    check_labels,
    checked_table,
    gradient_problem,
    unit_id,
)
from edgelam_fl.split.timeline import Timeline
from edgelam_fl.split.trainee import Trainee, judge
from edgelam_fl.tasks.base import Task
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.link import Frame, Link

_LATE_STEPS_ALLOWED = 3
_DECISIONS = (pb.TABLE_ALL, pb.STEP_CLOSE, pb.STEP_APPLY)


class Host:
    """One host of a site in one round. `run` works on the caller's thread."""

    def __init__(
        self,
        plan: pb.Plan,
        stage: Stage,
        group: Group,
        trainees: list[Trainee],
        task: Task | None,
        emit: Callable[..., None],
    ) -> None:
        """`trainees`: one, or with copies one a member, in device order. `task`: with labels = "last-stage" the last host's."""
        self.plan, self.stage, self.group, self.task, self.emit = plan, stage, group, task, emit
        self.labels_trained: dict[int, int] = dict.fromkeys(group.members, 0)
        self.compute_seconds = 0.0
        self.timeline = Timeline("host")
        group.on_sent = self.timeline.sent
        everyone = [group.members[index] for index in sorted(group.members)]
        self._mode = host_mode(plan.host_mode)
        self.lanes = [
            Lane(members, trainee, self._mode)
            for members, trainee in zip(self._mode.lanes(everyone), trainees, strict=True)
        ]
        self._lane_of = {m.index: lane for lane in self.lanes for m in lane.members}
        self._served: deque[int] = deque(group.members)  # whose forward pass is the longest ago comes first
        self._closes: dict[
            tuple[int, TurnId], pb.StepClose
        ] = {}  # told by the coordinator, by lane; not applied here yet
        self._verdicts: dict[tuple[int, TurnId], pb.StepApply] = {}
        self._told_left_out: set[int] = set()  # an event for each change, not for each step of the same
        self._backwards: deque[tuple[Member, Frame]] = deque()

    def run(self) -> None:
        """Serves the devices until each is done or gone. Raises PeerLost with fewer than `min_devices` of them."""
        if not self.group.coordinates:
            self.group.dial_downstream()
        self.group.gather(lambda: self._take(0.05))
        while self.group.active() or self._turns_to_come():
            work = self._next_work()
            if self._take(0.0 if work else self._patience()):
                continue
            if work is None:
                self._give_up_on_the_late()
                continue
            began = time.monotonic()
            work()
            self.compute_seconds += time.monotonic() - began
        self.group.check_enough()

    def labels_of(self, source: str, name: str) -> int:
        """The labels that a tensor learned from: of the devices whose routes cross its layer; of a copy, its device's."""
        members = [m for m in self.group.members.values() if m.crosses(name)]
        if self._mode.has_copies:
            members = [m for m in members if m.route.device == source]
        return sum(self.labels_trained[m.index] for m in members)

    def _turns_to_come(self) -> bool:
        """Whether devices are through whose last steps are not applied here yet: their closes are still on their way."""
        if self.group.coordinates:
            return False
        unfinished = [lane for lane in self.lanes if lane.turns is not None and not lane.is_through]
        return any(member.present for lane in unfinished for member in lane.members)

    def _closes_to_come(self, member: Member) -> bool:
        lane = self._lane_of[member.index]
        return (
            self._turns_to_come() and not lane.is_through and (self.lanes.index(lane), lane.turn_id) not in self._closes
        )

    # ---------------------------------------------------------------- what arrives

    def _take(self, wait_s: float) -> bool:
        arrival = self.group.inbox.get(wait_s)
        if arrival is None:
            return False
        link, item = arrival
        member = self.group.owner(link)
        if isinstance(item, Lost):
            if not member.done or (link is member.downstream and self._closes_to_come(member)):
                self.group.lose(member, link, f"link {link.name}: {item.reason}")
            return True
        try:
            self._read(member, link, item)
        except ProtocolError as error:
            self.group.lose(member, link, f"broke the protocol: {error}")
        return True

    def _read(self, member: Member, link: Link, frame: Frame) -> None:
        """Control is acted on, tensors are queued as work."""
        header, lane = frame.header, self._lane_of[member.index]
        from_below = link is member.upstream
        if header.kind == pb.DONE:
            self.group.done(member, link, header)
        elif header.kind == pb.CANCEL:
            self.group.lose(member, member.upstream, header.cancel.reason)
        elif header.kind == pb.TABLE and not from_below:
            member.table = checked_table(header.table, member, self.plan)
            self.group.pass_up(member, header)
        elif header.kind in _DECISIONS and not from_below and not self.group.coordinates:
            self._take_decision(lane, header)
            self.group.pass_up(member, header)
        elif header.kind == pb.STEP_READY:
            self._take_norm(lane, member, from_below, header)
        elif header.phase == pb.TRAIN and lane.is_past(member.index, header.step):
            pass  # of a step that was closed without this device
        elif header.kind == pb.ACT and from_below:
            check_activation(frame, member, self.plan, self.group.hidden_size, self.group.wire)
            member.forwards.append(frame)
        elif header.kind == pb.LABELS and not from_below and self.task is not None:
            if len(member.labels) >= self.plan.window:
                raise ProtocolError(f"labels of more than {self.plan.window} micro-batches (split.window)")
            member.labels[unit_id(header)] = check_labels(frame, self.plan)
        elif header.kind in (pb.GRAD, pb.GRAD_END) and not from_below and self.task is None:
            self._backwards.append((member, frame))

    def _take_decision(self, lane: Lane, header: pb.Header) -> None:
        """The coordinator's word, on the way up; it comes once with each device, and the first copy is acted on."""
        number = self.lanes.index(lane)
        turn = header.step, self._mode.turn_index(header.device_index)
        if header.kind == pb.TABLE_ALL and lane.totals is None:
            if len(header.table_all.steps) != self.plan.steps:
                raise ProtocolError(
                    f"a TABLE_ALL of {len(header.table_all.steps)} steps; the plan has {self.plan.steps}"
                )
            lane.totals = list(header.table_all.steps)
        elif header.kind == pb.STEP_CLOSE:
            self._closes.setdefault((number, turn), header.step_close)
        elif header.kind == pb.STEP_APPLY:
            self._verdicts.setdefault((number, turn), header.step_apply)

    def _take_norm(self, lane: Lane, member: Member, from_below: bool, header: pb.Header) -> None:
        """A stage's part of the gradient's norm, on its way to the coordinator (clip = "global")."""
        if not self.group.coordinates:
            relay(member.downstream, header)
        elif lane.turn is not None and lane.turn_id == (header.step, self._mode.turn_index(header.device_index)):
            name = f"host {header.step_ready.host}" if from_below else member.route.device
            lane.norms.setdefault(name, header.step_ready)

    def _set_turns(self, lane: Lane, totals: list[pb.StepTotal]) -> None:
        lane.turns = self._mode.turns(
            totals, lambda index, step: self.group.members[index].labels_of(step), self.plan.seed,
            self.plan.optimizer.step_offset,
        )  # fmt: skip
        lane.opened = time.monotonic()
        self.timeline.open()

    # ---------------------------------------------------------------- what to do next

    def _next_work(self) -> Callable[[], None] | None:
        if self._backwards:
            return lambda: self._backward(*self._backwards.popleft())
        for lane in self.lanes:
            if lane.turns is None:
                if self._may_open(lane):
                    return partial(self._open_training, lane)
            elif lane.closing is not None:
                if self._verdict(lane) is not None:
                    return partial(self._apply, lane)
            elif lane.turn is not None and self._may_close(lane):
                return partial(self._close_turn, lane)
        for index in self._served:
            member = self.group.members[index]
            if member.active and member.forwards and self._may_run(member):
                self._served.remove(index)
                self._served.append(index)
                return lambda: self._forward(member, member.forwards.popleft())
        return None

    def _may_open(self, lane: Lane) -> bool:
        active = [m for m in lane.members if m.active]
        if (
            not self.group.coordinates
        ):  # the word came with one device; the tables of the others may still be on their way
            counted = {index for total in lane.totals or [] for index in total.members}
            active = [m for m in active if m.index in counted]
        return bool(self.plan.steps and active) and all(m.table for m in active)

    def _told(self, lane: Lane) -> pb.StepClose | None:
        return self._closes.get((self.lanes.index(lane), lane.turn_id))

    def _may_close(self, lane: Lane) -> bool:
        if self.group.coordinates:
            return not lane.pending(None)
        told = self._told(lane)
        return told is not None and not lane.pending(list(told.counted))

    def _may_run(self, member: Member) -> bool:
        """No forward of a turn before the one before is applied: it would see old weights."""
        header = member.forwards[0].header
        if self.task is not None and unit_id(header) not in member.labels:
            return False
        return header.phase == pb.EVAL or self._lane_of[member.index].is_open(member.index, header.step)

    def _timed_lanes(self) -> list[Lane]:
        """Those whose open turn has a deadline here. A copy waits for nobody, so nobody waits for it."""
        if not (self.group.coordinates and self._mode.waits_for_others):
            return []
        return [lane for lane in self.lanes if lane.turn is not None]

    def _patience(self) -> float:
        deadline_s = self.plan.deadlines.step_s
        left = [lane.opened + deadline_s - time.monotonic() for lane in self._timed_lanes()]
        return max(0.0, min(left, default=self.plan.deadlines.round_s))  # else pulses tell the living from the dead

    def _give_up_on_the_late(self) -> None:
        for lane in self._timed_lanes():
            if time.monotonic() < lane.opened + self.plan.deadlines.step_s:
                continue
            if lane.closing is not None:
                lane.verdict = self._judge(lane)  # whose norm did not come: the others step without it
                continue
            for member in lane.pending(None):
                member.problem = f"later than {self.plan.deadlines.step_s:.0f} s"
                member.late_steps += 1
                if member.late_steps >= _LATE_STEPS_ALLOWED:
                    self.group.dismiss(member, f"late in {_LATE_STEPS_ALLOWED} steps")

    # ---------------------------------------------------------------- forward, backward

    def _forward(self, member: Member, frame: Frame) -> None:
        header, lane = frame.header, self._lane_of[member.index]
        training = header.phase == pb.TRAIN
        if member.leaving or (training and (member.problem or not lane.is_open(member.index, header.step))):
            return  # of a step that was closed, or will be, without this device
        lane.trainee.use()
        inputs = frame.tensor
        assert inputs is not None
        seed = unit_seed(self.plan, member.route.device, header.step, header.micro_batch) if training else None
        inputs.requires_grad_(training and self._trains_below(member))
        with torch.set_grad_enabled(training), self.timeline.interval("forward", header, member.route.device):
            output = self.stage(
                inputs.to(self.stage.dtype), list(header.row_lengths), layers=member.layers, unit_seed=seed
            )
            if self.task is None:
                output = output.to(self.group.wire)
        if self.task is not None:
            self._loss(member, header, inputs, output)
            return
        if training:
            member.saved[unit_id(header)] = (inputs, output)
        self._send(member.downstream, pb.ACT, header, output)

    def _loss(self, member: Member, header: pb.Header, inputs: torch.Tensor, output: torch.Tensor) -> None:
        """labels = "last-stage": the loss here, its value to the device, its gradient back up the route."""
        assert self.task is not None
        loss, sums = self.task.loss(output, member.labels.pop(unit_id(header)))
        answer = pb.Header(
            kind=pb.LABELS, phase=header.phase, step=header.step, micro_batch=header.micro_batch,
            device_index=header.device_index, loss_sum=float(loss.detach()), sums=sums,
        )  # fmt: skip
        relay(member.downstream, answer)
        if header.phase == pb.TRAIN:
            turn = self._lane_of[member.index].turn
            assert turn is not None
            with self.timeline.interval("backward", header, member.route.device):
                self._differentiate(member, header, inputs, loss / turn.labels, None)

    def _backward(self, member: Member, frame: Frame) -> None:
        header, lane = frame.header, self._lane_of[member.index]
        out = member.gone and self.group.coordinates  # up the chain, what the coordinator has counted is still needed
        if out or member.problem or not lane.is_open(member.index, header.step):
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
            if problem and self.group.coordinates:
                member.problem = problem
                return
            if problem:  # it was finite at the coordinator, which counts it: here nothing of it can be used
                self.group.dismiss(member, problem)
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
        """Gradients of the adapter are kept, the inputs' goes on below. No output: nothing above trains."""
        parameters = self._lane_of[member.index].trainee.parameters
        wanted = ([inputs] if inputs.requires_grad else []) + parameters
        grad_below = None
        if wanted and output is not None:
            found: Gradients = list(torch.autograd.grad(output, wanted, grad, allow_unused=True))
            if inputs.requires_grad:
                grad_below = found.pop(0)
            accumulate(member, found)
        member.backwards_done += 1
        self._send(member.upstream, pb.GRAD if grad_below is not None else pb.GRAD_END, header, grad_below)

    def _trains_below(self, member: Member) -> bool:
        """Whether anything before this stage learns, so that a gradient has to go on."""
        lora = self.plan.lora
        return (lora.train_front and member.route.front > 0) or (lora.train_hosts and self.group.position > 0)

    def _send(self, link: Link | None, kind: pb.Kind, of: pb.Header, tensor: torch.Tensor | None) -> None:
        assert link is not None
        header = pb.Header(
            kind=kind, phase=of.phase, step=of.step, micro_batch=of.micro_batch, device_index=of.device_index,
            row_lengths=of.row_lengths,
        )  # fmt: skip
        link.note_progress(of.phase, of.step)
        link.send(header, tensor)

    # ---------------------------------------------------------------- turns

    def _open_training(self, lane: Lane) -> None:
        """All tables are in. The coordinator sums the labels of every step and tells everyone."""
        if lane.totals is not None:
            self._set_turns(lane, lane.totals)
            return
        totals = []
        for step in range(self.plan.steps):
            rows = {m.index: m.labels_of(step) for m in lane.members if m.active}
            members = [index for index, labels in sorted(rows.items()) if labels]
            totals.append(pb.StepTotal(labels=sum(rows.values()), members=members))
        self._set_turns(lane, totals)
        header = pb.Header(kind=pb.TABLE_ALL, phase=pb.TRAIN, table_all=pb.TableAll(steps=totals))
        self._decide(lane, header)

    def _close_turn(self, lane: Lane) -> None:
        """Fixes who counts in the open turn and sums their gradients; the coordinator tells the others."""
        turn = lane.turn
        assert turn is not None
        if self.group.coordinates:
            counted = [m for m in lane.ready(None) if m.present]
        else:
            told = self._told(lane)
            assert told is not None
            counted = lane.ready(list(told.counted))
        left_out = [self.group.members[index] for index in turn.members if self.group.members[index] not in counted]
        close = pb.StepClose(
            counted=[m.index for m in counted],
            labels_counted=sum(m.labels_of(turn.step) for m in counted),
            left_out=[pb.LeftOut(device_index=m.index, reason=m.gone or m.problem) for m in left_out],
        )
        if self.group.coordinates:
            self._decide(lane, pb.Header(kind=pb.STEP_CLOSE, phase=pb.TRAIN, step=turn.step, step_close=close))
        self._tell_left_out(lane, counted, left_out)
        for member in counted:
            member.late_steps = 0
            self.labels_trained[member.index] += member.labels_of(turn.step)
        lane.gather_gradients(counted)
        lane.closing = close
        if self.plan.optimizer.clip != "global" or not counted:
            lane.verdict = pb.StepApply(scale=1.0, skip=not counted)
        elif not self.group.coordinates:
            ready = pb.Header(kind=pb.STEP_READY, phase=pb.TRAIN, step=turn.step, device_index=lane.turn_id[1])
            ready.step_ready.CopyFrom(lane.trainee.squared_norm())
            ready.step_ready.host = self.group.position
            self.group.pass_down(ready)
        if lane.verdict is not None:
            self._apply(lane)

    def _verdict(self, lane: Lane) -> pb.StepApply | None:
        """How the closed turn is applied, once that is known."""
        if lane.verdict is None and not self.group.coordinates:
            lane.verdict = self._verdicts.pop((self.lanes.index(lane), lane.turn_id), None)
        elif lane.verdict is None and lane.closing is not None:
            counted = [self.group.members[index] for index in lane.closing.counted]
            stages = {m.route.device for m in counted if m.active}
            stages |= {f"host {position}" for position in range(self.group.chain_length - 1)}
            if stages <= lane.norms.keys():
                lane.verdict = self._judge(lane)
        return lane.verdict

    def _judge(self, lane: Lane) -> pb.StepApply:
        return judge([lane.trainee.squared_norm(), *lane.norms.values()], self.plan.optimizer.max_norm)

    def _apply(self, lane: Lane) -> None:
        """The closed turn's optimizer step."""
        turn, verdict = lane.turn, lane.verdict
        assert turn is not None
        assert verdict is not None
        if self.group.coordinates and self.plan.optimizer.clip == "global":
            self._decide(lane, pb.Header(kind=pb.STEP_APPLY, phase=pb.TRAIN, step=turn.step, step_apply=verdict))
        if verdict.skip:
            lane.trainee.clear()
        else:
            with self.timeline.interval("step", pb.Header(step=turn.step), ""):
                lane.trainee.step(turn.step, verdict.scale)
        self._closes.pop((self.lanes.index(lane), lane.turn_id), None)
        lane.next()
        left = [m for m in lane.members if m.present]
        if self.group.coordinates and self._mode.waits_for_others and len(left) < self.plan.min_devices:
            raise RunFailed(f"{len(left)} devices are left; at least {self.plan.min_devices} are needed")

    def _decide(self, lane: Lane, header: pb.Header) -> None:
        if lane.turn is not None:
            header.device_index = lane.turn_id[1]
        self.group.decide(lane.members, header)

    def _tell_left_out(self, lane: Lane, counted: list[Member], left_out: list[Member]) -> None:
        new = {m.index for m in left_out} - self._told_left_out
        self._told_left_out -= {m.index for m in counted}
        self._told_left_out |= {m.index for m in left_out}
        if new:
            assert lane.turn is not None
            self.emit(
                "step_closed", step=lane.turn.step, counted=[m.route.device for m in counted],
                left_out=[{"node": m.route.device, "reason": m.gone or m.problem} for m in left_out],
            )  # fmt: skip
