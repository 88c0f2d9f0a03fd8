"""The planner against every plan there is, on random small instances; and what it predicted of a finished run against what was.

The first half is computed here: `search` tries all hosts in all orders with all cuts, and knows nothing of `split.planner`,
and of `split.costs` but the words of its first page. The second half, `compared`, reads runs with split.cuts = "auto" that
were done elsewhere: `python -m benchmarks.planner --run FOLDER [--run FOLDER ...] [--equal FOLDER]` writes
results/planner_runs.json.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import combinations, pairwise, permutations
from pathlib import Path
from random import Random
from statistics import mean, median
from typing import Any

from benchmarks.common import RESULTS, Figure, machine, main
from edgelam_fl.errors import DoesNotFit
from edgelam_fl.plan.chain_cost import Footprint, Member, Node, Plan, Run
from edgelam_fl.plan.search import best_plan
from edgelam_fl.telemetry.events import read_events

INSTANCES, SMOKE_INSTANCES = 500, 25
TIME_OFF, MEMORY_OFF, FASTER = 0.2, 0.15, 1.3  # the bars
EQUAL = 1e-9


def measure(smoke: bool) -> tuple[dict[str, Any], list[Figure]]:
    count = SMOKE_INSTANCES if smoke else INSTANCES
    equal, impossible, fewer, took = 0, 0, 0, []
    for seed in range(count):
        instance = random_instance(Random(seed), hosts=4, layers=6)
        began = time.process_time()
        found = planned(*instance)
        took.append(time.process_time() - began)
        best = search(*instance)
        equal += (found is None) == (best is None) and (
            found is None or math.isclose(found.step_s, best, rel_tol=EQUAL)
        )
        impossible += best is None
        fewer += found is not None and len(found.hosts) < len(instance[2])
    figures = [
        Figure("instances on which the planner finds the best plan", equal, "", f"all {count}", equal == count),
        Figure("instances that fit nowhere, and are refused", impossible, ""),
        Figure("instances in which hosts are left out", fewer, ""),
        Figure("planning, median, of a core", round(1e3 * median(took), 2), "ms"),
        Figure("planning 8 unlike hosts and 30 layers, of a core", round(_large_s(), 2), "s"),
    ]

    return {"instances": count, "hosts": "1 to 4", "layers": "3 to 6", "devices": "1 to 3"}, figures


def planned(run: Run, members: Sequence[Member], hosts: Sequence[Node]) -> Plan | None:
    try:
        return best_plan(run, members, hosts)
    except DoesNotFit:
        return None


def _large_s() -> float:
    rng = Random(1)
    run, members, _ = random_instance(rng, hosts=4, layers=6)
    run = Run({name: Footprint((10,) * 30) for name in run.bases}, run.tensor_bytes, 4, 3)
    members = [Member(member.node, 2, 28) for member in members]
    hosts = [_node(rng, f"host-{number}", run) for number in range(8)]
    began = time.process_time()
    best_plan(run, members, hosts)
    return time.process_time() - began


# ---------------------------------------------------------------- finished runs


def compared(folder: Path) -> list[Figure]:
    """What the planner predicted, over what was measured: a step, and each node's memory.

    A step is the mean of all rounds that trained but the first, whose plan knows profiles alone (`predicted_first`).
    """
    placements, rounds = by_round(folder, "placement"), by_round(folder, "round_done")
    trained = [number for number in sorted(placements) if rounds.get(number, {}).get("steps")]
    if not trained:
        raise SystemExit(f"{folder} has no round that trained by a plan (split.cuts = 'auto')")
    name, done, later = folder.name, rounds[trained[-1]], trained[1:] or trained
    foreseen, step = mean(placements[n]["step_s"] for n in later), mean(measured_step_s(rounds[n]) for n in later)
    figures = [
        Figure(f"{name}: a step, predicted", round(foreseen, 3), "s"),
        Figure(f"{name}: a step, measured", round(step, 3), "s"),
        near(f"{name}: a step, predicted over measured", foreseen / step, TIME_OFF),
    ]
    peaks = {node["name"]: node["peak_rss_bytes"] for node in [*done["devices"], *done["hosts"]]}
    predicted: dict[str, int] = {}  # a peak is that of all rounds so far, and so is this
    for number in trained:
        for site in placements[number]["sites"]:
            for part in [*site["devices"], *site["hosts"]]:
                predicted[part["node"]] = max(predicted.get(part["node"], 0), part["memory_bytes"])
    return figures + [
        near(f"{name}: memory of {node}, predicted over measured", size / peaks[node], MEMORY_OFF)
        for node, size in sorted(predicted.items())
        if peaks.get(node)
    ]


def predicted_first(folder: Path) -> Figure:
    """Of the first round that trained, whose plan knows profiles alone."""
    placements, rounds = by_round(folder, "placement"), by_round(folder, "round_done")
    first = min(number for number in placements if rounds.get(number, {}).get("steps"))
    ratio = placements[first]["step_s"] / measured_step_s(rounds[first])
    return Figure(
        f"{folder.name}: a step of round {first}, predicted from profiles alone over measured", round(ratio, 3), ""
    )


def speed_up(planned_run: Path, equal_run: Path) -> Figure:
    """Two runs of the same nodes, data and seed: by the planner, and with equal cuts. Their first rounds do not count."""
    seconds = []
    for folder in (planned_run, equal_run):
        steps = [measured_step_s(done) for done in by_round(folder, "round_done").values() if done["steps"]]
        seconds.append(mean(steps[1:] or steps))
    return Figure(
        f"a step with equal cuts over one by the planner ({planned_run.name})", round(seconds[1] / seconds[0], 3), "",
        f"at least {FASTER}", seconds[1] >= FASTER * seconds[0],
    )  # fmt: skip


def measured_step_s(done: Mapping[str, Any]) -> float:
    """Of the slowest device: its training, over its steps."""
    return max(d["train_seconds"] / len(d["step_losses"]) for d in done["devices"] if d["step_losses"])


def by_round(folder: Path, event: str) -> dict[int, dict[str, Any]]:
    """The newest attempt at each round counts."""
    return {line["round"]: line for line in read_events(folder / "events.jsonl") if line["event"] == event}


def near(name: str, ratio: float, off: float) -> Figure:
    return Figure(name, round(ratio, 3), "", f"within {off:.0%} of 1", abs(ratio - 1) <= off)


def _runs() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planner --run FOLDER")
    parser.add_argument(
        "--run", type=Path, action="append", required=True, help="a finished run with split.cuts = 'auto'"
    )
    parser.add_argument("--equal", type=Path, help="the first one's nodes, data and seed with equal cuts")
    chosen = parser.parse_args()
    figures = [figure for folder in chosen.run for figure in compared(folder)]
    figures += [speed_up(chosen.run[0], chosen.equal)] if chosen.equal else []
    written = {"name": "planner_runs", "machine": machine(), "figures": [asdict(figure) for figure in figures]}
    (RESULTS / "planner_runs.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(written))


# ---------------------------------------------------------------- every plan there is


def random_instance(rng: Random, *, hosts: int, layers: int) -> tuple[Run, list[Member], list[Node]]:
    """A few devices, hosts and layers; times around a second, links around a tensor a second, memory often short."""
    total = rng.randint(3, layers)
    names = rng.sample(("fp32", "int8", "nf4"), rng.randint(1, 2))
    run = Run(
        bases={
            name: Footprint(
                tuple(rng.randint(5, 12) for _ in range(total)), unit=rng.randint(0, 3), unit_layer=rng.randint(0, 2),
                tail=rng.randint(0, 4),
            )
            for name in names
        },
        tensor_bytes=rng.choice((0, 125_000)),
        micro_batches=rng.randint(1, 4),
        window=rng.randint(1, 4),
        front_learns=rng.random() < 0.7,
        back_on_device=rng.random() < 0.8,
        tail_layers=rng.choice((0.0, 2.0)),
        grows_bytes=rng.randint(0, 5),
        relay_bps=rng.choice((math.inf, rng.uniform(1e6, 2e7))),
        relay_round_trip_s=rng.uniform(0, 0.5),
    )  # fmt: skip
    members = []
    for number in range(rng.randint(1, 3)):
        front = rng.randint(0, 1)
        device = Node(
            f"device-{number}", up_bps=_rate(rng), down_bps=_rate(rng), round_trip_s=rng.uniform(0, 0.2),
            own_s=rng.uniform(0, 2), own_bytes=rng.randint(0, 3), memory_bytes=30,
        )  # fmt: skip
        members.append(Member(device, front, rng.randint(max(front + 1, total - 1), total)))
    found = [_node(rng, f"host-{number}", run) for number in range(rng.randint(1, hosts))]
    if rng.random() < 0.2:  # a device that hosts
        own = members[0].node
        found[0] = Node(
            own.name, found[0].layer_s, found[0].memory_bytes, own.up_bps, own.down_bps, own.round_trip_s,
            own_s=own.own_s, own_bytes=own.own_bytes,
        )  # fmt: skip
    pairs = [(dialler.name, host.name) for dialler in [*found, *(m.node for m in members)] for host in found]
    return replace(run, by_relay=frozenset(pair for pair in pairs if rng.random() < 0.15)), members, found


def _node(rng: Random, name: str, run: Run) -> Node:
    speed = rng.choice((0.2, 0.4, 1.0))
    return Node(
        name, {base: rng.uniform(0.1, 1) / speed for base in run.bases}, memory_bytes=rng.choice((25, 45, 80, math.inf)),
        up_bps=_rate(rng), down_bps=_rate(rng), round_trip_s=rng.uniform(0, 0.2), reachable=rng.random() < 0.8,
    )  # fmt: skip


def _rate(rng: Random) -> float:
    return rng.choice((math.inf, 5e6, 1e6, rng.uniform(5e5, 1e8)))


def search(run: Run, members: Sequence[Member], hosts: Sequence[Node]) -> float | None:
    """The shortest step of all chains of hosts that fit, by trying each; None where there is none."""
    if any(m.node.own_bytes + run.grows_bytes > m.node.memory_bytes for m in members):
        return None
    steps = (step_s(run, members, chain) for chain in chains(members, hosts))
    return min((seconds for seconds in steps if seconds is not None), default=None)


Piece = tuple[Node, int, int]


def chains(members: Sequence[Member], hosts: Sequence[Node]) -> Iterator[list[Piece]]:
    """Every ordered choice of hosts, with every way to cut the layers that all routes cross."""
    first, last = min(m.front for m in members), max(m.back_first for m in members)
    for length in range(1, len(hosts) + 1):
        for cuts in combinations(range(first + 1, last), length - 1):
            pieces = list(pairwise([first, *cuts, last]))
            if all(min(b, m.back_first) > max(a, m.front) for a, b in pieces for m in members):
                for order in permutations(hosts, length):
                    yield [(host, a, b) for host, (a, b) in zip(order, pieces, strict=True)]


def step_s(run: Run, members: Sequence[Member], chain: Sequence[Piece]) -> float | None:
    """One chain's step by the words of `split.costs`; None where a host has not the memory."""
    bases = [_base(run, len(members), chain, number) for number in range(len(chain))]
    if None in bases:
        return None
    m, units, tensor_s = run.micro_batches, run.micro_batches * len(members), 8 * run.tensor_bytes
    down_entry, exits = int(run.front_learns), int(run.back_on_device)
    devices = {member.node.name: member.node for member in members}
    per_unit = {
        name: (d.own_s, tensor_s * (1 + exits) / d.up_bps, tensor_s * (exits + down_entry) / d.down_bps)
        for name, d in devices.items()
    }
    slowest = max(devices.values(), key=lambda d: (sum(per_unit[d.name]), d.name))
    cycle_s, outside_s = slowest.own_s, slowest.own_s - slowest.back_s
    steps = [m * own_s for own_s, *_ in per_unit.values()]
    passes = [(m - 1) * max(d.back_s, (d.own_s - d.back_s) / 2) for d in devices.values()]
    passes += [(m - 1) * tensor_s / min(d.up_bps, d.down_bps) for d in devices.values()]
    relayed = 0.0
    for number, ((host, first, last), base) in enumerate(zip(chain, bases, strict=True)):
        before = chain[number - 1][0] if number else slowest
        is_first, is_last = number == 0, number == len(chain) - 1
        tail = run.tail_layers if is_last else 0
        layer_s = host.layer_s[str(base)]
        back, on = (down_entry if is_first else 1), (exits if is_last else 1)
        way_s, one_s = _way_s(run, before, host, back), layer_s * (last - first + tail)
        crossed = sum(min(last, d.back_first) - max(first, d.front) + tail for d in members)
        own = per_unit.get(host.name, (0.0, 0.0, 0.0))
        own_first_s = slowest.own_s - slowest.back_s if host.name == slowest.name else 0.0
        steps.append(outside_s + way_s + m * (layer_s * crossed + own[0]) - own_first_s)
        steps.append(outside_s + units * tensor_s * (on + back) / host.up_bps + m * own[1])
        steps.append(outside_s + units * tensor_s * (1 + on) / host.down_bps + m * own[2])
        passes.append((m * layer_s * crossed - one_s) / 2)
        passes.append((units - 1) * tensor_s / min(host.up_bps, host.down_bps))
        cycle_s, outside_s = cycle_s + way_s + one_s, outside_s + way_s + one_s
        ways = [_relays(run, device, host) for device in devices.values()]
        of_devices = sum(ways) / len(ways)
        relayed += (1 + back) * (
            of_devices if is_first else _relays(run, before, host)
        ) + 2 * exits * is_last * of_devices
    if exits:
        cycle_s += _way_s(run, slowest, chain[-1][0], 1)
    passes.append((units - 1) * relayed * tensor_s / run.relay_bps)
    steps += [cycle_s + max(passes), math.ceil(m / run.window) * cycle_s]
    steps += [cycle_s / 2 + m * busy_s for times in per_unit.values() for busy_s in times[1:]]
    return max(steps)


