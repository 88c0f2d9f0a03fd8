"""Who is said to work against the others: nobody who may be honest."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from edgelam_fl.plan.layout import HostRange, Layout, Site
from edgelam_fl.plan.modes import Turn, host_mode
from edgelam_fl.split.judging import bearings
from edgelam_fl.split.lane import Lane
from edgelam_fl.split.member import Member
from edgelam_fl.tasks.kinds import TASKS, points_alike
from edgelam_fl.wire import edgelam_pb2 as pb
from server.judging import spoilers

DEVICES = 4
ALONG, AGAINST = (1.0, 0.2), (-1.0, -0.2)
FACTOR, STEPS = 30.0, 9


def lane(*, judges_directions: bool = True) -> Lane:
    """Makes a lane of four devices, each with a label in every step."""
    members = [Member(pb.Route(device=f"device-{n}", device_index=n), pb.Hop()) for n in range(DEVICES)]
    for member in members:
        member.table = [pb.StepRow(labels=1)] * STEPS
    made = Lane(members, None, host_mode("joint"), judges_directions=judges_directions)
    made.begin([Turn(step, tuple(range(DEVICES)), DEVICES) for step in range(STEPS)])
    return made


def left_out(made: Lane, *gradients: Sequence[float] | None) -> list[int]:
    """Plays a step; returns which devices it leaves out. `gradients`: by device; None: it has not come."""
    for member, gradient in zip(made.members, gradients, strict=True):
        member.gradients = None if gradient is None else [torch.tensor(gradient)]
    problems = made.judge_gradients([member for member in made.members if member.gradients], FACTOR)
    made.number += 1
    return [*problems]


def test_a_flipped_sign_is_seen_in_the_first_step_and_over_some_steps() -> None:
    assert left_out(lane(), ALONG, ALONG, ALONG, AGAINST) == [3]
    later = lane()
    assert left_out(later, ALONG, ALONG, ALONG, ALONG) == []
    found = [left_out(later, ALONG, ALONG, ALONG, AGAINST) for _ in range(STEPS - 1)]
    assert found == [[]] * 2 + [[3]] * (STEPS - 3)


def test_the_first_gradient_of_a_device_that_came_late_does_not_decide() -> None:
    """Nor does the first one after a snapshot, which holds no sums."""
    made = lane()
    assert left_out(made, ALONG, ALONG, ALONG, None) == []
    assert [left_out(made, ALONG, ALONG, ALONG, AGAINST) for _ in range(4)] == [[], [], [], [3]]


def test_who_pulls_much_harder_than_the_others_may_be_honest() -> None:
    """Its examples have another answer than all others', and the others have gone far already."""
    assert left_out(lane(), ALONG, ALONG, ALONG, [3 * one for one in AGAINST]) == []
    assert not any(bearing.is_opposed for bearing in bearings([-2.0, 2.0, 2.0, 2.0], [3.0, 1.0, 1.0, 1.0]))


def test_directions_say_nothing_where_devices_may_hold_other_classes_or_values() -> None:
    assert [kind for kind in TASKS if points_alike(kind)] == ["causal-lm"]
    assert left_out(lane(judges_directions=False), ALONG, ALONG, ALONG, AGAINST) == []


def test_a_host_is_believed_about_the_devices_of_its_own_site_alone() -> None:
    sites = (Site((HostRange("e", "", 1, 3),), ("a", "b")), Site((HostRange("f", "", 1, 3),), ("c", "d")))
    plans = {name: pb.Plan(host_mode="joint", lora=pb.Lora(train_hosts=True)) for name in "abcd"}
    found = pb.DeviceLeftOut(device="d", reason="gradients against", was_counted=True)
    report = pb.JobReport(host=pb.HostPart(left_out=[found]))
    assert spoilers(Layout(sites, {}), plans, {"e": report}, {}) == {}
    assert spoilers(Layout(sites, {}), plans, {"f": report}, {}) == {"d": "gradients against"}


def test_an_example_that_nobody_expects_counts_once_all_others_are_learned() -> None:
    """Gradients are tiny by then. Compared with those of the round's beginning, that of the rare example is none too large."""
    made, tiny = lane(), [1e-3 * one for one in ALONG]
    assert left_out(made, ALONG, ALONG, ALONG, ALONG) == []
    assert left_out(made, tiny, tiny, tiny, ALONG) == []
    assert left_out(made, tiny, tiny, tiny, [50 * one for one in ALONG]) == [3]
