"""The turns of a host's lanes: when each opens, closes and is applied.

The last host of a chain decides (`DecidesTurns`), the others follow its decisions (`FollowsTurns`). Knows who is counted and
when the optimizer steps; knows nothing about activations. Neighbours: `split.host` computes the gradients, `split.lane` holds
the state of one adapter's turns, `split.group` carries decisions along the chain.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from edgelam_fl.errors import PeerLost, ProtocolError
from edgelam_fl.split.group import Group
from edgelam_fl.split.judging import Size, size_problem
from edgelam_fl.split.lane import Lane, TurnId
from edgelam_fl.split.member import Member, checked_table
from edgelam_fl.split.timeline import Timeline
from edgelam_fl.split.trainee import check_verdict, judge
from edgelam_fl.telemetry.events import EmitInJob, NodeLeftOut, StepClosed
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.link import Frame

STRIKES_ALLOWED = 3  # steps in a row with a problem, before a device is out of the round
Handler = Callable[[Member, Frame], None]


class Turns(ABC):
    """The turns of one host in one round."""

    def __init__(
        self,
        plan: pb.Plan,
        group: Group,
        lanes: Sequence[Lane],
        timeline: Timeline,
        emit: EmitInJob,
        keep: Callable[[Lane, int, int], None] = lambda lane, after, until: None,
    ) -> None:
        """`keep`: called when steps of a lane are done: those after the first number, up to the second."""
        self._keep = keep
        self.plan, self.group, self.lanes, self.timeline, self.emit = plan, group, lanes, timeline, emit
        self.lane_of = {member.index: lane for lane in lanes for member in lane.members}
        self._mode = lanes[0].mode
        self._clips_globally = plan.optimizer.clip == "global"
        self._known_left_out: set[int] = set()  # so that an event is written per change, not per step

    # ---------------------------------------------------------------- what arrives

    def take_table(self, member: Member, frame: Frame) -> None:
        """Takes a device's label counts. Raises ProtocolError if they do not fit the plan."""
        member.table = checked_table(frame.header.table, member, self.plan)
        self.group.send_previous(member, frame.header)

    @abstractmethod
    def handlers_from_next(self) -> Mapping[int, Handler]:
        """Returns what else to do with frames from the next node of a route, by kind."""

    @abstractmethod
    def take_norm_of_host(self, member: Member, frame: Frame) -> None:
        """Takes a STEP_READY of a host before this one: its part of the gradient's norm (clip = "global")."""

    @abstractmethod
    def take_unusable_gradient(self, member: Member, problem: str) -> None:
        """Notes that a device's gradient of the open turn cannot be used."""

    # ---------------------------------------------------------------- what is due

    def next_work(self) -> Callable[[], None] | None:
        """Returns what is due first: to open a lane's turns, or to close or apply an open turn. None: nothing."""
        for lane in self.lanes:
            if lane.turns is None:
                if self._may_begin(lane):
                    return partial(self._begin, lane)
            elif any(member.is_computed_for for member in lane.members):
                continue  # with the adapter as it is
            elif lane.closing is not None:
                if self._verdict(lane) is not None:
                    return partial(self._apply, lane)
            elif lane.turn is not None and self._may_close(lane):
                return partial(self._close, lane)
        return None

    @abstractmethod
    def patience_s(self) -> float:
        """Returns how long the host may wait for frames before `give_up_on_the_late` is due, in seconds."""

    @abstractmethod
    def give_up_on_the_late(self) -> None:
        """Goes on without the devices whose part of an open turn is later than its deadline."""

    def still_to_come(self) -> bool:
        """Returns whether turns of devices that are through are not applied here yet: decisions are on their way."""
        return False

    def awaits_close(self, member: Member) -> bool:
        """Returns whether the decision about a device's open turn has not arrived yet."""
        return False

    @abstractmethod
    def is_out(self, member: Member) -> bool:
        """Returns whether no gradient of a device is needed any more."""

    # ---------------------------------------------------------------- a turn's course

    def _may_begin(self, lane: Lane) -> bool:
        active = self._whose_tables_matter(lane)
        return bool(self.plan.steps and active) and all(member.table for member in active)

    def _begin(self, lane: Lane) -> None:
        """Opens the first turn of a lane: the label counts of all its devices are here."""
        totals = self._totals(lane)
        labels_of = lambda index, step: self.group.members[index].labels_of(step)  # noqa: E731
        turns = self._mode.turns(totals, labels_of, self.plan.seed, self.plan.optimizer.step_offset)
        lane.begin(turns, self.plan.first_step)
        self._keep(lane, self.plan.first_step, self._done(lane))
        self.timeline.open()
        self._announce(lane, pb.Header(kind=pb.TABLE_ALL, phase=pb.TRAIN, table_all=pb.TableAll(steps=totals)))

    def _close(self, lane: Lane) -> None:
        """Fixes who counts in the open turn, and sums their gradients."""
        turn = lane.turn
        assert turn is not None
        for index, problem in lane.judge_gradients(self._counted(lane), self.plan.gradient_factor).items():
            self.group.members[index].problem = problem
        counted = self._counted(lane)
        left_out = [self.group.members[index] for index in turn.members if self.group.members[index] not in counted]
        close = lane.close(counted, left_out)
        self._announce(lane, pb.Header(kind=pb.STEP_CLOSE, phase=pb.TRAIN, step=turn.step, step_close=close))
        self._note_left_out(turn.step, counted, left_out)
        for member in left_out:
            self._strike(lane, member, member.problem)
        for member in counted:
            member.labels_trained += member.labels_of(turn.step)
        lane.gather_gradients(counted)
        if not self._clips_globally or not counted:
            # With differential privacy, a step with noise alone: to skip it would say that nobody was counted.
            lane.verdict = pb.StepApply(scale=1.0, skip=not counted and lane.private is None)
            self._apply(lane)
        else:
            self._report_norm(lane)

    def _apply(self, lane: Lane) -> None:
        """Makes the optimizer step of the closed turn."""
        turn, verdict = lane.turn, lane.verdict
        assert turn is not None
        assert verdict is not None
        if self._clips_globally:
            self._announce(lane, pb.Header(kind=pb.STEP_APPLY, phase=pb.TRAIN, step=turn.step, step_apply=verdict))
        if verdict.skip:
            lane.trainee.clear()
        else:
            with self.timeline.interval("step", pb.Header(step=turn.step)):
                lane.trainee.step(turn.step, verdict.scale)
        assert lane.closing is not None
        for index in set(lane.closing.counted) - lane.struck:
            self.group.members[index].strikes = 0
        lane.advance()
        self._keep(lane, turn.step, self._done(lane))
        self._check_enough(lane)

    def _done(self, lane: Lane) -> int:
        """Counts the steps of the phase of which no turn of a lane is to come."""
        return lane.turn.step if lane.turn is not None else self.plan.steps

    def _strike(self, lane: Lane, member: Member, problem: str) -> None:
        """Notes that the open turn does without a device, or without its norm; one that stays a problem is dismissed.

        `problem`: of the device in this turn; empty if the coordinator decided, or the device was gone.
        """
        member.missed_steps, member.missed_for = member.missed_steps + 1, problem or member.gone or member.missed_for
        if not problem:
            return
        lane.struck.add(member.index)
        member.strikes += 1
        if member.strikes >= STRIKES_ALLOWED:
            self.group.dismiss(member, f"left out of {STRIKES_ALLOWED} steps in a row: {problem}")

    def _check_norm_of_host(self, header: pb.Header) -> None:
        """Raises ProtocolError if a STEP_READY from before this host is none of a host's."""
        ready = header.step_ready
        if ready.host >= self.group.position or not _is_norm(ready):
            raise ProtocolError(
                f"a norm of host {ready.host}, squared {ready.squared_norm}, at host {self.group.position}"
            )

    @abstractmethod
    def _whose_tables_matter(self, lane: Lane) -> list[Member]:
        """Lists the devices whose label counts a lane needs before its first turn opens."""

    @abstractmethod
    def _totals(self, lane: Lane) -> list[pb.StepTotal]:
        """Returns labels and members of each step of the phase."""

    @abstractmethod
    def _may_close(self, lane: Lane) -> bool:
        """Returns whether all is here that closing the open turn needs."""

    @abstractmethod
    def _counted(self, lane: Lane) -> list[Member]:
        """Lists the devices that count in the open turn, in device order."""

    @abstractmethod
    def _verdict(self, lane: Lane) -> pb.StepApply | None:
        """Returns how the closed turn is applied; None as long as that is not known."""

    @abstractmethod
    def _report_norm(self, lane: Lane) -> None:
        """Sends this stage's part of the gradient's norm to the coordinator."""

    @abstractmethod
    def _announce(self, lane: Lane, header: pb.Header) -> None:
        """Sends a decision to a lane's devices, and along their routes to the other hosts."""

    @abstractmethod
    def _check_enough(self, lane: Lane) -> None:
        """Raises PeerLost with fewer devices than the plan needs."""

    def _note_left_out(self, step: int, counted: Sequence[Member], left_out: Sequence[Member]) -> None:
        new = {m.index for m in left_out} - self._known_left_out
        self._known_left_out -= {m.index for m in counted}
        self._known_left_out |= {m.index for m in left_out}
        if new:
            missing = tuple(NodeLeftOut(node=m.route.device, reason=m.gone or m.problem) for m in left_out)
            self.emit(StepClosed(step=step, counted=tuple(m.route.device for m in counted), left_out=missing))


