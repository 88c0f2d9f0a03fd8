"""Compares the schedulers with brute force, with their bound and with the simple rules on seeded instances, and times them.

Devices with a payload of 1 to 40 bits and 0 to 20 s of compute share a capacity of 10 bits per second, on wires. Delays are
recomputed here by plain bisection, so that the strategies' own code does not judge itself. Runs on one thread. Writes
results/scheduling.svg, the sweep over V, as well as the figures. --smoke: a few instances, no bars, no files.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from benchmarks.common import RESULTS, Figure, main
from strategies.api import Candidate, Demand, RoundOutcome, RoundState
from strategies.registry import BUILT_IN, load
from strategies.selection.lyapunov import LyapunovSelection

CAPACITY_BPS = 10.0
BOUND_S = 15.0  # all 8 devices take about 23 s
DEVICES = 8
SWEEP = (0.01, 0.1, 1.0, 3.0, 10.0, 30.0, 100.0, 1000.0)
MANY = 10_000


def measure(smoke: bool) -> tuple[dict[str, Any], list[Figure]]:
    instances, exact, rounds, many = (20, 5, 20, 200) if smoke else (2000, 200, 1000, MANY)
    figures = [*_against_brute_force(exact, smoke), *_against_simple_rules(instances, smoke)]
    sweep = [follow(v, rounds) for v in SWEEP]
    for followed in sweep:
        converged = followed.v == 10.0 and not smoke
        figures += [
            Figure(
                f"V = {followed.v:g}, average delay over the bound", round(followed.average_s / BOUND_S, 4), "",
                "within 1 %" if converged else None, abs(followed.average_s / BOUND_S - 1) <= 0.01 if converged else None,
            ),
            Figure(f"V = {followed.v:g}, devices a round", round(followed.devices, 3), ""),
            Figure(f"V = {followed.v:g}, last queue", round(followed.queue, 3), "rounds"),
        ]  # fmt: skip
    figures += _speeds(many, smoke)
    if not smoke:
        (RESULTS / "scheduling.svg").write_text(draw(sweep), encoding="utf-8")
    settings = {
        "capacity": CAPACITY_BPS, "bound_s": BOUND_S, "devices": DEVICES, "rounds": rounds, "instances": instances,
        "brute_force_instances": exact, "devices_for_speed": many,
    }  # fmt: skip
    return settings, figures


# ---------------------------------------------------------------- instances


def pool(generator: random.Random, count: int) -> list[Candidate]:
    return [
        Candidate(f"d{n:05}", payload_bytes=generator.uniform(1, 40) / 8, compute_s=generator.uniform(0, 20))
        for n in range(count)
    ]


def together_s(devices: Sequence[Candidate]) -> float:
    """Returns the seconds until all devices finish at once: the t with sum S / (C (t - c)) = 1."""
    low = max(device.compute_s for device in devices)
    high = low + sum(8 * device.payload_bytes for device in devices) / CAPACITY_BPS
    for _ in range(60):
        middle = (low + high) / 2
        needed = math.inf
        if middle > low:
            needed = sum(8 * d.payload_bytes / (CAPACITY_BPS * (middle - d.compute_s)) for d in devices)
        low, high = (low, middle) if needed <= 1 else (middle, high)
    return high


def slowest_s(devices: Sequence[Candidate], shares: Mapping[str, float]) -> float:
    return max(d.compute_s + 8 * d.payload_bytes / (shares[d.name] * CAPACITY_BPS) for d in devices)


def allocate(devices: Sequence[Candidate], bandwidth: str) -> Mapping[str, float]:
    demands = [Demand(d.name, d.payload_bytes, d.compute_s, snr=d.snr) for d in devices]
    return load("bandwidth", bandwidth).rule.allocate(demands, CAPACITY_BPS)


# ---------------------------------------------------------------- figures


def excess_over_brute_force(generator: random.Random) -> float:
    """Returns the relative excess of the scheduler's objective over the best of all subsets, each with its best shares."""
    devices = pool(generator, generator.randint(1, DEVICES))
    scheduler = LyapunovSelection(delay_s=generator.uniform(5, 40), v=10 ** generator.uniform(-1, 2))
    scheduler.queue = generator.choice([0.0, generator.uniform(0, 20)])

    def objective(chosen: Sequence[Candidate]) -> float:
        return scheduler.v / len(chosen) + scheduler.queue / scheduler.delay_s * together_s(chosen)

    best = min(objective(chosen) for n in range(1, len(devices) + 1) for chosen in combinations(devices, n))
    names = scheduler.select(RoundState(1, devices, random.Random(1), CAPACITY_BPS)).names
    return objective([device for device in devices if device.name in names]) / best - 1


