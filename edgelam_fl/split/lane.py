"""A host's lane: one adapter, the order in which it steps, and what was decided about its turns.

Knows gradients and counts; knows no links. `split.turns` opens, closes and applies the turns.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from edgelam_fl.plan.modes import HostMode, Turn
from edgelam_fl.split.judging import (
    LEAST_SOURCES,
    Size,
    bearings_of,
    direction_problem,
    norm_of,
    size_problem,
)
from edgelam_fl.split.member import Member, crosses
from edgelam_fl.split.private import PrivateSum
from edgelam_fl.split.snapshot import Damaged, SourceState
from edgelam_fl.split.trainee import Trainee
from edgelam_fl.wire import edgelam_pb2 as pb

TurnId = tuple[int, int]  # step, device index as HostMode.turn_index gives it


@dataclass(eq=False)
class Lane:
    """One adapter and the devices that train it; at most one of its turns is open at a time."""

    members: list[Member]
    trainee: Trainee
    mode: HostMode
    source: str = ""  # name of the adapter in a snapshot
    divides_alone: bool = False  # each device's loss is divided by its own labels alone, whatever the mode
    judges_directions: bool = False  # honest devices do not point against each other in this task
    private: PrivateSum | None = None  # how gradients are summed with differential privacy; None: without
    turns: list[Turn] | None = None  # None: the devices' label counts are not known yet
    number: int = 0  # of the open turn
    opened: float = field(default_factory=time.monotonic)  # when the open turn became the open one
    closing: pb.StepClose | None = None  # the open turn is closed and waits to be applied (clip = "global")
    verdict: pb.StepApply | None = None  # how the open turn will be applied
    norms: dict[str, pb.StepReady] = field(default_factory=dict)  # by stage; at the coordinator
    struck: set[int] = field(default_factory=set)  # devices that had a problem in the open turn
    # What the coordinator decided, as it arrived at another host; of turns that are not applied here yet.
    totals: list[pb.StepTotal] | None = None
    closes: dict[TurnId, pb.StepClose] = field(default_factory=dict)
    verdicts: dict[TurnId, pb.StepApply] = field(default_factory=dict)
    # Devices of the attempt that this one goes on from, which are no members any more: what they gave stays in the adapter.
    former: dict[str, dict[str, Any]] = field(default_factory=dict)  # by name, as of `Member.state`

    # ---------------------------------------------------------------- the open turn

    @property
    def turn(self) -> Turn | None:
        """The open turn; None before the first and after the last."""
        return self.turns[self.number] if self.turns is not None and self.number < len(self.turns) else None

    @property
    def turn_id(self) -> TurnId:
        """The name of the open turn on the wire."""
        turn = self.turn
        assert turn is not None
        return turn.step, self.mode.turn_index(turn.members[0])

    def steps_over(self, planned: int) -> int:
        """Counts the steps before the open turn's, of `planned` in the round; on any thread."""
        turns, number = self.turns or [], self.number
        if self.turns is not None and number >= len(turns):
            return planned
        return turns[number].step if turns else 0

    @property
    def is_through(self) -> bool:
        """Whether all turns are applied."""
        return self.turns is not None and self.number >= len(self.turns)

    @property
    def decided_close(self) -> pb.StepClose | None:
        """The coordinator's decision about the open turn; None until it has arrived."""
        return self.closes.get(self.turn_id) if self.turn is not None else None

    def is_past(self, index: int, step: int) -> bool:
        """Returns whether the turn with a device's batch of `step` is applied."""
        if self.turns is None:
            return False
        return not any(turn.has(index, step) for turn in self.turns[self.number :])

    def is_open(self, index: int, step: int) -> bool:
        """Returns whether the open turn takes the gradient of a device's batch of `step`."""
        return self.turn is not None and self.closing is None and self.turn.has(index, step)

    def pending(self, counted: Sequence[int] | None = None) -> list[Member]:
        """Lists the members of the open turn whose gradients are still to come.

        `counted`: device indices that the coordinator counted; None: all of the turn.
        """
        turn = self.turn
        assert turn is not None
        wanted = turn.members if counted is None else counted
        return [
            m for m in self.members
            if m.index in wanted and m.present and not m.problem and m.backwards_done < m.units_of(turn.step)
        ]  # fmt: skip

    def ready(self, counted: Sequence[int] | None = None) -> list[Member]:
        """Lists the members of the open turn whose gradients are complete, in device order. `counted`: as of `pending`."""
        turn = self.turn
        assert turn is not None
        wanted = [m for m in self.members if m.index in turn.members and (counted is None or m.index in counted)]
        return [m for m in wanted if not m.problem and m.table and m.backwards_done == m.units_of(turn.step)]

    def divisor_of(self, member: Member) -> int:
        """Returns what a device's loss in the open turn is divided by."""
        turn = self.turn
        assert turn is not None
        return member.labels_of(turn.step) if self.divides_alone else turn.labels

    # ---------------------------------------------------------------- its course

    def begin(self, turns: list[Turn], first_step: int = 0) -> None:
        """Opens the first of the lane's turns. `first_step`: steps that are done, by an earlier attempt."""
        self.turns, self.opened = turns, time.monotonic()
        self.number = sum(turn.step < first_step for turn in turns)

    def labels_trained(self, name: str = "") -> int:
        """Counts the labels of all steps that the devices were counted in; with `name`, those that its tensor learned from."""
        former = [one["labels_trained"] for one in self.former.values() if not name or crosses(one["layers"], name)]
        return sum(m.labels_trained for m in self.members if not name or m.crosses(name)) + sum(former)

    def state(self, report: pb.JobReport) -> SourceState:
        """Returns what a later attempt needs to go on after the newest step. `report`: what was measured so far."""
        trained = self.trainee.state()
        members = self.former | {member.route.device: member.state() for member in self.members}
        return SourceState(trained.arrays, {**trained.numbers, "members": members}, report)

    def restore(self, state: SourceState) -> None:
        """Goes on from a state of an earlier attempt. Raises Damaged if it is that of another lane."""
        self.trainee.restore(state)
        self.former = dict(state.numbers["members"])
        for member in self.members:
            earlier = self.former.pop(member.route.device, None)
            if earlier is None:
                raise Damaged(f"device {member.route.device} is new")
            member.restore(earlier)

    def judge_gradients(self, complete: Sequence[Member], factor: float) -> dict[int, str]:
        """Measures the gradients of the open turn; returns the problems of those that must not be added, by device index.

        Their sizes are compared with the largest ones of all the lane's devices in the round, their directions with each other over the steps
        so far if `judges_directions`. `factor`: as of `size_problem`; with 0, no direction is judged either.
        """
        turn = self.turn
        assert turn is not None
        for member in complete:
            norm = norm_of(member.gradients or [])
            member.size = Size(norm, norm * self.divisor_of(member) / max(1, member.labels_of(turn.step)))
        group = [
            member.size.at_least(member.largest)
            for member in self.members
            if member.size is not None and not member.gone
        ]
        problems = {m.index: size_problem(m.size, group, factor) for m in complete if m.size is not None}
        for member in complete:
            if member.size is not None and not problems[member.index]:
                member.largest = member.size.at_least(member.largest)
        if factor and self.judges_directions and len(turn.members) >= LEAST_SOURCES:
            sound = [member for member in complete if not problems[member.index]]
            self._judge_directions(sound, turn.step)
            problems |= {member.index: member.opposes for member in sound}
        return {index: problem for index, problem in problems.items() if problem}

    def _judge_directions(self, members: Sequence[Member], step: int) -> None:
        """Notes which of the open turn's gradients, whose sizes are fine, work against the others'.

        A device that does is not used for the rest of the round, and has no vote any more.
        """
        voters = [member for member in members if not member.opposes]
        for member in voters:
            if member.size is not None and member.size.added > 0:
                member.course.add(member.gradients or [], member.size)
        voters = [member for member in voters if member.course.steps and member.course.says_much(step)]
        for member, bearing in zip(voters, bearings_of([member.course for member in voters]), strict=True):
            if problem := direction_problem(bearing, "federation.gradient_factor"):
                member.opposes = f"gradients {problem}"

    def close(self, counted: Sequence[Member], left_out: Sequence[Member]) -> pb.StepClose:
        """Closes the open turn: from here on no gradient is added to it."""
        turn = self.turn
        assert turn is not None
        self.closing = pb.StepClose(
            counted=[m.index for m in counted],
            labels_counted=sum(m.labels_of(turn.step) for m in counted),
            left_out=[pb.LeftOut(device_index=m.index, reason=m.gone or m.problem) for m in left_out],
        )
        return self.closing

    def gather_gradients(self, counted: Sequence[Member]) -> None:
        """Sets the step's gradient: the sum over the counted members, in device order whatever order they came in.

        Each member divided by the turn's labels. A layer that only some counted members cross learns from their labels
        alone (protocol section 5), so its sum is scaled by all labels over theirs; but not with differential privacy, where
        the sum must not depend on any count.
        """
        turn = self.turn
        assert turn is not None
        if self.private is not None:
            each = [member.gradients or [] for member in counted]
            self.trainee.set_gradients(self.private.of(each, self.trainee.parameters))
            return
        total: list[torch.Tensor | None] = []
        for number, name in enumerate(self.trainee.names):
            crossing = [m for m in counted if m.crosses(name)]
            gradients = [m.gradients[number] for m in crossing if m.gradients and m.gradients[number] is not None]
            summed = gradients[0] if gradients else None
            for gradient in gradients[1:]:
                summed = summed + gradient  # type: ignore[operator]
            labels = sum(m.labels_of(turn.step) for m in crossing)
            total.append(summed if summed is None or labels == turn.labels else summed * (turn.labels / labels))
        self.trainee.set_gradients(total)

    def advance(self) -> None:
        """Leaves the open turn behind, drops what is left of it and opens the next one."""
        turn = self.turn
        assert turn is not None
        self.closes.pop(self.turn_id, None)
        for member in self.members:
            if member.index in turn.members:
                member.forget(turn.step)
        self.number += 1
        self.closing, self.verdict = None, None
        self.norms.clear()
        self.struck.clear()
        self.opened = time.monotonic()