class DecidesTurns(Turns):
    """The turns at the last host of a chain, the coordinator: it closes them when all gradients are in, or late."""

    def handlers_from_next(self) -> Mapping[int, Handler]:
        return {pb.STEP_READY: self._take_norm_of_device}

    def take_norm_of_host(self, member: Member, frame: Frame) -> None:
        self._check_norm_of_host(frame.header)
        self._take_norm(member, _host_name(frame.header.step_ready.host), frame.header)

    def _take_norm_of_device(self, member: Member, frame: Frame) -> None:
        if not _is_norm(frame.header.step_ready):
            raise ProtocolError(f"a squared norm of {frame.header.step_ready.squared_norm}")
        self._take_norm(member, member.route.device, frame.header)

    def _take_norm(self, member: Member, stage: str, header: pb.Header) -> None:
        """Notes a stage's part of the norm of the open turn; of the copies that come along several routes, the first."""
        lane = self.lane_of[member.index]
        if lane.turn is not None and lane.turn_id == (header.step, self._mode.turn_index(header.device_index)):
            lane.norms.setdefault(stage, header.step_ready)

    def take_unusable_gradient(self, member: Member, problem: str) -> None:
        member.problem = problem

    def patience_s(self) -> float:
        """The time until the next deadline; without one, pings find those who are lost."""
        deadline_s = self.plan.deadlines.step_s
        left = [lane.opened + deadline_s - time.monotonic() for lane in self._lanes_with_deadline()]
        return max(0.0, min(left, default=self.plan.deadlines.round_s))

    def give_up_on_the_late(self) -> None:
        deadline_s = self.plan.deadlines.step_s
        for lane in self._lanes_with_deadline():
            if time.monotonic() < lane.opened + deadline_s:
                continue
            if lane.closing is not None:
                lane.verdict = self._judge(lane)  # the others step without the norms that did not come
                continue
            for member in lane.pending():
                member.problem = f"later than {deadline_s:.0f} s"

    def is_out(self, member: Member) -> bool:
        return bool(member.gone)

    def _lanes_with_deadline(self) -> list[Lane]:
        return [lane for lane in self.lanes if lane.turn is not None] if self._mode.waits_for_others else []

    def _whose_tables_matter(self, lane: Lane) -> list[Member]:
        return [member for member in lane.members if member.active]

    def _totals(self, lane: Lane) -> list[pb.StepTotal]:
        """Sums the labels of each step over the devices that are here.

        With differential privacy, the steps do not depend on who has a batch: a device without one is a member with nothing.
        """
        totals = []
        for step in range(self.plan.steps):
            labels = {member.index: member.labels_of(step) for member in lane.members if member.active}
            members = [index for index, count in sorted(labels.items()) if count or lane.private is not None]
            totals.append(pb.StepTotal(labels=sum(labels.values()), members=members))
        return totals

    def _may_close(self, lane: Lane) -> bool:
        return not lane.pending()

    def _counted(self, lane: Lane) -> list[Member]:
        return [member for member in lane.ready() if member.present]

    def _verdict(self, lane: Lane) -> pb.StepApply | None:
        if lane.verdict is None and lane.closing is not None:
            counted = [self.group.members[index] for index in lane.closing.counted]
            stages = {member.route.device for member in counted if member.active}
            stages |= {_host_name(position) for position in range(self.group.chain_length - 1)}
            if stages <= lane.norms.keys():
                lane.verdict = self._judge(lane)
        return lane.verdict

    def _judge(self, lane: Lane) -> pb.StepApply:
        """Returns how all stages apply the closed turn; norms that cannot be used scale nobody's gradient."""
        assert lane.closing is not None
        hosts = [lane.norms[name] for name in map(_host_name, range(self.group.position)) if name in lane.norms]
        return judge([lane.trainee.squared_norm(), *hosts, *self._norms_of_devices(lane)], self.plan.optimizer.max_norm)

    def _norms_of_devices(self, lane: Lane) -> list[pb.StepReady]:
        """Returns the norms that the turn's devices reported, of their own layers; those out of all proportion get a strike."""
        assert lane.closing is not None
        counted = [self.group.members[index] for index in lane.closing.counted]
        reported = {m.index: ready for m in counted if (ready := lane.norms.get(m.route.device)) is not None}
        sizes = {index: _size_of(ready) for index, ready in reported.items()}
        problems = {i: size_problem(size, list(sizes.values()), self.plan.gradient_factor) for i, size in sizes.items()}
        for index, problem in problems.items():
            if problem:
                self._strike(lane, self.group.members[index], f"in its own layers {problem}")
        return [ready for index, ready in reported.items() if not problems[index]]

    def _report_norm(self, lane: Lane) -> None:
        """Sends nothing: the norms of all stages come together here."""

    def _announce(self, lane: Lane, header: pb.Header) -> None:
        if lane.turn is not None:
            header.device_index = lane.turn_id[1]
        if self.plan.HasField("privacy"):
            self.group.decide(lane.members, header, _without_others)
        else:
            self.group.decide(lane.members, header)

    def _check_enough(self, lane: Lane) -> None:
        left = [member for member in lane.members if member.present]
        if self._mode.waits_for_others and len(left) < self.plan.min_devices:
            raise PeerLost(f"devices left: {len(left)}; at least {self.plan.min_devices} are needed")


