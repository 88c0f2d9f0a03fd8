from __future__ import annotations

import pytest

from edgelam_fl.config import RunConfig
from edgelam_fl.errors import ConfigError, RunFailed
from edgelam_fl.model.source import ModelSource
from edgelam_fl.plan.layout import Layout, by_name, make_layout, who_may_host
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.wire import edgelam_pb2 as pb
from server.model_checks import check_cuts
from tests.support import run_config


def layout(config: RunConfig, source: ModelSource, devices: str, hosts: str) -> Layout:
    """Makes a layout of one node per letter."""
    return make_layout(
        RunSpec(config, source),
        [pb.Profile(name=name, role=pb.DEVICE) for name in devices],
        [pb.Profile(name=name, role=pb.EDGE, address=f"{name}:1") for name in hosts],
    )


def ranges(layout: Layout) -> list[tuple[str, int, int]]:
    return [(host.name, host.first, host.last) for site in layout.sites for host in site.hosts]


def hops(layout: Layout, device: str) -> list[tuple[str, int, int]]:
    return [(hop.node, hop.first, hop.last) for hop in layout.routes[device].hops]


@pytest.mark.parametrize(("front", "back", "hosts"), [(2, 2, 1), (0, 0, 1), (5, 0, 1), (3, 3, 0), (0, 6, 0)])
def test_cuts_inside_the_model(tiny: ModelSource, front: int, back: int, hosts: int) -> None:
    config = run_config("x", f"split.front={front}", f"split.back={back}", f"split.hosts={hosts}")
    check_cuts(RunSpec(config, tiny))


@pytest.mark.parametrize(
    ("front", "back", "hosts", "rest"),
    [
        (3, 3, 1, "6 layers, and 1 hosts need at least one each; together they may be at most 5"),
        (40, 0, 1, "6 layers, and 1 hosts need at least one each; together they may be at most 5"),
        (4, 3, 0, "6 layers; together they may be at most 6"),
    ],
)
def test_a_cut_outside_the_model(tiny: ModelSource, front: int, back: int, hosts: int, rest: str) -> None:
    config = run_config("x", f"split.front={front}", f"split.back={back}", f"split.hosts={hosts}")
    with pytest.raises(ConfigError) as caught:
        check_cuts(RunSpec(config, tiny))
    assert str(caught.value) == (
        f"split.front + split.back = {front} + {back} is outside the model: {tiny.name} has {rest}"
    )


def test_unlike_cuts_enter_and_leave_a_host_inside(tiny: ModelSource) -> None:
    config = run_config("x", "split.front=2", "split.fronts={'a'=1}", "split.back=2", "split.backs={'b*'=1}")
    found = layout(config, tiny, "ab", "e")
    assert ranges(found) == [("e", min(1, 2), 6 - min(2, 1))]
    assert (hops(found, "a"), hops(found, "b")) == ([("e", 1, 4)], [("e", 2, 5)])
    assert (found.routes["a"].front, found.routes["b"].back_first) == (1, 5)


def test_equal_cuts_of_the_union(tiny: ModelSource) -> None:
    config = run_config("x", "split.front=1", "split.fronts={'a'=0}", "split.back=1", "split.hosts=2")
    found = layout(config, tiny, "ab", "ef")
    assert ranges(found) == [("e", 0, 5 // 2), ("f", 5 // 2, 5)]
    assert hops(found, "b") == [("e", 1, 2), ("f", 2, 5)]


def test_cuts_by_hand(tiny: ModelSource) -> None:
    config = run_config("x", "split.front=1", "split.back=1", "split.hosts=3", "split.cuts=[2, 4]")
    assert ranges(layout(config, tiny, "a", "efg")) == [("e", 1, 2), ("f", 2, 4), ("g", 4, 5)]


def test_a_route_that_misses_a_host_is_refused_with_numbers(tiny: ModelSource) -> None:
    config = run_config("x", "split.front=1", "split.fronts={'b'=3}", "split.back=1", "split.hosts=2")
    with pytest.raises(ConfigError, match=r"device b keeps layers 0 to 3 .* does not cross host e with layers 1 to 3"):
        layout(config, tiny, "ab", "ef")


def test_sites_get_devices_in_turn(tiny: ModelSource) -> None:
    config = run_config("x", "split.sites=2", "split.hosts=2", "split.front=1", "split.back=1")
    found = layout(config, tiny, "cbade", "wxyz")
    assert [(site.name, site.members) for site in found.sites] == [("w+x", ("a", "c", "e")), ("y+z", ("b", "d"))]
    assert [route.device_index for route in found.routes.values()] == [0, 1, 2, 3, 4]
    assert hops(found, "d") == [("y", 1, 3), ("z", 3, 5)]
    assert found.site_of("d").name == "y+z"


def test_a_site_without_a_device_takes_no_hosts(tiny: ModelSource) -> None:
    found = layout(run_config("x", "split.sites=3"), tiny, "a", "e")
    assert [site.name for site in found.sites] == ["e"]


def test_a_sites_range_is_that_of_its_own_members(tiny: ModelSource) -> None:
    found = layout(run_config("x", "split.sites=2", "split.fronts={'a'=1}"), tiny, "ab", "ef")
    assert ranges(found) == [("e", 1, 4), ("f", 2, 4)]


def test_fewer_sites_if_hosts_are_missing(tiny: ModelSource) -> None:
    found = layout(run_config("x", "split.sites=2"), tiny, "ab", "e")
    assert [(site.name, site.members) for site in found.sites] == [("e", ("a", "b"))]


def test_too_few_hosts_for_one_site(tiny: ModelSource) -> None:
    config = run_config("x", "split.hosts=2", "split.front=1")
    with pytest.raises(
        RunFailed, match=r"a site needs 2 hosts \(split.hosts\), and only 1 of the nodes can be one: e "
    ):
        layout(config, tiny, "ab", "e")


def test_who_may_host() -> None:
    nodes = [
        pb.Profile(name="a", role=pb.DEVICE, address="a:1"),
        pb.Profile(name="b", role=pb.DEVICE),
        pb.Profile(name="y", role=pb.EDGE, address="y:1"),
        pb.Profile(name="x", role=pb.EDGE, address="x:1"),
        pb.Profile(name="w", role=pb.EDGE),
    ]
    found = {
        on: [p.name for p in who_may_host(run_config("m", f"split.host_on={on}"), nodes)] for on in ("edge", "any")
    }
    assert found == {"edge": ["x", "y"], "any": ["x", "y", "a"]}


@pytest.mark.parametrize(("name", "value"), [("pi-1", 1), ("pi-22", 2), ("pi-3", 3), ("nano", 9)])
def test_the_exact_name_beats_the_longest_pattern(name: str, value: int) -> None:
    assert by_name({"pi-*": 3, "pi-1": 1, "pi-2*": 2, "pi-1*": 7}, name, 9) == value
