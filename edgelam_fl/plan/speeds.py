"""Seconds that a layer takes at each node: asked of profiles at first, learned from the rounds as they come.

A profile has the time of a whole layer for several numbers of tokens, or `base_seconds`: a layer's matrices alone, over
PROFILED_TOKENS. Both are taken to grow with rows x tokens. `base_seconds` is too low for the first plan: it contains no
attention, norms and LoRA, and no other work of a core (a real step takes 1.2 to 2 times as long). The error is much the same at all nodes, so cuts suffer less than the predicted seconds. From the first
round on, the time that training took replaces the profile.

Asking changes nothing, and learning returns new `Speeds`. Knows nothing of chains, links' rates and memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from edgelam_fl.config import RunConfig
from edgelam_fl.model.base_names import PROFILED_TOKENS, SHORT
from edgelam_fl.plan.modes import label_place
from edgelam_fl.plan.reading import dialled_links
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.relay import BY_RELAY

LayerTimes = Mapping[tuple[str, str], float]  # seconds per layer, by node and pair ("base/compute")

_UNKNOWN_S = 0.01  # per layer over PROFILED_TOKENS, if no node measured any: all hosts then count as alike
_FAR_OFF = 1.5  # a time is far off if it is more than so many times as long, or as short
_NEWEST = 0.5  # weight of the newest round in what is known of a node


@dataclass(frozen=True)
class Speeds:
    """The speeds and link rates learned from a run's rounds so far."""

    tokens: float  # per row, on average, for times; memory is always counted for the longest rows
    position_s: LayerTimes = field(default_factory=dict)  # per layer and position (one token of one row)
    by_relay: frozenset[tuple[str, str]] = frozenset()  # (dialling, dialled node): the newest link passed the relay


def before_rounds(config: RunConfig) -> Speeds:
    """Returns what is known before the first round: that no row is longer than `task.max_tokens`."""
    return Speeds(float(config.task.max_tokens))


# ---------------------------------------------------------------- asking


def layer_s(
    spec: RunSpec, speeds: Speeds, profile: pb.Profile, pair: str, measured: Sequence[pb.Profile]
) -> float:  # fmt: skip
    """Seconds one layer takes for one unit, forward and backward.

    Unmeasured nodes count as the slowest measured one; `measured` holds the profiles of all nodes.
    """
    known = speeds.position_s.get((profile.name, pair)) or _profiled_s(spec, speeds, profile, pair)
    others = [_profiled_s(spec, speeds, other, pair) for other in measured]
    position_s = known or max(others, default=0.0) or _UNKNOWN_S / PROFILED_TOKENS
    return spec.unit_rows * speeds.tokens * position_s


def head_layers(spec: RunSpec) -> float:
    """Returns the head's computing time in layers: the ratio of weights, as the time of a matrix follows its size."""
    source = spec.source
    layer_weights = sum(rows * columns for rows, columns in source.used_matrices(0))
    return spec.outputs * source.hidden_size / layer_weights


def _profiled_s(spec: RunSpec, speeds: Speeds, profile: pb.Profile, pair: str) -> float:
    """Seconds per layer and position: from a line through whole layers of two sizes, else from the measured size nearest to a unit; 0
    if nothing was measured.
    """
    layers = _known([(time.tokens, time.seconds.get(pair, 0.0)) for time in profile.layer_times])
    known = layers + _known([(PROFILED_TOKENS, profile.base_seconds.get(pair, 0.0))])
    if not known:
        return 0.0
    unit_tokens = spec.unit_rows * speeds.tokens
    again = 4 / 3 if spec.config.pieces.checkpointing else 1.0  # forward, forward again, and a backward of twice that
    fixed_s, token_s = _line(layers)
    if fixed_s > 0 and token_s > 0:
        return again * (fixed_s / unit_tokens + token_s)
    tokens, seconds = min(known, key=lambda size: abs(math.log(size[0] / unit_tokens)))
    return again * seconds / tokens