def _base(run: Run, devices: int, chain: Sequence[Piece], number: int) -> str | None:
    """The first base in which the slice fits."""
    host, first, last = chain[number]
    for base in host.layer_s:
        needs = run.bases[base]
        kept = devices * (needs.unit + (last - first) * needs.unit_layer) / run.unit_share
        weights = sum(needs.layers[first:last]) + (needs.tail if number == len(chain) - 1 else 0)
        if kept + weights + host.own_bytes + run.grows_bytes <= host.memory_bytes:
            return base
    return None


def _relays(run: Run, dialler: Node, dialled: Node) -> bool:
    return not dialled.reachable or (dialler.name, dialled.name) in run.by_relay


def _way_s(run: Run, dialler: Node, dialled: Node, back: int) -> float:
    """A tensor to the node that is dialled, and one back where there is one; the exit is dialled by the device."""
    if dialler.name == dialled.name:
        return 0.0
    relay_bps, added_s = (run.relay_bps, run.relay_round_trip_s) if _relays(run, dialler, dialled) else (math.inf, 0.0)
    ways = [(dialler.up_bps, dialled.down_bps)] + [(dialled.up_bps, dialler.down_bps)] * back
    apart_s = (dialler.round_trip_s + dialled.round_trip_s) / 2 + added_s
    return sum(8 * run.tensor_bytes / min(*way, relay_bps) + apart_s / 2 for way in ways)


if __name__ == "__main__":
    _runs() if "--run" in sys.argv else main("planner", measure)
