"""A host's part in one round: forward and backward for several devices.

Knows layers, activations and gradients; knows nothing about tokens, about labels beyond their counts (except in a last stage
that holds the head), or about gRPC. Neighbours: `split.group` holds the links, `split.turns` decides when the adapter steps,
`node.service` starts a host and lets devices in.

The compute thread takes, in this order: control frames and results, backward passes, optimizer steps, the forward pass of the
device that waited longest. So an admitted micro-batch never waits for another one's memory. It alone owns all state: workers
compute passes beside it (`split.workers`), and it takes their results through its inbox, per device and direction in the order
in which it started them. The adapter of a lane changes only while nobody computes with it. So no number depends on which of
several workers was faster.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import pairwise
from typing import TypeVar

import torch

from edgelam_fl.errors import ProtocolError
from edgelam_fl.model.stage import Stage
from edgelam_fl.plan.modes import host_mode, label_place
from edgelam_fl.plan.reading import allowed_unit, allows_unit, input_trains, unit_seed
from edgelam_fl.privacy.mechanism import secret_generator
from edgelam_fl.split.fronts import put_together
from edgelam_fl.split.group import Group, relay
from edgelam_fl.split.inbox import Lost, Out
from edgelam_fl.split.judging import is_finite
from edgelam_fl.split.lane import Lane
from edgelam_fl.split.member import Member, Open, check_unit, unit_id
from edgelam_fl.split.passes import Crossing, Forwarded, Gradients, Learned, backward, forward, forward_to_loss
from edgelam_fl.split.private import PrivateSum
from edgelam_fl.split.snapshot import NO_KEEPER, Keeper, SourceState, site_lane
from edgelam_fl.split.timeline import Timeline
from edgelam_fl.split.trainee import Trainee
from edgelam_fl.split.turns import DecidesTurns, FollowsTurns, Handler, Turns
from edgelam_fl.split.workers import Work, Workers
from edgelam_fl.tasks.base import Task, segments_of
from edgelam_fl.tasks.kinds import points_alike
from edgelam_fl.telemetry.events import EmitInJob
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.link import Frame, Link

AroundPass = Callable[[pb.Header], AbstractContextManager[object]]
Passed = TypeVar("Passed")
_GATHER_POLL_S = 0.05
_MOST_TAKEN = 256  # arrivals before work that is due: a flood of frames does not keep the host from computing
_OF_UNITS = {pb.ACT, pb.LABELS, pb.GRAD, pb.GRAD_END}  # kinds of frames that belong to a micro-batch


class Host:
    """One host of a site in one round. `run` works on the caller's thread."""

    def __init__(
        self,
        plan: pb.Plan,
        views: Sequence[Stage],
        group: Group,
        trainees: Sequence[Trainee],
        task: Task | None,
        emit: EmitInJob,
        keeper: Keeper = NO_KEEPER,
        around_pass: AroundPass = nullcontext,
    ) -> None:
        """Prepares the lanes of a round.

        `views`: of the hosted stage, one per worker; with a single one, the thread of `run` computes all. `trainees`: one per
        lane, in the order of `HostMode.sources`. `task`: at a last stage that holds the head; else None. `keeper`: keeps snapshots
        of the lanes. `around_pass`: is entered around each pass of a micro-batch, on the thread that computes it.
        """
        self.plan, self.span, self.group, self.task = plan, views[0].span, group, task
        self._adapted = views[0].adapted
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
        self._workers, self._around_pass = Workers(views, group.inbox.put_over), around_pass

    def _lane(self, members: list[Member], trainee: Trainee) -> Lane:
        plan = self.plan
        private = PrivateSum(plan.privacy, secret_generator()) if plan.privacy.step_clip else None
        mode = host_mode(plan.host_mode)
        source = site_lane(members[0].route.device if mode.has_copies else "")
        return Lane(
            members,
            trainee,
            mode,
            source,
            divides_alone=plan.HasField("privacy"),
            judges_directions=points_alike(plan.task.kind),
            private=private,
        )

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
        with self._workers:
            self._serve()
        self.group.check_enough()

    def _serve(self) -> None:
        taken = 0  # arrivals since something was last due
        while self.group.active() or self.turns.still_to_come():
            due = self._next_due()
            if (due is None or taken < _MOST_TAKEN) and self._take(0.0 if due else self._patience_s()):
                taken += 1
                continue
            taken = 0
            if due is not None:
                due()
            elif not self._is_computing:
                self.turns.give_up_on_the_late()

    @property
    def _is_computing(self) -> bool:
        """Whether workers compute something, the result of which is still to come."""
        return any(member.is_computed_for for member in self.group.members.values())

    def _patience_s(self) -> float:
        """The time until something is due at the latest: nobody is late while a worker computes."""
        return self.plan.deadlines.round_s if self._is_computing else self.turns.patience_s()

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
                device=m.route.device,
                steps=m.missed_steps,
                reason=m.gone or m.missed_for,
                out=bool(m.gone),
                was_counted=bool(m.opposes and m.labels_trained),
            )
            for _, m in sorted(self.group.members.items())
            if m.missed_for or m.gone
        ]

    def labels_of(self, source: str, name: str) -> int:
        """Counts the labels that a source's tensor learned from: those of its devices whose routes cross the layer."""
        return self._lane_of_source[source].labels_trained(name)

    def _next_due(self) -> Callable[[], None] | None:
        backward = self._next_backward()
        if backward is not None:
            return backward
        turn = self.turns.next_work()
        return partial(self._turn, turn) if turn is not None else self._next_forward()

    def _turn(self, turn: Callable[[], None]) -> None:
        began = time.monotonic()
        turn()
        self.compute_seconds += time.monotonic() - began

    def _next_backward(self) -> Callable[[], None] | None:
        """Returns the first backward pass that can start, but of each device none before those that came before it."""
        waiting = set()
        for place, (member, frame) in enumerate(self._backwards):
            saved = member.saved.get(unit_id(frame.header))
            if member.index not in waiting and self._workers.can_start(saved.view if saved else None):
                return partial(self._next_backward_of, place)
            waiting.add(member.index)
        return None

    def _next_backward_of(self, place: int) -> None:
        member, frame = self._backwards[place]
        del self._backwards[place]
        with self.group.working_for(member, member.next):
            self._backward(member, frame)

    def _next_forward(self) -> Callable[[], None] | None:
        if not self._workers.can_start():
            return None
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
        if any(unit < unit_id(header) for unit in member.lacked):
            return False  # one before it is still to come
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
        if isinstance(arrival, Work):
            self._take_over(arrival)
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

    def _take_over(self, work: Work) -> None:
        """Takes work that a worker is through with, and that which waited for it."""
        self._workers.release(work)
        for member in self.group.members.values():
            for started, link in ((member.forward_work, member.previous), (member.backward_work, member.next)):
                self._conclude(member, started, link)

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
        if frame.header.row_names:
            whole = self._with_kept_states(member, frame)
            if whole is None:
                return
            frame = whole
        check_activation(frame, member, self.plan, self.group.hidden_size, self.group.wire)
        check_positions(frame, self.plan)
        check_segments(frame.header, self.plan)
        # In the order of the micro-batches, in which gradients are summed: one whose states were asked for comes late.
        after = sum(unit_id(other.header) < unit_id(frame.header) for other in member.forwards)
        member.forwards.insert(after, frame)

    def _with_kept_states(self, member: Member, frame: Frame) -> Frame | None:
        """Returns the frame with the states of all rows; None if some are not kept here, which the device has been asked for."""
        fronts, header, unit = self.group.fronts, frame.header, unit_id(frame.header)
        if fronts is None:
            raise ProtocolError("names of states, and this host keeps none")
        if unit in member.lacked and header.kept_rows:
            raise ProtocolError(f"micro-batch {header.micro_batch} came without states that it was asked for")
        found = put_together(frame, member.route.device, self.plan, self.group.hidden_size, self.group.wire, fronts)
        if isinstance(found, Frame):
            member.lacked.discard(unit)
            return found
        if len(member.lacked) >= self.plan.window:
            raise ProtocolError(f"more than {self.plan.window} micro-batches in flight (split.window)")
        member.lacked.add(unit)
        missing = pb.Header(
            kind=pb.MISSING, phase=header.phase, step=header.step, micro_batch=header.micro_batch,
            device_index=header.device_index, kept_rows=found,
        )  # fmt: skip
        relay(member.previous, missing)
        return None

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
        """Starts a forward pass; at a last stage with the head, with the loss and the backward pass behind it."""
        header = frame.header
        if not self._is_wanted(member, header):
            return
        inputs, training = frame.tensor, header.phase == pb.TRAIN
        assert inputs is not None
        if training:
            check_unit(header, inputs.shape, member)
            member.begun.add(unit_id(header))
        crossing = self._crossing(member, header, inputs.requires_grad_(training and self._previous_trains(member)))
        if self.task is None:
            passes = partial(forward, crossing=crossing, wire=self.group.wire)
            work = self._work(header, passes, partial(self._forwarded, member, header, crossing))
        else:
            lane = self.turns.lane_of[member.index]
            to_loss = partial(
                forward_to_loss, crossing=crossing, task=self.task, labels=member.labels.pop(unit_id(header)),
                divisor=lane.divisor_of(member) if training else 0, parameters=lane.trainee.parameters,
            )  # fmt: skip
            work = self._work(header, to_loss, partial(self._learned, member, header))
        self._start(member, member.forward_work, member.previous, work)

    def _crossing(self, member: Member, header: pb.Header, inputs: torch.Tensor) -> Crossing:
        training, device = header.phase == pb.TRAIN, member.route.device
        return Crossing(
            inputs, list(header.row_lengths), member.layers,
            adapter=self.turns.lane_of[member.index].trainee.sets[0],
            seed=unit_seed(self.plan, device, header.step, header.micro_batch) if training else None,
            training=training,
            positions=list(header.positions) if self.group.coordinates else [],
            timed=lambda kind: self.timeline.interval(kind, header, device),
            segments=segments_of(header.segment_lengths, header.row_lengths),
        )  # fmt: skip

    def _is_wanted(self, member: Member, header: pb.Header) -> bool:
        """Returns whether a forward pass is not of a step that was closed, or will be, without its device."""
        if member.leaving or header.phase == pb.EVAL:
            return not member.leaving
        return not member.problem and self.turns.lane_of[member.index].is_open(member.index, header.step)

    def _forwarded(self, member: Member, header: pb.Header, crossing: Crossing, passed: Forwarded) -> None:
        if not self._is_wanted(member, header):
            return
        if not passed.is_finite:
            self.turns.take_unusable_gradient(member, "hidden states that give values that are not finite")
            return
        if crossing.training:
            # With a cut adapter, the device's gradient is of its values alone, which follow the hidden states.
            cut_values = self.plan.HasField("lowrank") and self.group.coordinates
            learned = passed.output[..., self.group.hidden_size :] if cut_values else passed.output
            view = passed.view if self.plan.checkpointing else None  # on which the layers are computed again
            member.saved[unit_id(header)] = Open(crossing, learned, view)
        self._send(member.next, pb.ACT, header, passed.output)

    def _learned(self, member: Member, header: pb.Header, learned: Learned) -> None:
        """Takes what a last stage made of a micro-batch: the loss goes to the device, its gradient back along the route."""
        if not self._is_wanted(member, header):
            return
        if header.phase == pb.TRAIN and learned.gradients is None:
            self.turns.take_unusable_gradient(member, "hidden states or labels whose loss is not finite")
            return
        answer = pb.Header(
            kind=pb.LABELS, phase=header.phase, step=header.step, micro_batch=header.micro_batch,
            device_index=header.device_index, loss_sum=learned.loss_sum, sums=learned.sums,
        )  # fmt: skip
        relay(member.next, answer)
        if learned.gradients is not None:
            self._differentiated(member, header, learned.gradients)

    def _backward(self, member: Member, frame: Frame) -> None:
        """Starts a backward pass."""
        header = frame.header
        if not self._is_awaited(member, header):
            return
        saved = member.saved.pop(unit_id(header), None)
        if saved is None:
            self.group.dismiss(
                member, f"broke the protocol: gradient of micro-batch {header.micro_batch}, which is not open"
            )
            return
        learns = header.kind == pb.GRAD
        problem = gradient_problem(frame.tensor, saved.output, self.group.wire) if learns else ""
        if problem:
            self.turns.take_unusable_gradient(member, problem)
            return
        passes = partial(
            backward, crossing=saved.crossing, output=saved.output if learns else None, grad=frame.tensor,
            parameters=self.turns.lane_of[member.index].trainee.parameters,
        )  # fmt: skip
        work = self._work(header, passes, partial(self._differentiated, member, header), saved.view)
        self._start(member, member.backward_work, member.next, work)

    def _is_awaited(self, member: Member, header: pb.Header) -> bool:
        """Returns whether a gradient is not of a step that was closed, or will be, without its device."""
        is_open = self.turns.lane_of[member.index].is_open(member.index, header.step)
        return is_open and not member.problem and not self.turns.is_out(member)

    def _differentiated(self, member: Member, header: pb.Header, gradients: Gradients) -> None:
        """Adds to the device's gradient of the adapter, and sends the inputs' gradient to the previous node."""
        if not self._is_awaited(member, header):
            return
        if gradients.found:
            member.accumulate(gradients.found)
        if not gradients.is_finite:
            self.turns.take_unusable_gradient(member, "a gradient that makes others that are not finite")
            return
        member.backwards_done += 1
        kind = pb.GRAD if gradients.of_inputs is not None else pb.GRAD_END
        self._send(member.previous, kind, header, gradients.of_inputs)

    def _start(self, member: Member, started: deque[Work], link: Link | None, work: Work) -> None:
        """Starts work for a device. `started`: of the same direction. `link`: over which the device brought it."""
        started.append(work)
        self._workers.start(work)
        self._conclude(member, started, link)

    def _work(
        self,
        header: pb.Header,
        passes: Callable[[Stage], Passed],
        then: Callable[[Passed], None],
        view: Stage | None = None,
    ) -> Work:
        """Returns the work of computing passes of a micro-batch. `then`, `view`: as of `Work`."""

        def compute(on: Stage) -> Passed:
            with self._around_pass(header):
                return passes(on)

        return Work(compute, then, view)

    def _conclude(self, member: Member, started: deque[Work], link: Link | None) -> None:
        """Takes results in the order in which they were started, whatever was over first: sums depend on it."""
        while started and started[0].is_over:
            work = started.popleft()
            self.compute_seconds += work.seconds
            with self.group.working_for(member, link):
                work.conclude()

    def _previous_trains(self, member: Member) -> bool:
        """Returns whether anything before this stage on the member's route learns, so that it needs a gradient from here."""
        lora, front = self.plan.lora, member.route.front
        first = next(hop.first for hop in member.route.hops if hop.node == self.plan.node)
        before = (layer for layer in self._adapted if layer < first)
        return input_trains(self.plan) or any(
            lora.train_front if layer < front else lora.train_hosts for layer in before
        )

    def _send(self, link: Link | None, kind: pb.Kind, of: pb.Header, tensor: torch.Tensor | None) -> None:
        assert link is not None
        header = pb.Header(
            kind=kind, phase=of.phase, step=of.step, micro_batch=of.micro_batch, device_index=of.device_index,
            row_lengths=of.row_lengths, positions=() if self.group.coordinates else of.positions,
            segment_lengths=of.segment_lengths,
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
    if not allows_unit(plan, header.phase, rows, tokens):
        allowed = allowed_unit(plan, header.phase)
        raise ProtocolError(f"hidden states of {rows} rows of {tokens} tokens; the plan allows {allowed}")
    if len(header.row_lengths) != rows or not all(1 <= length <= tokens for length in header.row_lengths):
        raise ProtocolError(f"row lengths {list(header.row_lengths)[:8]} do not fit {rows} rows of {tokens} tokens")
    if member.in_flight >= plan.window:
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


def check_segments(header: pb.Header, plan: pb.Plan) -> None:
    """Raises ProtocolError if a device packs examples although the plan does not, or if its rows are not made of them."""
    lengths = list(header.segment_lengths)
    if lengths and not plan.task.packing:
        raise ProtocolError("rows of several examples, and the plan packs none (task.packing)")
    try:
        segments_of(lengths, header.row_lengths)
    except ValueError as error:
        raise ProtocolError(
            f"{len(lengths)} examples do not fill rows of {list(header.row_lengths)[:8]} tokens"
        ) from error


def check_labels(frame: Frame, plan: pb.Plan) -> torch.Tensor:
    """Returns the labels of a micro-batch, at a last stage. Raises ProtocolError if they do not fit the plan."""
    tensor = frame.tensor
    if tensor is None or tensor.dtype != torch.int64 or tensor.dim() not in (1, 2) or not tensor.numel():
        raise ProtocolError("labels must be int64 [rows] or [rows, tokens]")
    rows, tokens = tensor.shape[0], tensor.shape[1] if tensor.dim() == 2 else 1
    if not allows_unit(plan, frame.header.phase, rows, tokens):
        raise ProtocolError(f"labels of shape {list(tensor.shape)} do not fit the plan")
    return tensor


def gradient_problem(grad: torch.Tensor | None, output: torch.Tensor, dtype: torch.dtype) -> str:
    """Returns why a gradient cannot be used; empty if it can. `dtype`: what hidden states travel in."""
    if grad is None or grad.shape != output.shape or grad.dtype != dtype:
        return "a gradient of another shape or dtype than the activation"
    if not is_finite(grad):
        return "a gradient that is not finite"
    return ""
