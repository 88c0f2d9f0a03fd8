"""From which snapshot a new attempt of a round goes on, and when it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgelam_fl.model.source import ModelSource
from edgelam_fl.plan.layout import HostRange, Site
from edgelam_fl.plan.making import RoundFacts, RoundPrivacy
from edgelam_fl.plan.resuming import can_resume, newest_common
from edgelam_fl.wire import edgelam_pb2 as pb
from server.kept import NO_HUB_KEPT, HubKept
from server.progress import Progress
from tests.fleet import memory_fleet
from tests.support import run_config


def kept(*pairs: tuple[int, int]) -> list[pb.StepSnapshot]:
    return [pb.StepSnapshot(attempt=attempt, steps=steps) for attempt, steps in pairs]


def test_the_newest_step_that_all_nodes_have() -> None:
    assert newest_common([kept((1, 4), (1, 8)), kept((1, 4)), kept((1, 2), (1, 4))]) == kept((1, 4))[0]
    assert newest_common([kept((1, 4), (2, 6)), kept((2, 6), (1, 4))]) == kept((2, 6))[0]


@pytest.mark.parametrize("lists", [[], [kept((1, 4)), []], [kept((1, 4)), kept((2, 4))]])
def test_nothing_in_common_begins_again(lists: list[list[pb.StepSnapshot]]) -> None:
    assert newest_common(lists) is None


def plans_of(
    source: ModelSource, data: list[Path], *settings: str, attempt: int = 1, privacy: RoundPrivacy | None = None
) -> list[pb.Plan]:
    with memory_fleet(source, run_config(source.name, "split.hosts=2", *settings), data) as fleet:
        return list(fleet.plans(RoundFacts("run", 3, attempt, 8, 4, privacy=privacy)).values())


def test_a_host_may_be_replaced_and_a_device_missing(tiny: ModelSource, data_files: list[Path]) -> None:
    before = plans_of(tiny, data_files)
    after = plans_of(tiny, data_files[:2], attempt=2)
    for plan in after:
        plan.node = plan.node.replace("edge-2", "edge-9")
        for hop in (hop for route in [*plan.serves, *plan.routes] for hop in route.hops):
            hop.node = hop.node.replace("edge-2", "edge-9")
    assert can_resume(before, after)
    assert not can_resume(before[1:], after), "a host is new in its place"
    assert not can_resume(after, before), "a device is new"
    in_turn = plans_of(tiny, data_files, "split.host_mode=sequential")
    assert can_resume(in_turn, in_turn)
    assert not can_resume(in_turn, plans_of(tiny, data_files[:2], "split.host_mode=sequential")), "its steps stay"


@pytest.mark.parametrize("setting", ["split.back=1", "split.front=1", "lora.rank=4", "federation.batch_size=2"])
def test_other_work_begins_again(tiny: ModelSource, data_files: list[Path], setting: str) -> None:
    assert not can_resume(plans_of(tiny, data_files), plans_of(tiny, data_files, setting, attempt=2))


@pytest.mark.parametrize("setting", ["privacy.cut_clip=2.0", "privacy.disguise=0.5"])
def test_what_is_drawn_from_entropy_begins_again(tiny: ModelSource, data_files: list[Path], setting: str) -> None:
    settings = [setting, "privacy.cut_noise=0.1"] if "clip" in setting else [setting]
    assert not can_resume(plans_of(tiny, data_files, *settings), plans_of(tiny, data_files, *settings, attempt=2))


def test_privacy_begins_again(tiny: ModelSource, data_files: list[Path]) -> None:
    privacy = RoundPrivacy(1.0, 1.0, 3.0)
    plans = plans_of(tiny, data_files, privacy=privacy)
    assert not can_resume(plans, plans)


def test_a_host_in_a_lost_ones_place_is_lent_what_the_hub_keeps(
    tiny: ModelSource, data_files: list[Path], tmp_path: Path
) -> None:
    before, after = plans_of(tiny, data_files), plans_of(tiny, data_files, attempt=2)
    for plan in after:
        plan.node = plan.node.replace("edge-2", "edge-9")
        for hop in (hop for route in [*plan.serves, *plan.routes] for hop in route.hops):
            hop.node = hop.node.replace("edge-2", "edge-9")
    left = tmp_path / "kept" / "run-run" / "000003" / "000001" / "edge-2" / "site" / "2-4.snap"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"the state")
    sites = [site_of(plans) for plans in (before, after)]
    earlier = {plan.node: plan for plan in before}
    own = {plan.node: kept((1, 3), (1, 8)) for plan in before if plan.node != "edge-2"}
    new = {plan.node: plan for plan in after}
    lent = Progress(earlier, sites[:1], own).go_on(new, sites[1:], HubKept(tmp_path))
    assert {(plan.first_step, plan.resume_attempt) for plan in after} == {(3, 1)}
    assert lent == {"edge-9": pb.KeptStates(states={"site": b"the state"}).SerializeToString()}
    for plan in after:
        plan.first_step = 0
    assert Progress(earlier, sites[:1], own).go_on(new, sites[1:], NO_HUB_KEPT) == {}
    assert {plan.first_step for plan in after} == {0}


def site_of(plans: list[pb.Plan]) -> Site:
    hosts = tuple(HostRange(p.node, p.node, p.hosted.first, p.hosted.last) for p in plans if p.serves)
    return Site(hosts, tuple(p.node for p in plans if p.routes))
