"""A host's lane: one adapter, and the order in which it steps (`plan.modes`).

Knows gradients and counts; knows no links. `split.host` decides when a turn closes, and tells the others.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from edgelam_fl.plan.modes import HostMode, Turn
from edgelam_fl.split.member import Gradients, Member
from edgelam_fl.split.trainee import Trainee
from edgelam_fl.wire import edgelam_pb2 as pb

TurnId = tuple[int, int]  # step, device index as HostMode.turn_index gives it


@dataclass
class Lane:
    members: list[Member]
    trainee: Trainee
    mode: HostMode
    totals: list[pb.StepTotal] | None = None  # the coordinator's word; not at the coordinator itself
    turns: list[Turn] | None = None  # unknown until all tables are in
    number: int = 0  # of the open turn
    opened: float = field(default_factory=time.monotonic)
    closing: pb.StepClose | None = None  # the open turn is closed and waits for STEP_APPLY (clip = "global")
    norms: dict[str, pb.StepReady] = field(default_factory=dict)  # by stage, at the coordinator
    verdict: pb.StepApply | None = None

    @property
    def turn(self) -> Turn | None:
        """The open one; None before the first and after the last."""
        return self.turns[self.number] if self.turns is not None and self.number < len(self.turns) else None

    @property
    def turn_id(self) -> TurnId:
        turn = self.turn
        assert turn is not None
        return turn.step, self.mode.turn_index(turn.members[0])

    @property
    def is_through(self) -> bool:
        return self.turns is not None and self.number >= len(self.turns)

    def is_past(self, index: int, step: int) -> bool:
        """Whether a device's part in a step is closed here."""
        if self.turns is None:
            return False
        return not any(turn.has(index, step) for turn in self.turns[self.number :])

    def is_open(self, index: int, step: int) -> bool:
        return self.turn is not None and self.closing is None and self.turn.has(index, step)

    def pending(self, counted: Sequence[int] | None) -> list[Member]:
        """Members of the open turn whose gradients are still to come. `counted`: who is in it by the coordinator's word."""
        turn = self.turn
        assert turn is not None
        wanted = turn.members if counted is None else counted
        return [
            m for m in self.members
            if m.index in wanted and m.present and not m.problem and m.backwards_done < m.units_of(turn.step)
        ]  # fmt: skip

    def ready(self, counted: Sequence[int] | None) -> list[Member]:
        """Members of the open turn all of whose gradients are here, in device order."""
        turn = self.turn
        assert turn is not None
        wanted = [m for m in self.members if m.index in turn.members and (counted is None or m.index in counted)]
        return [m for m in wanted if not m.problem and m.table and m.backwards_done == m.units_of(turn.step)]

    def gather_gradients(self, counted: Sequence[Member]) -> None:
        """Sets the step's gradient: the counted members' sums, in device order, whoever came first.

        Each member divided by the turn's labels. A layer that only some counted members cross learns from their labels
        alone (protocol section 5), so its sum is scaled by all labels over theirs.
        """
        turn = self.turn
        assert turn is not None
        total: list[torch.Tensor | None] = []
        for number, name in enumerate(self.trainee.names):
            crossing = [m for m in counted if m.crosses(name)]
            parts = [m.gradients[number] for m in crossing if m.gradients and m.gradients[number] is not None]
            summed = parts[0] if parts else None
            for part in parts[1:]:
                summed = summed + part  # type: ignore[operator]
            labels = sum(m.labels_of(turn.step) for m in crossing)
            total.append(summed if summed is None or labels == turn.labels else summed * (turn.labels / labels))
        self.trainee.set_gradients(total)

    def next(self) -> None:
        """The open turn is behind; whatever is left of it is dropped."""
        turn = self.turn
        assert turn is not None
        for member in self.members:
            if member.index in turn.members:
                member.forget(turn.step)
        self.number += 1
        self.closing, self.verdict = None, None
        self.norms.clear()
        self.opened = time.monotonic()


def accumulate(member: Member, gradients: Gradients) -> None:
    """One accumulator a device, in micro-batch order: who arrives first must not change the sum."""
    if member.gradients is None:
        member.gradients = gradients
        return
    for number, new in enumerate(gradients):
        old = member.gradients[number]
        if new is not None:
            member.gradients[number] = new if old is None else old.add_(new)