class FollowsTurns(Turns):
    """The turns at any other host of a chain: it counts whom the coordinator counted, and waits for their gradients."""

    def handlers_from_next(self) -> Mapping[int, Handler]:
        """Each decision comes once per device; the first copy is used, all are passed on."""
        decisions = {
            pb.TABLE_ALL: self._take_totals, pb.STEP_CLOSE: self._take_close, pb.STEP_APPLY: self._take_verdict,
        }  # fmt: skip
        return {kind: partial(self._take_decision, take) for kind, take in decisions.items()}

    def _take_decision(self, take: Callable[[Lane, pb.Header], None], member: Member, frame: Frame) -> None:
        take(self.lane_of[member.index], frame.header)
        self.group.send_previous(member, frame.header)

    def _take_totals(self, lane: Lane, header: pb.Header) -> None:
        steps = header.table_all.steps
        unknown = {index for total in steps for index in total.members} - self.group.members.keys()
        if unknown:
            raise ProtocolError(f"a TABLE_ALL with device {min(unknown)}, which has no route here")
        if lane.totals is None and len(steps) != self.plan.steps:
            raise ProtocolError(f"a TABLE_ALL of {len(steps)} steps; the plan has {self.plan.steps}")
        if lane.totals is None:
            lane.totals = list(steps)

    def _take_close(self, lane: Lane, header: pb.Header) -> None:
        lane.closes.setdefault(self._turn_id(lane, header), header.step_close)

    def _take_verdict(self, lane: Lane, header: pb.Header) -> None:
        check_verdict(header.step_apply)
        lane.verdicts.setdefault(self._turn_id(lane, header), header.step_apply)

    def _turn_id(self, lane: Lane, header: pb.Header) -> TurnId:
        """Returns which turn a decision is about. Raises ProtocolError if the lane has no such turn."""
        index = self._mode.turn_index(header.device_index)
        if header.step >= self.plan.steps or index not in {self._mode.turn_index(m.index) for m in lane.members}:
            raise ProtocolError(f"a decision about step {header.step} of device {header.device_index}; there is none")
        return header.step, index

    def take_norm_of_host(self, member: Member, frame: Frame) -> None:
        self._check_norm_of_host(frame.header)
        self.group.send_next(member, frame.header)

    def take_unusable_gradient(self, member: Member, problem: str) -> None:
        """Dismisses the device: the coordinator counts it, as its gradient was usable there."""
        self.group.dismiss(member, problem)

    def patience_s(self) -> float:
        return self.plan.deadlines.round_s

    def give_up_on_the_late(self) -> None:
        """Does nothing: the coordinator goes on without them."""

    def still_to_come(self) -> bool:
        unfinished = [lane for lane in self.lanes if lane.turns is not None and not lane.is_through]
        return any(member.present for lane in unfinished for member in lane.members)

    def awaits_close(self, member: Member) -> bool:
        lane = self.lane_of[member.index]
        return lane.turn is not None and lane.decided_close is None and self.still_to_come()

    def is_out(self, member: Member) -> bool:
        """Returns False always: gradients of a step that the coordinator has counted are needed, whatever became of the device."""
        return False

    def _whose_tables_matter(self, lane: Lane) -> list[Member]:
        """The totals came with one device; the tables of the other devices may still be on their way."""
        counted = {index for total in lane.totals or [] for index in total.members}
        return [member for member in lane.members if member.active and member.index in counted]

    def _totals(self, lane: Lane) -> list[pb.StepTotal]:
        assert lane.totals is not None
        return lane.totals

    def _may_close(self, lane: Lane) -> bool:
        close = lane.decided_close
        return close is not None and not lane.pending(list(close.counted))

    def _counted(self, lane: Lane) -> list[Member]:
        close = lane.decided_close
        assert close is not None
        return lane.ready(list(close.counted))

    def _verdict(self, lane: Lane) -> pb.StepApply | None:
        if lane.verdict is None:
            lane.verdict = lane.verdicts.pop(lane.turn_id, None)
        return lane.verdict

    def _report_norm(self, lane: Lane) -> None:
        step, device_index = lane.turn_id
        ready = pb.Header(kind=pb.STEP_READY, phase=pb.TRAIN, step=step, device_index=device_index)
        ready.step_ready.CopyFrom(lane.trainee.squared_norm())
        ready.step_ready.host = self.group.position
        self.group.send_next_over_any(ready)

    def _announce(self, lane: Lane, header: pb.Header) -> None:
        """Sends nothing: what the coordinator decided was passed on when it came."""

    def _check_enough(self, lane: Lane) -> None:
        """Checks nothing: the coordinator does."""