def _against_brute_force(instances: int, smoke: bool) -> list[Figure]:
    generator = random.Random(7)
    worse = sum(excess_over_brute_force(generator) > 1e-9 for _ in range(instances))
    bar = None if smoke else "none"
    return [
        Figure(f"Lyapunov above brute force, of {instances} instances", worse, "", bar, worse == 0 if bar else None)
    ]


def ratios(instances: int) -> dict[str, list[float]]:
    """Returns, per simple rule, the round delays of `equalise` over those of the rule, for 2 to 10 devices."""
    generator, found = random.Random(1), dict[str, list[float]](uniform=[], proportional=[])
    for _ in range(instances):
        devices = pool(generator, generator.randint(2, 10))
        equal = slowest_s(devices, allocate(devices, "equalise"))
        for rule, values in found.items():
            values.append(equal / slowest_s(devices, allocate(devices, rule)))
    return found


def _against_simple_rules(instances: int, smoke: bool) -> list[Figure]:
    figures = []
    for rule, values in ratios(instances).items():
        largest = max(values)
        bar = None if smoke else "never above 1"
        figures += [
            Figure(f"equalise over {rule}, mean of the delays' ratios", round(sum(values) / len(values), 4), ""),
            Figure(f"equalise over {rule}, largest", round(largest, 6), "", bar, largest <= 1 + 1e-9 if bar else None),
        ]
    return figures


@dataclass(frozen=True)
class Followed:
    """Result of many rounds of the scheduler, each with devices of new payloads and speeds."""

    v: float
    delays_s: list[float]
    devices: float  # mean per round
    queue: float

    @property
    def average_s(self) -> float:
        return sum(self.delays_s) / len(self.delays_s)


def follow(v: float, rounds: int, bound_s: float = BOUND_S) -> Followed:
    generator, scheduler = random.Random(3), LyapunovSelection(delay_s=bound_s, v=v)
    delays, chosen_devices = [], 0
    for number in range(1, rounds + 1):
        devices = pool(generator, DEVICES)
        names = scheduler.select(RoundState(number, devices, random.Random(number), CAPACITY_BPS)).names
        delays.append(together_s([device for device in devices if device.name in names]))
        chosen_devices += len(names)
        scheduler.observe(RoundOutcome(number, delays[-1], []))
    return Followed(v, delays, chosen_devices / rounds, scheduler.queue)


def _speeds(count: int, smoke: bool) -> list[Figure]:
    """Times one decision, on wires and on a band: a selection among `count` devices and the shares of the selected."""
    generator = random.Random(1)
    wired = [
        replace(
            device, examples=generator.randrange(1, 500), last_loss=generator.random(), last_round=1,
            last_seconds=generator.uniform(1, 30), metric=generator.random(), rate_bps=generator.random(),
        )
        for device in pool(generator, count)
    ]  # fmt: skip
    wireless = [replace(device, snr=10 ** generator.uniform(0, 5)) for device in wired]
    return [*_speeds_of(wired, "", smoke), *_speeds_of(wireless, " on a band", smoke)]


def _speeds_of(devices: Sequence[Candidate], where: str, smoke: bool) -> list[Figure]:
    options = {"lyapunov": {"delay_s": 100.0}, "fedcs": {"deadline_s": 1000.0}}
    figures = []
    for selection in BUILT_IN["selection"]:
        for bandwidth in BUILT_IN["bandwidth"] if selection == "all" else ("equalise",):
            seconds = _seconds_of_a_decision(devices, selection, bandwidth, options)
            bar = None if smoke else "below 1 s"
            holds = None if smoke else seconds < 1
            name = f"{selection} + {bandwidth}, {len(devices)} devices{where}"
            figures.append(Figure(name, round(seconds, 3), "s", bar, holds))
    return figures


