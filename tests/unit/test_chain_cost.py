"""The formulas of docs/planner.md, evaluated by hand on one small site: a device, two hosts, five layers.

The device d keeps layer 0 and layer 4; host a holds layers 1 and 2, host b layer 3. Symbols are those of the page.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from edgelam_fl.plan.chain_memory import UNITS_SHARE, missing_bytes
from edgelam_fl.plan.facts import ChainCost, DeviceEnds, Footprint, NodeResources, SiteInstance, StepFacts
from edgelam_fl.plan.search import cost_of

BITS = 8 * 100_000  # of a tensor
D = NodeResources(
    "d", free_bytes=5_000, up_bps=8e6, down_bps=16e6, round_trip_s=0.02, ends_s=0.6, back_s=0.2, ends_bytes=700,
    idle_bytes=50,
)  # fmt: skip
A = NodeResources("a", {"fp32": 0.5}, free_bytes=5_000, up_bps=80e6, down_bps=40e6, round_trip_s=0.04, idle_bytes=60)
B = NodeResources("b", {"fp32": 0.25}, free_bytes=5_000, up_bps=20e6, down_bps=10e6, round_trip_s=0.06, idle_bytes=70)
STEP = StepFacts(
    {"fp32": Footprint((100, 110, 120, 130, 140), unit_bytes=30, unit_layer_bytes=20)},
    tensor_bytes=100_000, micro_batches=3, window=2, growth_bytes=5, relay_bps=4e6, relay_round_trip_s=0.1,
)  # fmt: skip


def cost(step: StepFacts = STEP, d: NodeResources = D, a: NodeResources = A, b: NodeResources = B) -> ChainCost:
    found = cost_of(SiteInstance(step, (DeviceEnds(d, 1, 4),), (a, b)), (("a", 3), ("b", 4)))
    assert found is not None
    return found


def terms(step: StepFacts, d: NodeResources, a: NodeResources, b: NodeResources) -> tuple[float, dict[str, float]]:
    """(cycle_s, what a step is at least as long as), for links that are direct except a -> b if b is not reachable."""
    m = units = step.micro_batches
    relay_bps = math.inf if b.reachable else step.relay_bps
    added_s = 0.0 if b.reachable else step.relay_round_trip_s
    entry_s = (
        BITS / min(d.up_bps, a.down_bps) + BITS / min(a.up_bps, d.down_bps) + (d.round_trip_s + a.round_trip_s) / 2
    )
    between_s = (
        BITS / min(a.up_bps, b.down_bps, relay_bps)
        + BITS / min(b.up_bps, a.down_bps, relay_bps)
        + (a.round_trip_s + b.round_trip_s) / 2 + added_s
    )  # fmt: skip
    exit_s = (
        BITS / min(d.up_bps, b.down_bps, relay_bps)
        + BITS / min(b.up_bps, d.down_bps, relay_bps)
        + (d.round_trip_s + b.round_trip_s) / 2 + added_s
    )  # fmt: skip
    a_unit_s, b_unit_s = 2 * a.layer_s["fp32"], 1 * b.layer_s["fp32"]
    cycle_s = d.ends_s + entry_s + a_unit_s + between_s + b_unit_s + exit_s
    before_a_s = d.ends_s - d.back_s
    before_b_s = before_a_s + entry_s + a_unit_s
    return cycle_s, {
        "compute of d": m * d.ends_s,
        "compute of a": before_a_s + entry_s + units * a_unit_s,
        "compute of b": before_b_s + between_s + units * b_unit_s,
        "uplink of d": cycle_s / 2 + m * 2 * BITS / d.up_bps,
        "downlink of d": cycle_s / 2 + m * 2 * BITS / d.down_bps,
        "uplink of a": before_a_s + units * 2 * BITS / a.up_bps,
        "downlink of a": before_a_s + units * 2 * BITS / a.down_bps,
        "uplink of b": before_b_s + units * 2 * BITS / b.up_bps,
        "downlink of b": before_b_s + units * 2 * BITS / b.down_bps,
        "queue at d": cycle_s + (m - 1) * max(d.back_s, (d.ends_s - d.back_s) / 2),
        "queue at a": cycle_s + (units - 1) * a_unit_s / 2,
        "queue at b": cycle_s + (units - 1) * b_unit_s / 2,
        "queue on links of d": cycle_s + (m - 1) * BITS / min(d.up_bps, d.down_bps),
        "queue on links of a": cycle_s + (units - 1) * BITS / min(a.up_bps, a.down_bps),
        "queue on links of b": cycle_s + (units - 1) * BITS / min(b.up_bps, b.down_bps),
        "queue at the relay": cycle_s + (units - 1) * (0 if b.reachable else 4) * BITS / step.relay_bps,
        "window": math.ceil(m / step.window) * cycle_s,
    }


MANY = replace(STEP, micro_batches=12, window=12)


@pytest.mark.parametrize(
    ("longest", "step", "d", "a", "b"),
    [
        ("window", STEP, D, A, B),
        ("compute of a", MANY, D, A, B),
        ("compute of b", MANY, D, A, replace(B, layer_s={"fp32": 2.0})),
        ("compute of d", MANY, replace(D, ends_s=3.0, back_s=0.1), A, B),
        ("uplink of d", MANY, replace(D, up_bps=1e6), A, B),
        ("downlink of d", MANY, replace(D, down_bps=1e6), A, B),
        ("uplink of a", MANY, D, replace(A, up_bps=1e6), B),
        ("downlink of b", MANY, D, A, replace(B, down_bps=1e6)),
        ("queue at a", replace(MANY, micro_batches=2), D, A, B),
        ("queue at d", replace(MANY, micro_batches=2), replace(D, ends_s=3.0, back_s=1.6), A, B),
        ("queue at the relay", replace(MANY, relay_bps=1e6), D, A, replace(B, reachable=False)),
    ],
)
def test_a_step_is_as_long_as_the_longest_term(
    longest: str, step: StepFacts, d: NodeResources, a: NodeResources, b: NodeResources
) -> None:
    cycle_s, expected = terms(step, d, a, b)
    found = cost(step, d, a, b)
    assert found.cycle_s == pytest.approx(cycle_s)
    assert found.step_s == pytest.approx(max(expected.values()))
    assert max(expected, key=lambda name: expected[name]) == longest


def test_what_each_node_computes() -> None:
    found = cost()
    assert [host.compute_s for host in found.hosts] == pytest.approx([3 * 2 * 0.5, 3 * 1 * 0.25])
    assert found.devices[0].compute_s == pytest.approx(3 * 0.6)


@pytest.mark.parametrize(
    ("changes", "sent", "received"),
    [
        ({}, {"d": 2, "a": 2, "b": 2}, {"d": 2, "a": 2, "b": 2}),
        ({"front_learns": False}, {"d": 2, "a": 1, "b": 2}, {"d": 1, "a": 2, "b": 2}),
        ({"back_on_device": False}, {"d": 1, "a": 2, "b": 1}, {"d": 1, "a": 2, "b": 1}),
        (
            {"front_learns": False, "cut_share": 0.25},
            {"d": 1.25, "a": 1, "b": 1.25},
            {"d": 1.25, "a": 1, "b": 1.25},
        ),
        ({"gradient_share": 0.5}, {"d": 1.5, "a": 1.5, "b": 1.5}, {"d": 1.5, "a": 1.5, "b": 1.5}),
        (
            {"front_learns": False, "cut_share": 0.25, "gradient_share": 0.4},
            {"d": 1.1, "a": 1, "b": 1.25},
            {"d": 1.25, "a": 1, "b": 1.1},
        ),
    ],
)
def test_bytes_of_links(changes: dict[str, float], sent: dict[str, float], received: dict[str, float]) -> None:
    """`sent` and `received`: tensors per unit."""
    found = cost(replace(STEP, **changes))  # type: ignore[arg-type]
    loads = [*found.devices, *found.hosts]
    assert {load.node: load.up_bytes for load in loads} == {name: 3 * n * 100_000 for name, n in sent.items()}
    assert {load.node: load.down_bytes for load in loads} == {name: 3 * n * 100_000 for name, n in received.items()}


def test_memory_of_each_node() -> None:
    """Both hosts keep the whole window of two units: a unit is away for longer than it takes until the next one arrives."""
    found = cost()
    a_units, b_units = 30 + 2 * 20, 30 + 1 * 20
    assert [host.memory_bytes for host in found.hosts] == [60 + 5 + 110 + 120 + a_units, 70 + 5 + 130 + b_units]
    assert found.devices[0].memory_bytes == 50 + 5 + 700


def test_memory_of_the_last_host_with_the_head_and_few_units_in_flight() -> None:
    """With the head no unit leaves the last host between its passes, so of a window of two one is kept."""
    with_head = replace(STEP.footprints["fp32"], head_bytes=900)
    found = cost(replace(STEP, back_on_device=False, footprints={"fp32": with_head}))
    assert found.hosts[1].memory_bytes == 70 + 5 + 130 + 900 + (30 + 1 * 20) / 2


def test_a_slice_needs_room_for_its_whole_window() -> None:
    site = SiteInstance(STEP, (DeviceEnds(D, 1, 4),), (A, B))
    needed = 110 + 120 + (30 + 2 * 20) / UNITS_SHARE + 5
    assert missing_bytes(site, A, "fp32", 1, 3) == pytest.approx(needed - 5_000)


def test_a_unit_takes_longer_at_a_host_with_several_workers_and_the_host_no_longer_for_all() -> None:
    both = replace(A, workers=2)
    cycle_s, _ = terms(STEP, D, A, B)
    assert cost(a=both).cycle_s == pytest.approx(cycle_s + 2 * A.layer_s["fp32"])
    assert [host.compute_s for host in cost(a=both).hosts] == [host.compute_s for host in cost().hosts]