def _without_others(header: pb.Header, member: Member) -> pb.Header:
    """Returns what a decision says about one device, so that it does not learn who else takes part, or with how many labels."""
    own = pb.Header()
    own.CopyFrom(header)
    if header.kind == pb.TABLE_ALL:
        totals = [
            pb.StepTotal(labels=row.labels, members=[member.index] * bool(row.labels)) for row in member.table or []
        ]
        own.table_all.CopyFrom(pb.TableAll(steps=totals))
    elif header.kind == pb.STEP_CLOSE:
        close = header.step_close
        counted = [index for index in close.counted if index == member.index]
        left_out = [left for left in close.left_out if left.device_index == member.index]
        own.step_close.CopyFrom(pb.StepClose(counted=counted, left_out=left_out))
    return own


def _is_norm(ready: pb.StepReady) -> bool:
    """Returns whether a squared norm is one."""
    return math.isfinite(ready.squared_norm) and ready.squared_norm >= 0


def _size_of(ready: pb.StepReady) -> Size:
    """Returns the size of a device's own gradient, which is a mean over the device's own labels."""
    norm = math.sqrt(ready.squared_norm) if ready.finite else math.inf
    return Size(norm, norm)


def _host_name(position: int) -> str:
    """Names a host of the chain among the stages whose norms are summed."""
    return f"host {position}"
