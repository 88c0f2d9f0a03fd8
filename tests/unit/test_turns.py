"""Turns at both kinds of hosts: the coordinator's decisions, and a host that follows them. No stage, no links."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from edgelam_fl.errors import ProtocolError
from edgelam_fl.model.source import ModelSource
from edgelam_fl.plan.making import RoundFacts
from edgelam_fl.plan.modes import host_mode
from edgelam_fl.split.group import Group
from edgelam_fl.split.lane import Lane
from edgelam_fl.split.member import Member
from edgelam_fl.split.timeline import Timeline
from edgelam_fl.split.turns import STRIKES_ALLOWED, DecidesTurns, FollowsTurns, Turns
from edgelam_fl.telemetry.events import JobEvent, LinkLost, StepClosed
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.link import Frame
from tests.fleet import Fleet
from tests.support import run_config

LABELS, STEPS = {0: 3, 1: 5}, 2
TURNS = {"edge-1": FollowsTurns, "edge-2": DecidesTurns}


class Sent:
    """A link that only notes what is sent."""

    name, closed = "noted", False

    def __init__(self) -> None:
        self.headers: list[pb.Header] = []

    def send(self, header: pb.Header) -> None:
        self.headers.append(header)

    def close(self) -> None:
        self.closed = True

    def kinds(self) -> list[str]:
        return [pb.Kind.Name(header.kind) for header in self.headers]


class Stepping:
    """A trainee that only counts its steps."""

    names: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.steps: list[tuple[int, float]] = []
        self.cleared = 0

    def set_gradients(self, gradients: list[torch.Tensor | None]) -> None:
        assert gradients == []

    def squared_norm(self) -> pb.StepReady:
        return pb.StepReady(squared_norm=9.0, finite=True)

    def step(self, number: int, scale: float) -> None:
        self.steps.append((number, scale))

    def clear(self) -> None:
        self.cleared += 1


class Site:
    """The turns of one host of a chain of two, `node`, with two devices whose links are open."""

    def __init__(self, source: ModelSource, node: str, *overrides: str) -> None:
        nodes: dict[str, Any] = {"device-1": None, "device-2": None}
        hosts: dict[str, Any] = {name: (None, name) for name in TURNS}
        config = run_config(source.name, "split.hosts=2", *overrides)
        facts = RoundFacts("run", 1, 1, 0, STEPS)
        self.plan = Fleet(source, config, nodes, hosts).plans(facts)[node]
        self.events: list[JobEvent] = []
        emit = self.events.append
        self.group = Group(self.plan, source.hidden_size, torch.float32, 2, lambda *_: None, emit)
        self.members = [self.group.members[index] for index in sorted(LABELS)]
        for member in self.members:
            member.previous, member.next = Sent(), Sent()  # type: ignore[assignment]
        self.trainee, mode = Stepping(), host_mode(self.plan.host_mode)
        self.lane = Lane(self.members, self.trainee, mode)  # type: ignore[arg-type]
        self.turns: Turns = TURNS[node](self.plan, self.group, [self.lane], Timeline("host"), emit)

    def hear(self, member: Member, **fields: Any) -> None:
        """Plays a frame from the next node on a device's route."""
        header = pb.Header(phase=pb.TRAIN, **fields)
        self.turns.handlers_from_next()[header.kind](member, Frame(header))

    def tables(self) -> None:
        for member in self.members:
            rows = [pb.StepRow(labels=LABELS[member.index], rows=[1], tokens=[8])] * STEPS
            self.turns.take_table(member, Frame(pb.Header(kind=pb.TABLE, table=pb.Table(steps=rows))))

    def gradients(self, *members: Member) -> None:
        for member in members:
            member.gradients, member.backwards_done = [], member.units_of(0)

    def work(self) -> int:
        """Does all that is due; returns how much that was."""
        done = 0
        while (work := self.turns.next_work()) is not None:
            work()
            done += 1
        return done


def sent(member: Member) -> tuple[list[str], list[str]]:
    """Returns the kinds of frames that went to the previous and to the next node of a device's route."""
    return member.previous.kinds(), member.next.kinds()  # type: ignore[attr-defined]


TOTALS = pb.TableAll(steps=[pb.StepTotal(labels=8, members=[0, 1])] * STEPS)
CLOSE = pb.StepClose(counted=[0, 1], labels_counted=8)


def test_the_coordinator_decides_when_all_is_in_and_sends_it_both_ways(tiny: ModelSource) -> None:
    site = Site(tiny, "edge-2")
    assert site.work() == 0
    site.tables()
    assert site.work() == 1  # opened
    site.gradients(site.members[0])
    assert site.work() == 0
    site.gradients(site.members[1])
    assert site.work() == 1
    assert site.trainee.steps == [(0, 1.0)]
    for member in site.members:
        assert sent(member) == (["TABLE", "TABLE_ALL", "STEP_CLOSE"], ["TABLE_ALL", "STEP_CLOSE"])
        assert member.labels_trained == LABELS[member.index]