def _seconds_of_a_decision(
    devices: Sequence[Candidate], selection: str, bandwidth: str, options: dict[str, dict[str, float]]
) -> float:
    chooser = load("selection", selection, options)
    chooser.capabilities.observe(RoundOutcome(1, 400.0, devices[:10]))
    by_name = {device.name: device for device in devices}
    began = time.perf_counter()
    names = chooser.rule.select(RoundState(2, devices, random.Random(2), CAPACITY_BPS)).names
    allocate([by_name[name] for name in names], bandwidth)
    return time.perf_counter() - began


# ---------------------------------------------------------------- the picture

_WIDTH, _HEIGHT, _PANEL, _TOP = 960, 300, 250, 40
_COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57")


def draw(sweep: Sequence[Followed]) -> str:
    """Draws the sweep over V as an SVG: delay and devices against V, and the mean delay so far against the round."""
    logs = [math.log10(followed.v) for followed in sweep]
    averages = [("", list(zip(logs, [followed.average_s for followed in sweep], strict=True)))]
    devices = [("", list(zip(logs, [followed.devices for followed in sweep], strict=True)))]
    running = [(f"V = {f.v:g}", _running(f.delays_s)) for f in sweep if f.v in (10.0, 100.0, 1000.0)]
    panels = [
        _panel(0, "average delay of a round, s", "log10 V", averages, BOUND_S),
        _panel(1, "devices a round, of 8", "log10 V", devices, None),
        _panel(2, "average delay so far, s", "round", running, BOUND_S),
    ]
    style = "text{font:12px sans-serif;fill:#333}.axis{stroke:#999;fill:none}.bound{stroke:#333;stroke-dasharray:5 4}"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}">'
    )
    return "\n".join(
        [head, f"<style>{style}</style>", '<rect width="100%" height="100%" fill="#fff"/>', *panels, "</svg>\n"]
    )


def _running(delays_s: Sequence[float]) -> list[tuple[float, float]]:
    points, total = [], 0.0
    for number, delay_s in enumerate(delays_s, 1):
        total += delay_s
        if number % 10 == 0:
            points.append((float(number), total / number))
    return points


def _panel(
    number: int, title: str, axis: str, lines: Sequence[tuple[str, list[tuple[float, float]]]], bound: float | None
) -> str:
    left, height = 50 + number * (_PANEL + 65), _HEIGHT - _TOP - 50
    xs = [x for _, line in lines for x, _ in line]
    ys = [y for _, line in lines for _, y in line] + ([bound] if bound else [])
    low, high = min(ys) - 0.05 * (max(ys) - min(ys)), max(ys) + 0.05 * (max(ys) - min(ys))

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - min(xs)) / (max(xs) - min(xs))
        return left + across * _PANEL, _TOP + height * (1 - (y - low) / (high - low))

    parts = [f'<text x="{left}" y="{_TOP - 14}">{title}</text>']
    parts.append(f'<rect class="axis" x="{left}" y="{_TOP}" width="{_PANEL}" height="{height}"/>')
    for value in (min(ys), max(ys)):
        parts.append(f'<text x="{left - 6}" y="{at(min(xs), value)[1] + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for value in (min(xs), max(xs)):
        parts.append(
            f'<text x="{at(value, low)[0]:.1f}" y="{_TOP + height + 18}" text-anchor="middle">{value:g}</text>'
        )
    parts.append(f'<text x="{left + _PANEL / 2}" y="{_TOP + height + 34}" text-anchor="middle">{axis}</text>')
    if bound:
        y = at(min(xs), bound)[1]
        parts.append(f'<line class="bound" x1="{left}" x2="{left + _PANEL}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left + _PANEL - 4}" y="{y - 5:.1f}" text-anchor="end">bound</text>')
    for index, (label, line) in enumerate(lines):
        colour = _COLOURS[index % len(_COLOURS)]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in line))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        if label:
            parts.append(f'<text x="{left + 90}" y="{_TOP + 18 + 16 * index}" style="fill:{colour}">{label}</text>')
    return "\n".join(parts)


if __name__ == "__main__":
    main("scheduling", measure)
