"""Where layers go with split.cuts = "auto": profiles and rounds become the planner's numbers, its plan becomes a layout.

The time of a layer comes from the profile: of a whole layer at the nearest number of tokens, where nodes measured that, else
`base_seconds`, a layer's matrices over 128 tokens; both are taken to grow with rows x tokens. The latter is off for the
first plan: attention, norms, LoRA and what else a core does are not in it (a real step takes 1.2 to 2 times as long), and
a few tokens take longer than their part. Between nodes the error is much the same, so cuts suffer less than seconds.
From the first round on what training took, from each node's timeline, is put in its place.

Free memory is that of a node before it held anything, as it was when the node joined.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import mean, median
from typing import Any

from edgelam_fl.config import RunConfig
from edgelam_fl.errors import ConfigError, DoesNotFit, RunFailed
from edgelam_fl.model.adapter import Span, target_modules
from edgelam_fl.model.memory import unit_bytes, weights_bytes
from edgelam_fl.model.source import ModelSource, layer_number
from edgelam_fl.split.costs import Chain, Footprint, Member, Node, Plan, Run
from edgelam_fl.split.plan import dialled_links
from edgelam_fl.split.planner import best_plan, choose, deal, rated
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.relay import BEHIND, BY_RELAY
from server.bases import BASES, DTYPES, choose_base
from server.contributions import Reply
from server.layout import HostRange, Layout, by_name, device_ends, lay_out, make_layout, who_may_host
from server.loads import value_bytes
from server.nodes import Nodes
from server.run_folder import RunFolder

GAIN = 0.1  # a new plan must be so much faster than the old one
MIB = 2**20
IDLE_BYTES = 435 * MIB  # resident, of a stage host that did not say; x86, torch 2.13
# Code and buffers that the first slice brings; `benchmarks.memory`, over weights and activations.
_GROWS_BYTES = 40 * MIB
_MEASURED_TOKENS = 128
_UNKNOWN_S = 0.01  # a layer of a node, where no node measured any: hosts are then taken to be alike
_WEIGHT_BYTES = 4  # of an adapter's weight
_KEPT_BYTES = 16  # and for each device its gradient, moments and accumulator, as `split.window` reserves them
_FAR_OFF = 1.5
_NEWEST = 0.5  # weight of the newest round in what is known of a node


@dataclass(frozen=True)
class Problem:
    """One site, as the planner sees it."""

    run: Run
    members: tuple[Member, ...]
    hosts: tuple[Node, ...]


@dataclass(frozen=True)
class Proposal:
    """Plans for all sites, and why they are these."""

    plans: tuple[Plan, ...]
    window: int
    tokens: float
    reason: str = "the first plan"
    changed: bool = True

    def event(self) -> dict[str, Any]:
        """As `telemetry.events` documents it."""
        return {
            "changed": self.changed, "reason": self.reason, "step_s": round(max(p.step_s for p in self.plans), 4),
            "window": self.window, "tokens": round(self.tokens, 1), "sites": [_described(plan) for plan in self.plans],
        }  # fmt: skip


class Placement:
    """Makes the layout of each round, and learns from the rounds."""

    def __init__(
        self, config: RunConfig, source: ModelSource, emit: Callable[..., None] = lambda *_, **__: None
    ) -> None:
        self.config, self.source, self.emit = config, source, emit
        self._model = Costs(config, source)
        self._chains: tuple[Chain, ...] = ()
        self._newest: tuple[list[Problem], Proposal] | None = None
        self._notes: list[str] = []

    def layout(
        self, number: int, devices: Sequence[pb.Profile], hosts: Sequence[pb.Profile], shares: Mapping[str, float] = {}
    ) -> Layout:
        """Of round `number`. Raises as `make_layout` does, and DoesNotFit with what would fit."""
        if self.config.split.cuts != "auto" or not self.config.split.hosts:
            return make_layout(self.config, self.source, devices, hosts)
        proposal = self.propose(devices, hosts, shares)
        notes, self._notes = self._notes, []
        self.emit("placement", round=number, **proposal.event(), measured=notes)
        self._chains = tuple(plan.chain for plan in proposal.plans)
        addresses = {host.name: host.address for host in hosts}
        chains = [
            [HostRange(part.node, addresses[part.node], part.first, part.last) for part in plan.hosts]
            for plan in proposal.plans
        ]
        layout = lay_out(self.config, self.source, [device.name for device in devices], chains)
        bases = {part.node: _pair(part.base) for plan in proposal.plans for part in plan.hosts}
        return replace(layout, bases=bases)

    def propose(
        self, devices: Sequence[pb.Profile], hosts: Sequence[pb.Profile], shares: Mapping[str, float] = {}
    ) -> Proposal:
        """The plan to go on with. With the largest window that memory allows: a host too grants less where it must."""
        for window in range(self.config.split.window, 0, -1):
            problems = self._model.problems(devices, hosts, shares, window)
            if self._newest and self._newest[0] == problems:
                return replace(self._newest[1], reason="nothing has changed", changed=False)
            try:
                new = [best_plan(problem.run, problem.members, problem.hosts, self._count) for problem in problems]
            except DoesNotFit as error:
                if window > 1:
                    continue
                nearest = nearest_that_fits(self.config, self.source, devices, hosts)
                raise DoesNotFit(f"no split fits: {error}. {nearest}", error.missing_bytes) from error
            break
        proposal = self._chosen(problems, new, window)
        self._newest = problems, proposal
        return proposal

    @property
    def _count(self) -> int | None:
        return None if self.config.split.hosts == "auto" else self.config.split.hosts

    def _chosen(self, problems: Sequence[Problem], new: Sequence[Plan], window: int) -> Proposal:
        tokens = self._model.tokens
        if not self._chains:
            return Proposal(tuple(new), window, tokens)
        plans, reason = choose(self._old(problems), new, GAIN)
        changed = tuple(plan.chain for plan in plans) != self._chains
        return Proposal(tuple(plans), window, tokens, reason, changed)

    def _old(self, problems: Sequence[Problem]) -> list[Plan] | None:
        """The plans that are in use, as they would do now; None where one is impossible."""
        everyone = [host for problem in problems for host in problem.hosts]
        if len(self._chains) != len(problems):
            return None
        if self._count is not None and any(len(chain) != self._count for chain in self._chains):
            return None
        plans = [rated(p.run, p.members, everyone, chain) for p, chain in zip(problems, self._chains, strict=True)]
        return [plan for plan in plans if plan is not None] if all(plans) else None

    def observe(self, plans: Mapping[str, pb.Plan], replies: Mapping[str, Reply]) -> None:
        """What a round showed: a layer's time at each node, who reached whom how, and how long examples really are."""
        if self.config.split.cuts != "auto":
            return
        tokens = tokens_a_row(plans, replies)
        if tokens:
            self._model.tokens = min(float(self.config.task.max_tokens), tokens)
        measured = {}
        for name, reply in replies.items():
            seconds, model = self._model.measured_layer_s(plans[name], reply.report), plans[name].model
            if seconds:
                measured[name, f"{model.base}/{_SHORT[model.compute]}"] = seconds
            self._notes += self._model.learn_ways(plans[name], reply.report)
        self._notes += self._model.learn(measured)