def test_a_follower_steps_when_decision_and_gradients_are_here(tiny: ModelSource) -> None:
    site = Site(tiny, "edge-1")
    first, second = site.members
    site.tables()
    assert site.work() == 0  # the totals come from the coordinator
    site.hear(first, kind=pb.TABLE_ALL, table_all=TOTALS)
    assert site.work() == 1
    site.gradients(first)
    site.hear(second, kind=pb.STEP_CLOSE, step=0, step_close=CLOSE)
    assert site.work() == 0  # counted, and its gradient is still on its way
    assert site.turns.still_to_come()
    assert not site.turns.awaits_close(second)
    site.gradients(second)
    assert site.work() == 1
    assert site.trainee.steps == [(0, 1.0)]
    assert site.turns.awaits_close(second)


def test_the_first_copy_of_a_decision_counts_at_a_follower(tiny: ModelSource) -> None:
    """A decision comes once with each device."""
    site = Site(tiny, "edge-1")
    first, second = site.members
    site.tables()
    for member in site.members:
        site.hear(member, kind=pb.TABLE_ALL, table_all=TOTALS)
    site.work()
    site.hear(first, kind=pb.STEP_CLOSE, step=0, step_close=pb.StepClose(counted=[0]))
    site.hear(second, kind=pb.STEP_CLOSE, step=0, step_close=CLOSE)
    site.gradients(first, second)
    assert site.work() == 1
    assert (first.labels_trained, second.labels_trained) == (LABELS[0], 0)


def test_totals_of_another_number_of_steps_break_the_protocol(tiny: ModelSource) -> None:
    site = Site(tiny, "edge-1")
    with pytest.raises(ProtocolError, match="a TABLE_ALL of 0 steps; the plan has 2"):
        site.hear(site.members[0], kind=pb.TABLE_ALL)


@pytest.mark.parametrize(("node", "gone"), [("edge-2", ""), ("edge-1", "not finite")])
def test_an_unusable_gradient_costs_the_step_at_the_coordinator_and_the_round_elsewhere(
    tiny: ModelSource, node: str, gone: str
) -> None:
    """The coordinator leaves the device out of the step; a follower cannot, since the coordinator has counted it."""
    site = Site(tiny, node)
    member = site.members[0]
    site.turns.take_unusable_gradient(member, "not finite")
    assert (member.problem, member.gone) == ("" if gone else "not finite", gone)


def test_a_global_norm_goes_to_the_coordinator_and_its_scale_comes_back(tiny: ModelSource) -> None:
    clip = ("optimizer.clip=global", "optimizer.max_norm=1")
    follower, coordinator = Site(tiny, "edge-1", *clip), Site(tiny, "edge-2", *clip)
    follower.tables()
    coordinator.tables()
    follower.hear(follower.members[0], kind=pb.TABLE_ALL, table_all=TOTALS)
    for site in (follower, coordinator):
        site.work()
        site.gradients(*site.members)
    follower.hear(follower.members[0], kind=pb.STEP_CLOSE, step=0, step_close=CLOSE)
    follower.work()
    (ready,) = [header for header in follower.members[0].next.headers if header.kind == pb.STEP_READY]  # type: ignore[attr-defined]
    coordinator.work()
    assert (follower.trainee.steps, coordinator.trainee.steps) == ([], [])

    own = pb.StepReady(squared_norm=7.0 / 2, finite=True)
    for member in coordinator.members:
        coordinator.hear(member, kind=pb.STEP_READY, step=0, step_ready=own)
    assert coordinator.work() == 0  # a host's part is missing
    coordinator.turns.take_norm_of_host(coordinator.members[0], Frame(ready))
    coordinator.work()
    scale = 1.0 / ((9.0 + 9.0 + 7.0) ** 0.5 + 1e-6)
    assert coordinator.trainee.steps == [(0, pytest.approx(scale))]
    apply = coordinator.members[0].previous.headers[-1]  # type: ignore[attr-defined]
    assert apply.kind == pb.STEP_APPLY
    follower.turns.handlers_from_next()[pb.STEP_APPLY](follower.members[0], Frame(apply))
    follower.work()
    assert follower.trainee.steps == coordinator.trainee.steps


def test_the_coordinator_goes_on_without_the_late_and_dismisses_those_who_stay_late(tiny: ModelSource) -> None:
    site = Site(tiny, "edge-2")
    prompt, late = site.members
    late.strikes = STRIKES_ALLOWED - 1
    site.tables()
    site.work()
    site.gradients(prompt)
    site.plan.deadlines.step_s = 0.0
    assert site.turns.patience_s() == 0.0
    site.turns.give_up_on_the_late()
    assert late.problem == "later than 0 s"
    assert site.work() == 1
    assert late.gone == f"left out of {STRIKES_ALLOWED} steps in a row: later than 0 s"
    assert (prompt.labels_trained, late.labels_trained) == (LABELS[0], 0)
    assert [type(event) for event in site.events] == [StepClosed, LinkLost]


def test_copies_have_no_deadline(tiny: ModelSource) -> None:
    site = Site(tiny, "edge-2", "split.host_mode=copies")
    assert site.turns.patience_s() == site.plan.deadlines.round_s
