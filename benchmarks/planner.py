"""Compares the planner with all possible plans on random small instances, and its predictions with finished runs.

For the first comparison `search` tries all hosts in all orders with all cuts. It shares no code with `plan.search` and
`plan.chain_cost`, only the formulas in docs/planner.md. For the second, `compared` reads finished runs with
split.cuts = "auto": `python -m benchmarks.planner --run FOLDER [--run FOLDER ...] [--equal FOLDER]` writes
results/planner_runs.json.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import combinations, pairwise, permutations
from pathlib import Path
from random import Random
from statistics import mean, median
from typing import Any, TypeVar

from benchmarks.common import RESULTS, Figure, machine, main
from edgelam_fl.errors import DoesNotFit
from edgelam_fl.plan.chain_memory import UNITS_SHARE
from edgelam_fl.plan.facts import ChainCost, DeviceEnds, Footprint, NodeResources, SiteInstance, StepFacts
from edgelam_fl.plan.search import best_chain
from edgelam_fl.telemetry.events import PlacementMade, RoundDone, of_kind, read_events

INSTANCES, SMOKE_INSTANCES = 500, 25
TIME_OFF, MEMORY_OFF, FASTER = 0.2, 0.15, 1.3  # the bars
EQUAL = 1e-9
_OfRound = TypeVar("_OfRound", PlacementMade, RoundDone)


def measure(smoke: bool) -> tuple[dict[str, Any], list[Figure]]:
    count, hosts, layers = (SMOKE_INSTANCES, 4, 12) if smoke else (INSTANCES, 8, 30)
    equal, impossible, fewer, took = 0, 0, 0, []
    for seed in range(count):
        instance = random_instance(Random(seed), hosts=4, layers=6)
        began = time.process_time()
        found = planned(instance)
        took.append(time.process_time() - began)
        best = search(instance)
        equal += (found is None) == (best is None) and (
            found is None or math.isclose(found.step_s, best, rel_tol=EQUAL)
        )
        impossible += best is None
        fewer += found is not None and len(found.hosts) < len(instance.hosts)
    figures = [
        Figure("instances on which the planner finds the best plan", equal, "", f"all {count}", equal == count),
        Figure("instances that fit nowhere, and are refused", impossible, ""),
        Figure("instances in which hosts are left out", fewer, ""),
        Figure("planning, median, of a core", round(1e3 * median(took), 2), "ms"),
        Figure(f"planning {hosts} unlike hosts and {layers} layers, of a core", round(_large_s(hosts, layers), 2), "s"),
    ]

    return {"instances": count, "hosts": "1 to 4", "layers": "3 to 6", "devices": "1 to 3"}, figures


def planned(instance: SiteInstance) -> ChainCost | None:
    try:
        return best_chain(instance)
    except DoesNotFit:
        return None


def _large_s(number: int, layers: int) -> float:
    rng = Random(1)
    small = random_instance(rng, hosts=4, layers=6)
    footprints = {name: Footprint((10,) * layers) for name in small.step.footprints}
    step = StepFacts(footprints, small.step.tensor_bytes, 4, 3)
    devices = tuple(DeviceEnds(device.node, 2, layers - 2) for device in small.devices)
    hosts = tuple(_node(rng, f"host-{each}", step) for each in range(number))
    began = time.process_time()
    best_chain(SiteInstance(step, devices, hosts))
    return time.process_time() - began


# ---------------------------------------------------------------- finished runs


def compared(folder: Path) -> list[Figure]:
    """Returns predicted over measured values of a step and of each node's memory.

    A step is the mean over all rounds that trained except the first, whose plan knows only profiles (`predicted_first`).
    """
    placements, rounds = by_round(folder, PlacementMade), by_round(folder, RoundDone)
    trained = [number for number in sorted(placements) if number in rounds and rounds[number].steps]
    if not trained:
        raise SystemExit(f"{folder} has no round that trained by a plan (split.cuts = 'auto')")
    name, done, later = folder.name, rounds[trained[-1]], trained[1:] or trained
    predicted_s, step = mean(placements[n].step_s for n in later), mean(measured_step_s(rounds[n]) for n in later)
    figures = [
        Figure(f"{name}: a step, predicted", round(predicted_s, 3), "s"),
        Figure(f"{name}: a step, measured", round(step, 3), "s"),
        near(f"{name}: a step, predicted over measured", predicted_s / step, TIME_OFF),
    ]
    peaks = {node.name: node.peak_rss_bytes for node in (*done.devices, *done.hosts)}
    predicted: dict[str, int] = {}  # like a peak, over all rounds so far
    for number in trained:
        for site in placements[number].sites:
            for load in (*site.devices, *site.hosts):
                predicted[load.node] = max(predicted.get(load.node, 0), load.memory_bytes)
    return figures + [
        near(f"{name}: memory of {node}, predicted over measured", size / peaks[node], MEMORY_OFF)
        for node, size in sorted(predicted.items())
        if peaks.get(node)
    ]


def predicted_first(folder: Path) -> Figure:
    """Returns predicted over measured step of the first round that trained, whose plan knows only profiles."""
    placements, rounds = by_round(folder, PlacementMade), by_round(folder, RoundDone)
    first = min(number for number in placements if number in rounds and rounds[number].steps)
    ratio = placements[first].step_s / measured_step_s(rounds[first])
    return Figure(
        f"{folder.name}: a step of round {first}, predicted from profiles alone over measured", round(ratio, 3), ""
    )


def speed_up(planned_run: Path, equal_run: Path) -> Figure:
    """Compares two runs of the same nodes, data and seed, by the planner and with equal cuts, without their first rounds."""
    seconds = []
    for folder in (planned_run, equal_run):
        steps = [measured_step_s(done) for done in by_round(folder, RoundDone).values() if done.steps]
        seconds.append(mean(steps[1:] or steps))
    return Figure(
        f"a step with equal cuts over one by the planner ({planned_run.name})", round(seconds[1] / seconds[0], 3), "",
        f"at least {FASTER}", seconds[1] >= FASTER * seconds[0],
    )  # fmt: skip


def measured_step_s(done: RoundDone) -> float:
    """Returns seconds per training step of the slowest device."""
    return max(device.train_seconds / len(device.step_losses) for device in done.devices if device.step_losses)


def by_round(folder: Path, kind: type[_OfRound]) -> dict[int, _OfRound]:
    """Returns the events of a kind per round; the newest attempt at each round counts."""
    return {event.round: event for event in of_kind(read_events(folder / "events.jsonl"), kind)}


def near(name: str, ratio: float, off: float) -> Figure:
    return Figure(name, round(ratio, 3), "", f"within {off:.0%} of 1", abs(ratio - 1) <= off)


def _runs() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planner --run FOLDER")
    parser.add_argument(
        "--run", type=Path, action="append", required=True, help="a finished run with split.cuts = 'auto'"
    )
    parser.add_argument(
        "--equal", type=Path, help="a run with equal cuts and the nodes, data and seed of the first --run"
    )
    chosen = parser.parse_args()
    figures = [figure for folder in chosen.run for figure in compared(folder)]
    figures += [speed_up(chosen.run[0], chosen.equal)] if chosen.equal else []
    written = {"name": "planner_runs", "machine": machine(), "figures": [asdict(figure) for figure in figures]}
    (RESULTS / "planner_runs.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(written))


# ---------------------------------------------------------------- every possible plan


def random_instance(rng: Random, *, hosts: int, layers: int) -> SiteInstance:
    """Draws a few devices, hosts and layers: times near a second, links near a tensor per second, memory often short."""
    total = rng.randint(3, layers)
    names = rng.sample(("fp32", "int8", "nf4"), rng.randint(1, 2))
    step = StepFacts(
        footprints={
            name: Footprint(
                tuple(rng.randint(5, 12) for _ in range(total)), unit_bytes=rng.randint(0, 3),
                unit_layer_bytes=rng.randint(0, 2), head_bytes=rng.randint(0, 4),
            )
            for name in names
        },
        tensor_bytes=rng.choice((0, 125_000)),
        micro_batches=rng.randint(1, 4),
        window=rng.randint(1, 4),
        front_learns=rng.random() < 0.7,
        back_on_device=rng.random() < 0.8,
        head_layers=rng.choice((0.0, 2.0)),
        growth_bytes=rng.randint(0, 5),
        relay_bps=rng.choice((math.inf, rng.uniform(1e6, 2e7))),
        relay_round_trip_s=rng.uniform(0, 0.5),
    )  # fmt: skip
    devices = []
    for number in range(rng.randint(1, 3)):
        front = rng.randint(0, 1)
        node = NodeResources(
            f"device-{number}", up_bps=_rate(rng), down_bps=_rate(rng), round_trip_s=rng.uniform(0, 0.2),
            ends_s=rng.uniform(0, 2), ends_bytes=rng.randint(0, 3), free_bytes=30,
        )  # fmt: skip
        devices.append(DeviceEnds(node, front, rng.randint(max(front + 1, total - 1), total)))
    found = [_node(rng, f"host-{number}", step) for number in range(rng.randint(1, hosts))]
    if rng.random() < 0.2:  # a device that is a host too
        found[0] = replace(
            devices[0].node, layer_s=found[0].layer_s, free_bytes=found[0].free_bytes, workers=found[0].workers
        )
    pairs = [(node.name, host.name) for node in [*found, *(device.node for device in devices)] for host in found]
    step = replace(step, by_relay=frozenset(pair for pair in pairs if rng.random() < 0.15))
    return SiteInstance(step, tuple(devices), tuple(found))


def _node(rng: Random, name: str, step: StepFacts) -> NodeResources:
    speed = rng.choice((0.2, 0.4, 1.0))
    return NodeResources(
        name, {base: rng.uniform(0.1, 1) / speed for base in step.footprints},
        free_bytes=rng.choice((25, 45, 80, math.inf)), up_bps=_rate(rng), down_bps=_rate(rng),
        round_trip_s=rng.uniform(0, 0.2), reachable=rng.random() < 0.8, workers=rng.choice((1, 1, 2)),
    )  # fmt: skip


def _rate(rng: Random) -> float:
    return rng.choice((math.inf, 5e6, 1e6, rng.uniform(5e5, 1e8)))


def search(instance: SiteInstance) -> float | None:
    """Returns the shortest step of all chains of hosts that fit, by trying each; None if none fits."""
    nodes = [device.node for device in instance.devices]
    if any(node.ends_bytes + instance.step.growth_bytes > node.free_bytes for node in nodes):
        return None
    steps = (step_s(instance, chain) for chain in chains(instance))
    return min((seconds for seconds in steps if seconds is not None), default=None)


Piece = tuple[NodeResources, int, int]


def chains(instance: SiteInstance) -> Iterator[list[Piece]]:
    """Yields every ordered choice of hosts, with every way to cut the layers that all routes cross."""
    devices, hosts = instance.devices, instance.hosts
    first, last = min(d.front for d in devices), max(d.back_first for d in devices)
    for length in range(1, len(hosts) + 1):
        for cuts in combinations(range(first + 1, last), length - 1):
            pieces = list(pairwise([first, *cuts, last]))
            if all(min(b, d.back_first) > max(a, d.front) for a, b in pieces for d in devices):
                for order in permutations(hosts, length):
                    yield [(host, a, b) for host, (a, b) in zip(order, pieces, strict=True)]


def step_s(instance: SiteInstance, chain: Sequence[Piece]) -> float | None:
    """Returns one chain's step by the formulas of docs/planner.md; None if a host lacks the memory."""
    step, ends = instance.step, instance.devices
    bases = [_base(step, len(ends), chain, number) for number in range(len(chain))]
    if None in bases:
        return None
    m, units, tensor_bits = step.micro_batches, step.micro_batches * len(ends), 8 * step.tensor_bytes
    returns, exits = int(step.front_learns), int(step.back_on_device)
    devices = {device.node.name: device.node for device in ends}
    per_unit = {
        name: (d.ends_s, tensor_bits * (1 + exits) / d.up_bps, tensor_bits * (exits + returns) / d.down_bps)
        for name, d in devices.items()
    }
    slowest = max(devices.values(), key=lambda d: (sum(per_unit[d.name]), d.name))
    cycle_s, outside_s = slowest.ends_s, slowest.ends_s - slowest.back_s
    steps = [m * ends_s for ends_s, *_ in per_unit.values()]
    queues = [(m - 1) * max(d.back_s, (d.ends_s - d.back_s) / 2) for d in devices.values()]
    queues += [(m - 1) * tensor_bits / min(d.up_bps, d.down_bps) for d in devices.values()]
    relayed = 0.0
    for number, ((host, first, last), base) in enumerate(zip(chain, bases, strict=True)):
        before = chain[number - 1][0] if number else slowest
        is_first, is_last = number == 0, number == len(chain) - 1
        head = step.head_layers if is_last else 0
        layer_s = host.layer_s[str(base)]
        back, on = (returns if is_first else 1), (exits if is_last else 1)
        link_s, every_s = _link_s(step, before, host, back), layer_s * (last - first + head)
        unit_s = host.workers * every_s
        crossed = sum(min(last, d.back_first) - max(first, d.front) + head for d in ends)
        own = per_unit.get(host.name, (0.0, 0.0, 0.0))
        own_first_s = slowest.ends_s - slowest.back_s if host.name == slowest.name else 0.0
        steps.append(outside_s + link_s + m * (layer_s * crossed + own[0]) - own_first_s)
        steps.append(outside_s + units * tensor_bits * (on + back) / host.up_bps + m * own[1])
        steps.append(outside_s + units * tensor_bits * (1 + on) / host.down_bps + m * own[2])
        queues.append((m * layer_s * crossed - every_s) / 2)
        queues.append((units - 1) * tensor_bits / min(host.up_bps, host.down_bps))
        cycle_s, outside_s = cycle_s + link_s + unit_s, outside_s + link_s + unit_s
        by_device = [_relays(step, device, host) for device in devices.values()]
        of_devices = sum(by_device) / len(by_device)
        relayed += (1 + back) * (
            of_devices if is_first else _relays(step, before, host)
        ) + 2 * exits * is_last * of_devices
    if exits:
        cycle_s += _link_s(step, slowest, chain[-1][0], 1)
    queues.append((units - 1) * relayed * tensor_bits / step.relay_bps)
    steps += [cycle_s + max(queues), math.ceil(m / step.window) * cycle_s]
    steps += [cycle_s / 2 + m * busy_s for times in per_unit.values() for busy_s in times[1:]]
    return max(steps)