_SHORT = {dtype: short for short, dtype in DTYPES.items()}


class Costs:
    """What nodes need in time and memory for layers of a run's model."""

    def __init__(self, config: RunConfig, source: ModelSource) -> None:
        self.config, self.source = config, source
        self.tokens = float(config.task.max_tokens)  # a row, for times; memory is for the longest rows always
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
            make_layout(self.config, self.source, devices, hosts)  # says what is missing
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
        at_host = split.labels == "last-stage"
        return Run(
            bases={base: self.footprint(base, devices, window) for base in bases},
            tensor_bytes=round(self.rows * self.tokens * self.source.hidden_size * value_bytes(config)),
            micro_batches=split.micro_batches,
            window=window,
            front_learns="front" in config.lora.train,
            back_on_device=not at_host,
            tail_layers=self.head_layers if at_host else 0.0,
            grows_bytes=_GROWS_BYTES,
            by_relay=frozenset(self._by_relay),
            relay_bps=config.wire.capacity_bps or math.inf,
            # By the server instead of directly, which is taken to be half as far.
            relay_round_trip_s=mean(round_trips),
        )

    def _member(
        self, device: pb.Profile, measured: Sequence[pb.Profile], shares: Mapping[str, float], window: int
    ) -> Member:
        front, back_first = device_ends(self.config, self.source, device.name)
        spans = [Span(0, front, embed=True)]
        if self.config.split.labels == "device":
            spans.append(Span(back_first, self.source.num_layers, head=True))
        base, compute = choose_base(self.config, self.source, device, spans)
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
        at_device = 0.0 if plan.labels == "last-stage" else self.head_layers + plan.model.num_layers - route.back_first
        return route.front + at_device

    def learn(self, measured: Mapping[tuple[str, str], float]) -> list[str]:
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
            if not 1 / _FAR_OFF <= ratio / usual <= _FAR_OFF
        ]

    def learn_ways(self, plan: pb.Plan, report: pb.JobReport) -> list[str]:
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
        if self.config.split.labels == "last-stage":
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
        base, compute = _pair(pair)
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
            self.source.config, layers, self.rows, config.task.max_tokens, 2 if _pair(pair)[1] == "bf16" else 4,
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


