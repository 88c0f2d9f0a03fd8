"""The number of micro-batches that a host grants, and the pace that a share of the bandwidth gives to a route's links."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from edgelam_fl.model.adapter import initial_adapter, slice_of
from edgelam_fl.model.memory import unit_bytes
from edgelam_fl.model.source import ModelSource
from edgelam_fl.node.examples import DeviceExamples
from edgelam_fl.node.play import NodeHooks
from edgelam_fl.node.service import StageHost
from edgelam_fl.plan.making import RoundFacts
from edgelam_fl.plan.reading import spans_of
from edgelam_fl.split.route import memory_dial, new_route, open_route
from edgelam_fl.split.window import affordable_window, units_bytes
from edgelam_fl.telemetry.events import WindowGranted, of_kind
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.counters import ByteCounters
from edgelam_fl.wire.link import Link
from edgelam_fl.wire.memory import memory_pair
from edgelam_fl.wire.terms import MakeTerms
from tests.fleet import Fleet, check_done
from tests.support import run_config

ADAPTER = 4096  # elements of it
WINDOW = 4


def all_plans(source: ModelSource, *overrides: str) -> dict[str, pb.Plan]:
    nodes: dict[str, Any] = {"device-1": None, "device-2": None}
    config = run_config(source.name, f"split.window={WINDOW}", *overrides)
    return Fleet(source, config, nodes, {"edge-1": (None, "edge-1")}).plans(RoundFacts("r", 1, 1, 0, 1))


def plan_of(source: ModelSource, *overrides: str) -> pb.Plan:
    return all_plans(source, *overrides)["edge-1"]


@pytest.mark.parametrize("fitting", [0, 1, 3, 4, 9])
def test_what_fits_for_every_route_at_once_is_granted(tiny: ModelSource, fitting: int) -> None:
    plan = plan_of(tiny)
    unit = unit_bytes(tiny.config, 2, 2, 128, 4)
    kept = ADAPTER * 16 * 2
    free = (unit * 2 * fitting + kept) / 0.8 + 1
    assert affordable_window(plan, tiny, 4, ADAPTER, int(free)) == min(WINDOW, fitting)


def test_checkpointing_makes_room(tiny: ModelSource) -> None:
    """Two layers keep 1.56 times as much as their inputs and one layer's activations: three micro-batches fit instead of two."""
    free = int((unit_bytes(tiny.config, 2, 2, 128, 4) * 2 * 2 + ADAPTER * 32) / 0.8 * 1.01)
    plain, thrifty = plan_of(tiny), plan_of(tiny, "split.checkpointing=true")
    assert affordable_window(plain, tiny, 4, ADAPTER, free) == 2
    assert affordable_window(thrifty, tiny, 4, ADAPTER, free) == 3


def test_a_node_counts_all_units_that_it_may_have_under_way(tiny: ModelSource) -> None:
    """A host the window of each route; a device the window in its front, and one micro-batch in its back with head and loss."""
    plans = all_plans(tiny)
    host, device = plans["edge-1"], plans["device-1"]
    assert units_bytes(host, tiny, 4) == 2 * WINDOW * unit_bytes(tiny.config, 2, 2, 128, 4)
    fronts = WINDOW * unit_bytes(tiny.config, 2, 2, 128, 4)
    assert units_bytes(device, tiny, 4) == fronts + unit_bytes(tiny.config, 2, 2, 128, 4, head=True)
    (whole,) = [plan for name, plan in all_plans(tiny, "split.hosts=0").items() if name == "device-1"]
    assert units_bytes(whole, tiny, 4) == unit_bytes(tiny.config, tiny.num_layers, 2, 128, 4, head=True)


def _free(most_bytes: int, _: object) -> int:
    return most_bytes


def test_a_host_short_of_memory_grants_less(tiny: ModelSource, data_files: list[Path]) -> None:
    """The chain's smallest window is granted on both links: edge-1 has memory for all, edge-2 for one micro-batch."""
    config = run_config(tiny.name, "split.hosts=2", f"split.window={WINDOW}", "split.micro_batches=4")
    start = initial_adapter(tiny, config.lora.targets, config.lora.rank, 1)
    nodes: dict[str, StageHost] = {}
    in_memory, windows = memory_dial(nodes), dict[str, int]()

    def dial(node: str, address: str, name: str, *how: Any) -> Link:
        link = in_memory(node, address, name, *how)
        windows[name] = link.terms.window
        return link

    hosts: dict[str, Any] = {"edge-1": (None, "edge-1"), "edge-2": (None, "edge-2")}
    fleet = Fleet(tiny, config, {}, hosts)
    fleet.devices["device-1"] = StageHost("device-1", dial, fleet.emit, examples=DeviceExamples(data_files[0]))
    plan = fleet.plans(RoundFacts("r", 1, 1, 0, 1))["edge-2"]
    unit = unit_bytes(tiny.config, plan.hosted.last - plan.hosted.first, 1, 128, 4)
    kept = sum(array.size for array in slice_of(start, spans_of(plan)).values()) * 16
    for name, free in {"edge-1": 1 << 40, "edge-2": int((unit + kept) / 0.8) + 1}.items():
        hooks = NodeHooks(memory_free=partial(_free, free))
        nodes[name] = StageHost(name, dial, fleet.emit, address=name, hooks=hooks)
        fleet.hosts[name] = nodes[name], name
    check_done(fleet.run(start, 2))
    assert windows == {"entry edge-1": 1, "exit edge-2": 1, "entry edge-2 for device-1": 1}
    granted = next(of_kind(fleet.events, WindowGranted))
    assert (granted.job, granted.granted, granted.asked) == ("test/1/1/edge-2", 1, WINDOW)


def test_a_share_paces_both_ends_of_both_links(tiny: ModelSource) -> None:
    """The device has one bucket for all that it sends; the host has one for all that it sends to the device."""
    nodes: dict[str, Any] = {"device-1": None}
    fleet = Fleet(tiny, run_config(tiny.name, "wire.capacity=8 Mbit/s"), nodes, {"edge-1": (None, "edge-1")})
    plan = fleet.plans(RoundFacts("r", 1, 1, 0, 1))["device-1"]
    plan.routes[0].share_bps = 0.25 * 8e6

    def dial(
        node: str, address: str, name: str, hello: pb.Hello, counters: ByteCounters, make_terms: MakeTerms, *_: Any
    ) -> Link:
        near, _far = memory_pair(name, counters, counters)
        near.open(
            make_terms(name, counters, pb.Ready(window=1, activation_codec="raw", gradient_codec="raw", job_token=1))
        )
        return near

    route = new_route(plan)
    open_route(dial, plan, tiny, route, ByteCounters(), fleet.emit)
    assert route.window == 1, "what the host granted, though the plan's is larger"
    assert route.entry is not None
    assert route.exit is not None
    assert route.entry.terms.pace is not None
    assert route.entry.terms.pace is route.exit.terms.pace
    assert route.entry.terms.pace.bytes_per_s == 0.25 * 8e6 / 8
