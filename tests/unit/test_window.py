"""The number of micro-batches that a host grants, and the pace that a share of the bandwidth gives to a route's links."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgelam_fl.model.adapter import initial_adapter
from edgelam_fl.model.memory import unit_bytes
from edgelam_fl.model.source import ModelSource
from edgelam_fl.node import service as stage_host
from edgelam_fl.plan.making import RoundFacts
from edgelam_fl.split.route import new_route, open_route
from edgelam_fl.split.window import affordable_window
from edgelam_fl.telemetry.events import WindowGranted, of_kind
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.counters import ByteCounters
from edgelam_fl.wire.link import Link
from edgelam_fl.wire.memory import memory_pair
from edgelam_fl.wire.terms import MakeTerms
from tests.support import Fleet, check_done, memory_fleet, run_config

ADAPTER = 4096  # elements of it
WINDOW = 4


def plan_of(source: ModelSource, *overrides: str) -> pb.Plan:
    nodes: dict[str, Any] = {"device-1": None, "device-2": None}
    config = run_config(source.name, f"split.window={WINDOW}", *overrides)
    return Fleet(source, config, nodes, {"edge-1": (None, "edge-1")}).plans(RoundFacts("r", 1, 1, 0, 1))["edge-1"]


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


def test_a_host_short_of_memory_grants_less(
    tiny: ModelSource, data_files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chain's smallest window is the route's: edge-1 has memory for all, edge-2 for one."""
    granted = {"edge-1": WINDOW, "edge-2": 1}
    monkeypatch.setattr(stage_host, "affordable_window", lambda plan, *_: granted[plan.node])
    opened: list[int] = []
    monkeypatch.setattr(stage_host, "open_route", lambda *how: (open_route(*how), opened.append(how[3].window)))
    config = run_config(tiny.name, "split.hosts=2", f"split.window={WINDOW}", "split.micro_batches=4")
    start = initial_adapter(tiny, config.lora.targets, config.lora.rank, 1)
    with memory_fleet(tiny, config, data_files[:1]) as fleet:
        check_done(fleet.run(start, 2))
    assert opened == [1]
    told = next(of_kind(fleet.events, WindowGranted))
    assert (told.job, told.granted, told.asked) == ("test/1/1/edge-2", 1, WINDOW)


def test_a_share_paces_both_ends_of_both_links(tiny: ModelSource) -> None:
    """The device has one bucket for all that it sends; the host has one for all that it sends to the device."""
    nodes: dict[str, Any] = {"device-1": None}
    fleet = Fleet(tiny, run_config(tiny.name, "wire.capacity=8 Mbit/s"), nodes, {"edge-1": (None, "edge-1")})
    plan = fleet.plans(RoundFacts("r", 1, 1, 0, 1))["device-1"]
    plan.routes[0].share_bps = 0.25 * 8e6

    def dial(address: str, name: str, hello: pb.Hello, counters: ByteCounters, make_terms: MakeTerms, *_: Any) -> Link:
        near, _far = memory_pair(name, counters, counters)
        near.open(make_terms(name, counters, pb.Ready(window=1, codec="raw", job_token=1)))
        return near

    route = new_route(plan)
    open_route(dial, plan, tiny, route, ByteCounters())
    assert route.entry is not None
    assert route.exit is not None
    assert route.entry.terms.pace is not None
    assert route.entry.terms.pace is route.exit.terms.pace
    assert route.entry.terms.pace.bytes_per_s == 0.25 * 8e6 / 8