def _hosted_layers(plan: pb.Plan) -> dict[str, float]:
    """Of each device's route at this host."""
    return {
        route.device: float(hop.last - hop.first)
        for route in plan.serves
        for hop in route.hops
        if hop.node == plan.node
    }


def tokens_a_row(plans: Mapping[str, pb.Plan], replies: Mapping[str, Reply]) -> float:
    """The mean of what was trained; padding is not in it. 0 where nothing was."""
    tokens = rows = 0
    for name, reply in replies.items():
        tokens += reply.report.tokens_trained
        rows += plans[name].batch_size * sum(step.counted for step in reply.report.steps)
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
    kept, computed = _pair(pair)
    return kept in BASES and computed in (DTYPES if compute == "auto" else (compute,))


def _pair(text: str) -> tuple[str, str]:
    base, _, compute = text.partition("/")
    return base, compute


def _known(value: float) -> float:
    """A number that a node measured, or says so; 0 where it did not."""
    return value if math.isfinite(value) and value > 0 else 0.0


def _described(plan: Plan) -> dict[str, Any]:
    return {
        "hosts": [asdict(part) for part in plan.hosts], "devices": [asdict(part) for part in plan.devices],
        "step_s": round(plan.step_s, 4), "limit": plan.limit, "memory_limit": plan.memory_limit,
        "left_out": list(plan.left_out),
    }  # fmt: skip


# ---------------------------------------------------------------- before a run


def foresee(config: RunConfig, source: ModelSource, profiles: Sequence[pb.Profile]) -> Proposal:
    """What a run of all these nodes would begin with; also of cuts that are given, rated as the planner rates its own."""
    devices = sorted((p for p in profiles if p.role == pb.DEVICE), key=lambda device: device.name)
    hosts = who_may_host(config, profiles)
    if not config.split.hosts:
        raise ConfigError("split.hosts = 0: each device trains the whole model, and there is nothing to plan")
    if not devices:
        raise RunFailed("no device is among the nodes, so nobody would train; a node with data is a device (role)")
    if config.split.cuts == "auto":
        return Placement(config, source).propose(devices, hosts)
    layout = make_layout(config, source, devices, hosts)
    costs, plans = Costs(config, source), []
    for site in layout.sites:
        own = [device for device in devices if device.name in site.members]
        chain = [host for host in hosts if host.name in {part.name for part in site.hosts}]
        problem = costs.site(own, chain, [*devices, *hosts], {}, config.split.window)
        plan = rated(problem.run, problem.members, problem.hosts, tuple((h.name, h.last) for h in site.hosts))
        if plan is None:
            best_plan(problem.run, problem.members, problem.hosts, len(chain))  # says what is short, where any cut is
            raise DoesNotFit(
                f"the slices of site {site.name} do not fit its hosts; with split.cuts = 'auto' they would"
            )
        plans.append(plan)
    reason = f"split.cuts = {config.split.cuts if config.split.cuts == 'equal' else list(config.split.cuts)}"
    return Proposal(tuple(plans), config.split.window, costs.tokens, reason)