def _known(measured: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    return [(tokens, seconds) for tokens, seconds in measured if tokens and math.isfinite(seconds) and seconds > 0]


def _line(layers: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Returns (seconds of a layer without tokens, seconds per token) through the smallest and the largest size; zeros without two."""
    if len({tokens for tokens, _ in layers}) < 2:
        return 0.0, 0.0
    (few, few_s), (many, many_s) = min(layers), max(layers)
    token_s = (many_s - few_s) / (many - few)
    return few_s - few * token_s, token_s


# ---------------------------------------------------------------- learning


def learned(
    spec: RunSpec, speeds: Speeds, planned: LayerTimes, plans: Mapping[str, pb.Plan],
    reports: Mapping[str, pb.JobReport], workers: Mapping[str, int] = {},
) -> tuple[Speeds, list[str]]:  # fmt: skip
    """Returns what is known after a round, and a sentence for each surprise.

    `planned`: seconds per layer and unit that the round was planned with. `workers`: the units that each host computed at once; one
    if a host is not named. All nodes together may differ from that, as
    profiles do, which moves no cut: each node is therefore compared with the others.
    """
    trained = tokens_per_row(plans, reports)
    tokens = min(float(spec.config.task.max_tokens), trained) if trained else speeds.tokens
    by_relay, notes, measured = set(speeds.by_relay), list[str](), dict[tuple[str, str], float]()
    for name, report in reports.items():
        plan = plans[name]
        seconds = measured_layer_s(spec, plan, report, workers.get(name, 1))
        if seconds:
            measured[name, f"{plan.model.base}/{SHORT[plan.model.compute]}"] = seconds / (spec.unit_rows * tokens)
        notes += _learn_routes(by_relay, plan, report)
    planned_s = {key: seconds / (spec.unit_rows * speeds.tokens) for key, seconds in planned.items()}
    notes += _far_off({key: seconds / planned_s[key] for key, seconds in measured.items() if key in planned_s})
    newest = {
        key: (1 - _NEWEST) * speeds.position_s.get(key, seconds) + _NEWEST * seconds
        for key, seconds in measured.items()
    }
    return replace(
        speeds, tokens=tokens, position_s={**speeds.position_s, **newest}, by_relay=frozenset(by_relay)
    ), notes


def measured_layer_s(spec: RunSpec, plan: pb.Plan, report: pb.JobReport, workers: int = 1) -> float:
    """Seconds one layer took for one unit, from the timeline of a round's training; 0 if the timeline says nothing.

    A host that computes units of `workers` micro-batches at once takes that share of their time for each.
    Each unit counts as the median unit: a node's first units take longer, as weights and memory are new to it.
    """
    layers = {("host", device): count for device, count in _hosted_layers(plan).items()}
    layers["device", ""] = _device_layers(spec, plan)
    total = 0.0
    for kind in ("forward", "backward"):
        of_unit: dict[tuple[str, str], dict[tuple[int, int], float]] = {}
        for i in report.timeline:
            if i.kind == kind and 0 <= i.seconds < math.inf and layers.get((i.role, i.peer)):
                units = of_unit.setdefault((i.role, i.peer), {})
                units[i.step, i.micro_batch] = units.get((i.step, i.micro_batch), 0.0) + i.seconds
        passed = sum(layers[part] * len(units) for part, units in of_unit.items())
        seconds = sum(
            median(units.values()) * len(units) / (workers if role == "host" else 1)
            for (role, _), units in of_unit.items()
        )
        total += seconds / passed if passed else 0.0
    return total


def tokens_per_row(plans: Mapping[str, pb.Plan], reports: Mapping[str, pb.JobReport]) -> float:
    """Returns the mean length of the rows that were trained, without padding; 0 if none were."""
    tokens = rows = 0
    for name, report in reports.items():
        tokens += report.tokens_trained
        rows += plans[name].batch_size * sum(step.counted for step in report.steps)
    return tokens / rows if rows else 0.0


def near(ratio: float, other: float) -> bool:
    """Whether two ratios of times differ by less than what counts as far off."""
    return 1 / _FAR_OFF <= ratio / other <= _FAR_OFF


def _hosted_layers(plan: pb.Plan) -> dict[str, float]:
    """Number of layers that each device's route crosses at this host, by device."""
    return {
        route.device: float(hop.last - hop.first)
        for route in plan.serves
        for hop in route.hops
        if hop.node == plan.node
    }  # fmt: skip


def _device_layers(spec: RunSpec, plan: pb.Plan) -> float:
    """Number of layers that a device computes for a unit, the head counted in layers; 0 if its route has no host."""
    if not plan.routes or not plan.routes[0].hops:
        return 0.0
    route = plan.routes[0]
    if not label_place(plan.labels).on_device:
        return float(route.front)
    return route.front + (head_layers(spec) + plan.model.num_layers - route.back_first)


def _far_off(ratios: LayerTimes) -> list[str]:
    """Names the nodes whose time, over the planned one (`ratios`), is far off that of the other nodes."""
    usual = median(ratios.values()) if ratios else 1.0
    return [
        f"{name} took {ratio / usual:.1f} times as long for a layer as was planned with, against the other nodes"
        for (name, _), ratio in sorted(ratios.items())
        if not near(ratio, usual)
    ]


def _learn_routes(by_relay: set[tuple[str, str]], plan: pb.Plan, report: pb.JobReport) -> list[str]:
    """Updates which pairs reach each other through the relay; returns a sentence for each change."""
    names, notes = {count.link for count in [*report.bytes, *report.host.bytes]}, []
    for name, host in dialled_links(plan).items():
        pair = plan.node, host
        if name + BY_RELAY in names and pair not in by_relay:
            by_relay.add(pair)
            notes.append(f"{plan.node} reaches {host} through the server's relay alone")
        elif name in names and pair in by_relay:
            by_relay.remove(pair)
            notes.append(f"{plan.node} reaches {host} without the relay again")
    return notes