def _base(step: StepFacts, devices: int, chain: Sequence[Piece], number: int) -> str | None:
    """Returns the first base in which a slice of the chain fits its host; None if it fits in none."""
    host, first, last = chain[number]
    for base in host.layer_s:
        needs = step.footprints[base]
        kept = devices * (needs.unit_bytes + (last - first) * needs.unit_layer_bytes) / UNITS_SHARE
        weights = sum(needs.layer_bytes[first:last]) + (needs.head_bytes if number == len(chain) - 1 else 0)
        if kept + weights + host.ends_bytes + step.growth_bytes <= host.free_bytes:
            return base
    return None


def _relays(step: StepFacts, dialling: NodeResources, dialled: NodeResources) -> bool:
    return not dialled.reachable or (dialling.name, dialled.name) in step.by_relay


def _link_s(step: StepFacts, dialling: NodeResources, dialled: NodeResources, back: int) -> float:
    """Seconds for a tensor to the dialled node, and with `back` one in return; a device dials its last host itself."""
    if dialling.name == dialled.name:
        return 0.0
    relayed = _relays(step, dialling, dialled)
    relay_bps, added_s = (step.relay_bps, step.relay_round_trip_s) if relayed else (math.inf, 0.0)
    ways = [(dialling.up_bps, dialled.down_bps)] + [(dialled.up_bps, dialling.down_bps)] * back
    round_trip_s = (dialling.round_trip_s + dialled.round_trip_s) / 2 + added_s
    return sum(8 * step.tensor_bytes / min(*way, relay_bps) + round_trip_s / 2 for way in ways)


if __name__ == "__main__":
    _runs() if "--run" in sys.argv else main("planner", measure)