def propose(nodes: Nodes, config: RunConfig, source: ModelSource, folder: RunFolder) -> None:
    """Asks the nodes that are here, says who would hold what, and ends."""
    nodes.gather(config, at_start=True)
    folder.emit("placement", round=0, **foresee(config, source, list(nodes.profiles.values())).event(), measured=[])
    folder.emit("run_done", summary="")


# ---------------------------------------------------------------- what would fit


def nearest_that_fits(
    config: RunConfig, source: ModelSource, devices: Sequence[pb.Profile], hosts: Sequence[pb.Profile]
) -> str:
    """A sentence: of each kind of change the smallest that fits."""
    found = []
    for variants in _variants(config):
        for words, changed in variants:
            if _fits(changed, source, devices, hosts):
                found.append(words)
                break
    found += _more_hosts(config, source, devices, hosts)
    return f"It fits with {' or '.join(found)}" if found else "No single change of the run file makes it fit"


def _fits(config: RunConfig, source: ModelSource, devices: Sequence[pb.Profile], hosts: Sequence[pb.Profile]) -> bool:
    count = None if config.split.hosts == "auto" else config.split.hosts
    try:
        for problem in Costs(config, source).problems(devices, hosts, {}, 1):
            best_plan(problem.run, problem.members, problem.hosts, count)
    except DoesNotFit:
        return False
    return True


def _variants(config: RunConfig) -> Iterator[Iterator[tuple[str, RunConfig]]]:
    split, bases = config.split, list(BASES)
    ends = ((front, back) for front in range(split.front, 0, -1) for back in (min(split.back, front),))
    smaller = bases[bases.index(config.model.base) + 1 :] if config.model.base in bases else []
    yield (
        (f"split.front = {front} and split.back = {back}", _with(config, "split", front=front, back=back))
        for front, back in ends if (front, back) != (split.front, split.back)
    )  # fmt: skip
    yield ((f"model.base = {base!r}", _with(config, "model", base=base, compute="auto")) for base in smaller)
    lengths = (config.task.max_tokens >> shift for shift in range(1, 12))
    yield (
        (f"task.max_tokens = {tokens}", _with(config, "task", max_tokens=tokens)) for tokens in lengths if tokens >= 8
    )
    if not split.checkpointing:
        yield iter([("split.checkpointing = true", _with(config, "split", checkpointing=True))])


def _with(config: RunConfig, section: str, **values: Any) -> RunConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def _more_hosts(
    config: RunConfig, source: ModelSource, devices: Sequence[pb.Profile], hosts: Sequence[pb.Profile]
) -> list[str]:
    """How many more like the one with the most memory would do."""
    largest = max(hosts, key=lambda host: (host.memory_available_bytes, host.name))
    changed = _with(config, "split", hosts="auto")
    for more in range(1, 9):
        copies = []
        for number in range(more):
            copies.append(pb.Profile())
            copies[-1].CopyFrom(largest)
            copies[-1].name = f"{largest.name} {number}"
        if _fits(changed, source, devices, [*hosts, *copies]):
            auto = "" if config.split.hosts == "auto" else " and split.hosts = 'auto'"
            return [f"{more} more {'host' if more == 1 else 'hosts'} like {largest.name}{auto}"]
    return []
