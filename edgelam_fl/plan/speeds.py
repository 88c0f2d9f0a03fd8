"""What layers of a run's model cost at each node: the planner's numbers, from profiles at first, from rounds as they come.

The time of a layer comes from the profile: of a whole layer at the nearest number of tokens, where nodes measured that, else
`base_seconds`, a layer's matrices over 128 tokens; both are taken to grow with rows x tokens. The latter is off for the
first plan: attention, norms, LoRA and what else a core does are not in it (a real step takes 1.2 to 2 times as long), and
a few tokens take longer than their part. Between nodes the error is much the same, so cuts suffer less than seconds.
From the first round on what training took, from each node's timeline, is put in its place.

Free memory is that of a node before it held anything, as it was when the node joined.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, median

from edgelam_fl.config import RunConfig
from edgelam_fl.errors import RunFailed
from edgelam_fl.model.adapter import Span, target_modules
from edgelam_fl.model.index import layer_number
from edgelam_fl.model.memory import unit_bytes, weights_bytes
from edgelam_fl.plan.bases import BASES, DTYPES, choose_base
from edgelam_fl.plan.chain_cost import Footprint, Member, Node, Run
from edgelam_fl.plan.layout import by_name, device_ends, make_layout
from edgelam_fl.plan.making import value_bytes
from edgelam_fl.plan.modes import label_place
from edgelam_fl.plan.reading import dialled_links
from edgelam_fl.plan.search import deal
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.relay import BEHIND, BY_RELAY

MIB = 2**20
IDLE_BYTES = 435 * MIB  # resident, of a stage host that did not say; x86, torch 2.13
# Code and buffers that the first slice brings; `benchmarks.memory`, over weights and activations.
_GROWS_BYTES = 40 * MIB
_MEASURED_TOKENS = 128
_UNKNOWN_S = 0.01  # a layer of a node, where no node measured any: hosts are then taken to be alike
_WEIGHT_BYTES = 4  # of an adapter's weight
_KEPT_BYTES = 16  # and for each device its gradient, moments and accumulator, as `split.window` reserves them
_FAR_OFF = 1.5  # times as much, or as little, is told
_SHORT = {dtype: short for short, dtype in DTYPES.items()}
_NEWEST = 0.5  # weight of the newest round in what is known of a node


@dataclass(frozen=True)
class Problem:
    """One site, as the planner sees it."""

    run: Run
    members: tuple[Member, ...]
    hosts: tuple[Node, ...]


class Costs:
    """What nodes need in time and memory for layers of a run's model."""

    def __init__(self, spec: RunSpec) -> None:
        self.spec, self.config, self.source = spec, spec.config, spec.source
        self.tokens = float(spec.config.task.max_tokens)  # a row, for times; memory is for the longest rows always
        self._known: dict[tuple[str, str], float] = {}  # seconds of a layer for one position, by node and pair
        self._planned: dict[tuple[str, str], float] = {}  # the same, as the newest plan took it
        self._layer_bytes: dict[str, list[int]] = {}
        self._by_relay: set[tuple[str, str]] = set()  # (who dialled, whom), by the newest link of each pair

    @property
    def rows(self) -> int:
        return -(-self.config.federation.batch_size // self.config.split.micro_batches)

    # ------------------------------------------------------------ the planner's numbers

    def problems(
        self, devices: Sequence[pb.Profile], hosts: Sequence[pb.Profile], shares: Mapping[str, float], window: int
    ) -> list[Problem]:
        """A problem a site: devices dealt by name in turn, hosts by how fast they are. Fewer sites where hosts are missing."""
        split = self.config.split
        if len(hosts) < split.least_hosts or not devices:
            make_layout(self.spec, devices, hosts)  # says what is missing
            raise RunFailed("no device is here to plan for")
        ordered = sorted(devices, key=lambda device: device.name)
        count = min(split.sites, len(ordered), len(hosts) // split.least_hosts)
        measured = [*devices, *hosts]
        profiles = {host.name: host for host in hosts}
        dealt = deal([self._host(host, measured, None) for host in hosts], count)
        return [
            self.site(ordered[number::count], [profiles[node.name] for node in own], measured, shares, window)
            for number, own in enumerate(dealt)
        ]

    def site(
        self, devices: Sequence[pb.Profile], hosts: Sequence[pb.Profile], measured: Sequence[pb.Profile],
        shares: Mapping[str, float], window: int,
    ) -> Problem:  # fmt: skip
        """`measured`: all nodes whose speeds are known."""
        members = {device.name: self._member(device, measured, shares, window) for device in devices}
        # A device that hosts trains too, here or at another site.
        elsewhere = [host for host in hosts if host.role == pb.DEVICE and host.name not in members]
        as_device = members | {host.name: self._member(host, measured, shares, window) for host in elsewhere}
        nodes = tuple(self._host(host, measured, as_device.get(host.name)) for host in hosts)
        bases = {base for node in nodes for base in node.layer_s}
        run = self._run(sorted(bases), len(members), window, [node.round_trip_s for node in nodes])
        return Problem(run, tuple(members.values()), nodes)

    def _run(self, bases: Sequence[str], devices: int, window: int, round_trips: Sequence[float]) -> Run:
        config, split = self.config, self.config.split
        on_device = label_place(split.labels).on_device
        return Run(
            bases={base: self.footprint(base, devices, window) for base in bases},
            tensor_bytes=round(self.rows * self.tokens * self.source.hidden_size * value_bytes(config)),
            micro_batches=split.micro_batches,
            window=window,
            front_learns="front" in config.lora.train,
            back_on_device=on_device,
            tail_layers=0.0 if on_device else self.head_layers,
            grows_bytes=_GROWS_BYTES,
            by_relay=frozenset(self._by_relay),
            relay_bps=config.wire.capacity_bps or math.inf,
            # By the server instead of directly, which is taken to be half as far.
            relay_round_trip_s=mean(round_trips),
        )

    def _member(
        self, device: pb.Profile, measured: Sequence[pb.Profile], shares: Mapping[str, float], window: int
    ) -> Member:
        front, back_first = device_ends(self.spec, device.name)
        spans = [Span(0, front, embed=True)]
        if label_place(self.config.split.labels).on_device:
            spans.append(Span(back_first, self.source.num_layers, head=True))
        base, compute = choose_base(self.spec, device, spans)
        layers = [span.last - span.first + (self.head_layers if span.head else 0) for span in spans]
        layer_s = self.layer_s(device, f"{base}/{compute}", measured)
        share_bps = shares.get(device.name, 0.0) * self.config.wire.capacity_bps or math.inf
        node = replace(
            self._node(device),
            own_s=sum(layers) * layer_s,
            back_s=sum(layers[1:]) * layer_s,
            own_bytes=self._own_bytes(device.name, spans, base, compute, window),
        )
        return Member(
            replace(node, up_bps=min(node.up_bps, share_bps), down_bps=min(node.down_bps, share_bps)), front, back_first
        )

    def _host(self, host: pb.Profile, measured: Sequence[pb.Profile], member: Member | None) -> Node:
        node = member.node if member is not None else self._node(host)
        return replace(node, layer_s={pair: self.layer_s(host, pair, measured) for pair in pairs(self.config, host)})

    def _node(self, profile: pb.Profile) -> Node:
        return Node(
            profile.name,
            memory_bytes=profile.memory_available_bytes or math.inf,
            idle_bytes=profile.idle_bytes or IDLE_BYTES,
            up_bps=_known(profile.link_up_bps) or math.inf,
            down_bps=_known(profile.link_down_bps) or math.inf,
            round_trip_s=_known(profile.round_trip_s),
            reachable=not profile.address.startswith(BEHIND),
        )

    # ------------------------------------------------------------ time

    @property
    def head_layers(self) -> float:
        """The head's part in layers: by weights, as the time of a matrix goes."""
        shapes = self.source.linear_modules()
        layer = sum(rows * columns for name, (rows, columns) in shapes.items() if layer_number(name) == 0)
        outputs = len(self.config.task.classes) or int(self.source.config["vocab_size"])
        return outputs * self.source.hidden_size / layer

    def layer_s(self, profile: pb.Profile, pair: str, measured: Sequence[pb.Profile]) -> float:
        """Of one unit. A node that measured nothing is taken to be as slow as the slowest that did."""
        self._planned[profile.name, pair] = position_s = self._position_s(profile, pair, measured)
        return self.rows * self.tokens * position_s

    def _position_s(self, profile: pb.Profile, pair: str, measured: Sequence[pb.Profile]) -> float:
        known = self._known.get((profile.name, pair)) or self._profiled(profile, pair)
        others = [self._profiled(other, pair) for other in measured]
        return known or max(others, default=0.0) or _UNKNOWN_S / _MEASURED_TOKENS

    def _profiled(self, profile: pb.Profile, pair: str) -> float:
        """For one position: of a whole layer and the nearest number of tokens, where that was measured; 0 where nothing was."""
        measured = [(time.tokens, time.seconds.get(pair, 0.0)) for time in profile.layer_times]
        measured.append((_MEASURED_TOKENS, profile.base_seconds.get(pair, 0.0)))
        known = [(size, s) for size, s in measured if size and math.isfinite(s) and s > 0]
        if not known:
            return 0.0
        tokens, seconds = min(known, key=lambda size: abs(math.log(size[0] / (self.rows * self.tokens))))
        again = 4 / 3 if self.config.split.checkpointing else 1.0  # forward, forward again, backward of twice that
        return again * seconds / tokens

    # ------------------------------------------------------------ what rounds show

    def observe(self, plans: Mapping[str, pb.Plan], reports: Mapping[str, pb.JobReport]) -> list[str]:
        """Takes a layer's time at each node, who reached whom how, and how long examples really are; tells what is news."""
        tokens = tokens_a_row(plans, reports)
        if tokens:
            self.tokens = min(float(self.config.task.max_tokens), tokens)
        measured, notes = {}, list[str]()
        for name, report in reports.items():
            seconds, model = self.measured_layer_s(plans[name], report), plans[name].model
            if seconds:
                measured[name, f"{model.base}/{_SHORT[model.compute]}"] = seconds
            notes += self._learn_ways(plans[name], report)
        return notes + self._learn(measured)

    def measured_layer_s(self, plan: pb.Plan, report: pb.JobReport) -> float:
        """Of one unit, from the timeline of a round's training; 0 where it says nothing.

        Each unit counts as the median one: the first few of a node take longer, with weights and memory new to it.
        """
        layers = {("host", device): count for device, count in _hosted_layers(plan).items()}
        layers["device", ""] = self._own_layers(plan)
        total = 0.0
        for kind in ("forward", "backward"):
            of_unit: dict[tuple[str, str], dict[tuple[int, int], float]] = {}
            for i in report.timeline:
                if i.kind == kind and 0 <= i.seconds < math.inf and layers.get((i.role, i.peer)):
                    units = of_unit.setdefault((i.role, i.peer), {})
                    units[i.step, i.micro_batch] = units.get((i.step, i.micro_batch), 0.0) + i.seconds
            passed = sum(layers[part] * len(units) for part, units in of_unit.items())
            seconds = sum(median(units.values()) * len(units) for units in of_unit.values())
            total += seconds / passed if passed else 0.0
        return total

    def _own_layers(self, plan: pb.Plan) -> float:
        """What a device computes of a unit, the head counted in layers."""
        if not plan.routes or not plan.routes[0].hops:
            return 0.0
        route = plan.routes[0]
        if not label_place(plan.labels).on_device:
            return float(route.front)
        return route.front + (self.head_layers + plan.model.num_layers - route.back_first)

    def _learn(self, measured: Mapping[tuple[str, str], float]) -> list[str]:
        """Takes the times of a layer of one unit in a round, by node and pair; tells who is far off what was planned with.

        All nodes together may be off, as profiles are: that moves no cut. So each is held against the others.
        """
        new = {key: seconds / (self.rows * self.tokens) for key, seconds in measured.items()}
        off = {key: value / self._planned[key] for key, value in new.items() if key in self._planned}
        for key, value in new.items():
            old = self._known.get(key, value)
            self._known[key] = (1 - _NEWEST) * old + _NEWEST * value
        usual = median(off.values()) if off else 1.0
        return [
            f"{name} took {ratio / usual:.1f} times as long for a layer as was planned with, against the other nodes"
            for (name, _), ratio in sorted(off.items())
            if not near(ratio, usual)
        ]

    def _learn_ways(self, plan: pb.Plan, report: pb.JobReport) -> list[str]:
        """Takes which of a node's links passed the relay; tells what is new."""
        names, notes = {count.link for count in [*report.bytes, *report.host.bytes]}, []
        for name, host in dialled_links(plan).items():
            pair = plan.node, host
            if name + BY_RELAY in names and pair not in self._by_relay:
                self._by_relay.add(pair)
                notes.append(f"{plan.node} reaches {host} through the server's relay alone")
            elif name in names and pair in self._by_relay:
                self._by_relay.remove(pair)
                notes.append(f"{plan.node} reaches {host} without the relay again")
        return notes

    # ------------------------------------------------------------ memory

    def footprint(self, pair: str, devices: int, window: int) -> Footprint:
        """Of a host with so many devices and units of each in flight."""
        one, two = (self._unit(pair, layers) for layers in (1, 2))
        tail = 0
        if not label_place(self.config.split.labels).on_device:
            last = self.source.num_layers
            tail = self._weights([Span(last, last, head=True)], pair)
            tail += devices * window * (self._unit(pair, 0, head=True) - self._unit(pair, 0))
        kept = self._adapters()
        layers = tuple(
            weights + (_WEIGHT_BYTES + _KEPT_BYTES * devices) * kept.get(layer, 0)
            for layer, weights in enumerate(self._layers(pair))
        )
        return Footprint(layers, window * (2 * one - two), window * (two - one), tail)

    def _layers(self, pair: str) -> list[int]:
        if pair not in self._layer_bytes:
            self._layer_bytes[pair] = [self._weights([Span(n, n + 1)], pair) for n in range(self.source.num_layers)]
        return self._layer_bytes[pair]

    def _weights(self, spans: Sequence[Span], pair: str) -> int:
        base, compute = split_pair(pair)
        return weights_bytes(self.source, spans, base, DTYPES[compute])

    def _adapters(self) -> dict[int, int]:
        """Weights of the adapters, by layer."""
        lora, found = self.config.lora, dict[int, int]()
        for module, (rows, columns) in target_modules(self.source, lora.targets).items():
            layer = layer_number(module)
            assert layer is not None
            found[layer] = found.get(layer, 0) + lora.rank * (rows + columns)
        return found

    def _unit(self, pair: str, layers: int, *, head: bool = False) -> int:
        config = self.config
        return unit_bytes(
            self.source.config, layers, self.rows, config.task.max_tokens, 2 if split_pair(pair)[1] == "bf16" else 4,
            checkpointing=config.split.checkpointing, head=head, all_linear=list(config.lora.targets) == ["all-linear"],
        )  # fmt: skip

    def _own_bytes(self, name: str, spans: Sequence[Span], base: str, compute: str, window: int) -> int:
        """A device's ends: the front keeps all units in flight, the back is through with one before the next."""
        pair, kept = f"{base}/{compute}", self._adapters()
        rank = by_name(self.config.lora.ranks, name, self.config.lora.rank) / self.config.lora.rank
        adapters = sum(kept.get(layer, 0) for span in spans for layer in range(span.first, span.last))
        units = window * self._unit(pair, spans[0].last)
        units += sum(self._unit(pair, span.last - span.first, head=True) for span in spans[1:])
        return self._weights(spans, pair) + round((_WEIGHT_BYTES + _KEPT_BYTES) * rank * adapters) + units


def near(ratio: float, other: float) -> bool:
    return 1 / _FAR_OFF <= ratio / other <= _FAR_OFF


def _hosted_layers(plan: pb.Plan) -> dict[str, float]:
    """Of each device's route at this host."""
    return {
        route.device: float(hop.last - hop.first)
        for route in plan.serves
        for hop in route.hops
        if hop.node == plan.node
    }


def tokens_a_row(plans: Mapping[str, pb.Plan], reports: Mapping[str, pb.JobReport]) -> float:
    """The mean of what was trained; padding is not in it. 0 where nothing was."""
    tokens = rows = 0
    for name, report in reports.items():
        tokens += report.tokens_trained
        rows += plans[name].batch_size * sum(step.counted for step in report.steps)
    return tokens / rows if rows else 0.0


def pairs(config: RunConfig, profile: pb.Profile) -> list[str]:
    """The bases that a host may take, as "base/compute", the best first: by `model.base`, or with auto by speed."""
    base, compute = config.model.base, config.model.compute
    if base == "auto":
        measured = [
            (seconds, key) for key, seconds in profile.base_seconds.items() if seconds > 0 and _usable(key, compute)
        ]
        if measured:
            return [key for _, key in sorted(measured)]
        base = "bf16" if compute == "bf16" else "fp32"
    if compute == "auto":
        compute = "bf16" if base == "bf16" else "fp32"
    return [f"{base}/{compute}"]


def _usable(pair: str, compute: str) -> bool:
    kept, computed = split_pair(pair)
    return kept in BASES and computed in (DTYPES if compute == "auto" else (compute,))


def split_pair(text: str) -> tuple[str, str]:
    base, _, compute = text.partition("/")
    return base, compute


def _known(value: float) -> float:
    """A number that a node measured, or says so; 0 where it did not."""
    return value if math.isfinite(value) and value > 0 else 0.0
