"""Compares the planner's chains with all chains there are, and checks what a user reads of them. Small numbers keep formulas short."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from benchmarks.planner import compared, planned, random_instance, search, speed_up
from edgelam_fl.errors import DoesNotFit, RunFailed
from edgelam_fl.plan.chain_memory import UNITS_SHARE
from edgelam_fl.plan.facts import Chain, ChainCost, DeviceEnds, Footprint, NodeResources, SiteInstance, StepFacts
from edgelam_fl.plan.instance import share_out_hosts
from edgelam_fl.plan.placement import keep_or_change
from edgelam_fl.plan.search import best_chain, cost_of, shortage

LAYERS = 10
STEP = StepFacts(
    {"fp32": Footprint((1,) * LAYERS), "int8": Footprint((0,) * LAYERS)}, tensor_bytes=0, micro_batches=4, window=4
)
DEVICE = NodeResources("device", ends_s=0.1)
DEVICES = [DeviceEnds(DEVICE, 1, LAYERS - 1)]
MIDDLE = LAYERS - 2


def host(name: str, layer_s: float = 1.0, **more: Any | bool) -> NodeResources:
    return NodeResources(name, {"fp32": layer_s}, **more)


def best(
    step: StepFacts, devices: Sequence[DeviceEnds], hosts: Sequence[NodeResources], count: int | None = None
) -> ChainCost:
    return best_chain(SiteInstance(step, tuple(devices), tuple(hosts)), count)


def cost(
    step: StepFacts, devices: Sequence[DeviceEnds], hosts: Sequence[NodeResources], chain: Chain
) -> ChainCost | None:
    return cost_of(SiteInstance(step, tuple(devices), tuple(hosts)), chain)


def held(found: ChainCost) -> dict[str, int]:
    return {load.node: load.last - load.first for load in found.hosts}


def test_the_planner_finds_the_best_of_all_plans() -> None:
    """Draws 500 instances: unlike devices, hosts, links, memory, bases and ends, some behind the relay, some devices that host."""
    refused = 0
    for seed in range(500):
        instance = random_instance(Random(f"test {seed}"), hosts=3, layers=5)
        found, shortest_s = planned(instance), search(instance)
        refused += shortest_s is None
        assert (found is None) == (shortest_s is None), seed
        assert found is None or math.isclose(found.step_s, shortest_s or 0, rel_tol=1e-9), seed
    assert 0 < refused < 250


def test_the_order_of_hosts_and_devices_does_not_matter() -> None:
    instance = random_instance(Random(5), hosts=4, layers=6)
    assert len(instance.hosts) > 1
    reversed_ = replace(instance, devices=instance.devices[::-1], hosts=instance.hosts[::-1])
    assert best_chain(instance) == best_chain(reversed_)


@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 1), (2, 4), (4, 8)])
def test_stages_that_are_alike_take_what_the_pipeline_formula_says(stages: int, micro_batches: int) -> None:
    each = MIDDLE // (stages - 1) if stages > 1 else 0
    step = replace(STEP, micro_batches=micro_batches, window=micro_batches)
    last = 1 + each * (stages - 1)
    devices = [DeviceEnds(NodeResources("device", ends_s=float(each)), 1, last)]
    found = best(step, devices, [host(f"h{n}") for n in range(stages - 1)], count=stages - 1)
    assert found.step_s == pytest.approx((micro_batches + stages - 1) * each)


def test_hosts_behind_the_busiest_host_cost_nothing_if_they_are_faster() -> None:
    """Six units cross a host of 4 s and one of 1 s. Behind the slow host the fast one works meanwhile; before it, its 1 s counts."""
    step = replace(STEP, micro_batches=6, window=6)
    device = DeviceEnds(NodeResources("d", ends_s=0.5, back_s=0.1), 0, 2)
    slow, fast = host("slow", 4.0), host("fast", 1.0)
    first, last = (
        cost(step, [device], [slow, fast], ((one, 1), (other, 2)))
        for one, other in (("slow", "fast"), ("fast", "slow"))
    )
    assert first is not None
    assert first.step_s == pytest.approx(0.4 + 6 * 4)
    assert last is not None
    assert last.step_s == pytest.approx(0.4 + 1 + 6 * 4)


def test_a_hosts_time_grows_with_its_devices() -> None:
    three = [DeviceEnds(NodeResources(f"d{n}", ends_s=0.1), 1, LAYERS - 1) for n in range(3)]
    units = 3 * STEP.micro_batches
    assert best(STEP, three, [host("h")]).step_s == pytest.approx(0.1 + units * MIDDLE)


def test_slow_hosts_get_fewer_layers() -> None:
    found = best(STEP, [DeviceEnds(DEVICE, 0, LAYERS)], [host("fast", 1.0), host("slow", 3.0)])
    assert held(found) == {"fast": 8, "slow": 2}
    assert found.limit in ("compute of fast", "compute of slow")


def test_a_host_whose_absence_is_faster_is_left_out() -> None:
    found = best(STEP, DEVICES, [host("fast"), host("hopeless", 1000.0), host("far", 1.0, round_trip_s=1000.0)])
    assert (held(found), found.left_out) == ({"fast": MIDDLE}, ("far", "hopeless"))
    assert held(best(STEP, DEVICES, [host("fast"), host("hopeless", 1000.0)], count=2))["hopeless"] == 1


def test_a_slow_link_is_named_as_the_limit() -> None:
    step = replace(STEP, tensor_bytes=1_000_000)
    devices = [DeviceEnds(replace(DEVICE, up_bps=1e6), 1, LAYERS - 1)]
    found = best(step, devices, [host("h", 0.01)])
    assert found.limit == "uplink of device"
    sent = 2 * step.tensor_bytes  # hidden states to the first host, the gradient to the last
    assert found.devices[0].up_bytes == step.micro_batches * sent
    cycle_s = 0.1 + MIDDLE * 0.01 + 8 * sent / 1e6
    assert found.step_s == pytest.approx(cycle_s / 2 + step.micro_batches * 8 * sent / 1e6)


def test_a_window_of_one_makes_units_wait_for_each_other() -> None:
    found = best(replace(STEP, window=1), DEVICES, [host("a"), host("b")])
    assert found.step_s == pytest.approx(STEP.micro_batches * (0.1 + MIDDLE))
    assert found.limit.startswith("the window of 1 ")


def test_the_relay_costs_its_time_and_is_avoided_if_another_host_is_as_good() -> None:
    step = replace(STEP, tensor_bytes=1000, relay_bps=1e3)
    hidden = host("hidden", reachable=False)
    relayed_s = 8 * 4 * step.tensor_bytes / step.relay_bps  # there and back, at the entry and at the exit
    alone = best(step, DEVICES, [hidden])
    assert alone.limit == "the relay"
    assert alone.step_s == pytest.approx(0.1 + MIDDLE + relayed_s + (step.micro_batches - 1) * relayed_s)
    assert held(best(step, DEVICES, [hidden, host("open")])) == {"open": MIDDLE}


# ---------------------------------------------------------------- memory


def test_memory_moves_the_cut_and_is_named_as_a_limit() -> None:
    found = best(STEP, DEVICES, [host("small", 0.1, free_bytes=3), host("large", 1.0)])
    assert held(found) == {"small": 3, "large": MIDDLE - 3}
    assert found.memory_limit.startswith("memory of small: with more, a step would take ")


def test_the_first_base_that_fits_is_taken() -> None:
    both = NodeResources("h", {"fp32": 1.0, "int8": 0.5}, free_bytes=MIDDLE)
    assert best(STEP, DEVICES, [both]).hosts[0].base == "fp32"
    assert best(STEP, DEVICES, [replace(both, free_bytes=MIDDLE - 1)]).hosts[0].base == "int8"


def test_units_in_flight_are_reserved_as_the_host_does_it() -> None:
    needs = Footprint((0,) * LAYERS, unit_bytes=2, unit_layer_bytes=1)
    step = replace(STEP, footprints={"fp32": needs}, growth_bytes=10)
    reserved = (2 + MIDDLE) / UNITS_SHARE + 10
    fits = host("h", free_bytes=reserved, idle_bytes=20)
    slow = [replace(device, node=replace(device.node, ends_s=1e6, back_s=1e6)) for device in DEVICES]
    assert best(step, slow, [fits]).hosts[0].memory_bytes == 20 + 10 + 2 + MIDDLE
    with pytest.raises(DoesNotFit):
        best(step, DEVICES, [host("h", free_bytes=reserved - 0.1)])


def test_a_host_keeps_the_units_that_come_while_one_is_away() -> None:
    """Two hosts of four layers take 4 s per unit, so a unit arrives every 2 s at most."""
    needs = Footprint((0,) * LAYERS, unit_layer_bytes=30)  # 12 micro-batches in flight
    step = replace(STEP, footprints={"fp32": needs}, micro_batches=12, window=12)
    device = DeviceEnds(NodeResources("d", ends_s=3.0, back_s=2.9), 1, LAYERS - 1)
    found = best(step, [device], [host("a"), host("b")], count=2)
    first, last = found.hosts
    assert last.memory_bytes == 4 * 30 / 12 * (1 + 2)  # away for the device's back: ceil(2.9 / 2)
    assert first.memory_bytes == 4 * 30 / 12 * (1 + 4)  # and for the last host: ceil((2.9 + 4) / 2)


def test_the_message_says_what_is_missing() -> None:
    step = replace(STEP, footprints={"fp32": Footprint((1_000_000,) * LAYERS)})
    with pytest.raises(DoesNotFit) as caught:
        best(step, DEVICES, [host("a", free_bytes=3e6), host("b", free_bytes=2e6)])
    assert str(caught.value) == (
        f"the hosts have to hold {MIDDLE} layers (1 to 9) and have memory for 5 (a 3 in 3 MB, b 2 in 2 MB): {MIDDLE - 5} MB more "
        "are needed. Counted is the memory that was free when each host joined, beside its other programs"
    )
    assert caught.value.missing_bytes == (MIDDLE - 5) * 1e6


@pytest.mark.parametrize(("free_bytes", "fits"), [(MIDDLE, True), (MIDDLE - 1, False)])
def test_a_shortage_is_known_without_the_best_chain(free_bytes: int, fits: bool) -> None:
    step = replace(STEP, footprints={"fp32": Footprint((1,) * LAYERS)})
    found = shortage(SiteInstance(step, tuple(DEVICES), (host("h", free_bytes=free_bytes),)))
    assert (found is None) == fits
    assert found is None or found.missing_bytes == 1


def test_a_device_that_cannot_hold_its_own_layers() -> None:
    small = [DeviceEnds(NodeResources("pi", ends_s=1.0, ends_bytes=70_000_000, free_bytes=50e6), 1, 9)]
    with pytest.raises(
        DoesNotFit, match=r"device pi keeps layers 0 to 1 and those from 9 on: 20 MB more than its 50 MB"
    ):
        best(STEP, small, [host("h")])


def test_too_few_hosts() -> None:
    with pytest.raises(RunFailed, match="a site needs 2 hosts, and only 1 of the nodes can be one"):
        best(STEP, DEVICES, [host("h")], count=2)


# ---------------------------------------------------------------- keeping a plan


def test_an_old_plan_stays_until_a_new_one_wins_clearly() -> None:
    hosts = [host("a", 1.0), host("b", 1.0)]
    old = best(STEP, DEVICES, hosts)
    for slower, stays in ((1.01, True), (10.0, False)):
        now = [replace(hosts[0], layer_s={"fp32": slower}), hosts[1]]
        again = cost(STEP, DEVICES, now, old.chain)
        assert again is not None
        (chosen,), why = keep_or_change([again], [best(STEP, DEVICES, now)])
        assert (chosen.chain == old.chain) == stays
        assert why.endswith("faster than the old plan") == (not stays)
    barely = replace(old, step_s=1.09 * old.step_s, hosts=old.hosts[:1])
    assert keep_or_change([barely], [old]) == ([barely], "a new plan would be 9% faster, which is not more than 10%")
    assert keep_or_change([barely], [old], gain=0.08)[0] == [old]
    other = replace(old, step_s=2 * old.step_s)
    assert keep_or_change([barely, other], [old, other])[0] == [barely, other], "the slowest site counts"


def test_chains_in_use_are_costed_with_todays_numbers() -> None:
    hosts = [host("a"), host("b", 2.0)]
    found = best(STEP, DEVICES, hosts)
    again = cost(STEP, DEVICES, hosts, found.chain)
    assert again is not None
    assert replace(again, left_out=found.left_out, memory_limit=found.memory_limit) == found
    assert keep_or_change([again], [found]) == ([found], "as before")


@pytest.mark.parametrize("hosts", [[host("a")], [host("a", free_bytes=1), host("b")]])
def test_an_old_plan_without_its_host_or_memory_is_given_up(hosts: list[NodeResources]) -> None:
    found = best(STEP, DEVICES, [host("a"), host("b")])
    assert len(found.hosts) == 2
    assert cost(STEP, DEVICES, hosts, found.chain) is None
    assert keep_or_change(None, [found]) == ([found], "the old plan is no longer possible")


def test_hosts_are_shared_out_there_and_back() -> None:
    hosts = [host(name, speed) for name, speed in (("a", 4.0), ("b", 1.0), ("c", 3.0), ("d", 2.0))]
    assert [[node.name for node in site] for site in share_out_hosts(hosts, 2)] == [["b", "a"], ["d", "c"]]


# ---------------------------------------------------------------- a finished run


def write_run(folder: Path, step_s: float) -> Path:
    """Two rounds of ten steps and the evaluation; the second plan predicts 2 s per step and 100 MB per node."""
    parts = {"devices": [{"node": "d", "memory_bytes": 100e6}], "hosts": [{"node": "h", "memory_bytes": 100e6}]}
    lines = []
    for number, steps, predicted in ((1, 10, 50.0), (2, 10, 2.0), (3, 0, 2.0)):
        losses = [0.5] * steps
        device = {"name": "d", "train_seconds": step_s * steps, "step_losses": losses, "peak_rss_bytes": 110e6}
        done = {"round": number, "steps": steps, "devices": [device], "hosts": [{"name": "h", "peak_rss_bytes": 50e6}]}
        lines.append({"event": "placement", "round": number, "step_s": predicted, "sites": [parts]})
        lines.append({"event": "round_done", **done})
    folder.mkdir()
    (folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def test_a_finished_run_is_compared_with_its_plan(tmp_path: Path) -> None:
    run, equal = write_run(tmp_path / "auto", 2.2), write_run(tmp_path / "equal", 3.0)
    figures = {figure.name.removeprefix("auto: "): figure for figure in compared(run)}
    step, device, node = (
        figures[f"{what}, predicted over measured"] for what in ("a step", "memory of d", "memory of h")
    )
    assert [step.value, device.value, node.value] == pytest.approx([2 / 2.2, 100 / 110, 100 / 50], abs=1e-3)
    assert [step.holds, device.holds, node.holds] == [True, True, False]
    assert (speed_up(run, equal).value, speed_up(run, equal).holds) == (pytest.approx(3 / 2.2, abs=1e-3), True)
    assert not speed_up(equal, run).holds
