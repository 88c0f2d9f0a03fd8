"""Which hosts a site's routes cross, in which order, and which layers each of them holds: the shortest step that fits.

Numbers in, numbers out: knows no model, no protobuf, no torch. `server.placement` makes the numbers of profiles.

A unit is one micro-batch of one device. Its way takes `cycle_s`: through the device's own layers, each host's, and over
each link, forward and back. The other units of a step follow it, and are held up by what is busiest:

    step_s = cycle_s + max(max_r (busy_r - first_r), (ceil(m / W) - 1) cycle_s)

busy_r is what r (a node's processor, its uplink, its downlink, the relay) does in a whole step, first_r its part of the cycle,
m a device's micro-batches and W its window. p stages that are all alike take (m + p - 1) t, as GPipe and 1F1B do. Transfers
overlap computing; optimizer steps, and waiting of one device for another's unit on the way, are left out.

A link is as fast as the slower of its two ends; both directions, and all links of a node, share that node's. What cannot be
dialled is reached through the relay: its links take the relay's time too. Without the relay two nodes are half of both
round trips apart, which were measured to the server.

The search goes over the cuts from the first layer to the last, and keeps for each (hosts taken, newest host, cut) every
beginning that no other one beats in all of: cycle, what is busiest, links relayed. So it is exact for up to `ALL_ORDERS` hosts. Of
more it tries one order alone, from those behind the relay and the slow to the fast, each taken or left out: exact still where all
links are alike, nobody is behind the relay and all devices keep the same layers, else near.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from edgelam_fl.errors import DoesNotFit, RunFailed

ALL_ORDERS = 8
MB = 1e6
_INSTANT_S = 1e-12


# ---------------------------------------------------------------- what is known


@dataclass(frozen=True)
class Node:
    """`layer_s`: seconds of one layer for one unit, forward and backward, by base; the first base that fits is taken."""

    name: str
    layer_s: Mapping[str, float] = field(default_factory=dict)
    memory_bytes: float = math.inf  # free
    up_bps: float = math.inf
    down_bps: float = math.inf
    round_trip_s: float = 0.0  # to the server
    reachable: bool = True  # others can dial it; else only through the relay
    own_s: float = 0.0  # as a device: its own layers, head and loss, for one unit
    back_s: float = 0.0  # the part of it that comes behind the hosts
    own_bytes: int = 0  # as a device: what it needs for them
    idle_bytes: int = 0  # what its process takes before it holds anything; gone from the free memory already


@dataclass(frozen=True)
class Member:
    """A device of the site: it keeps layers [0, front) and those from `back_first` on."""

    node: Node
    front: int
    back_first: int


@dataclass(frozen=True)
class Footprint:
    """What layers need in one base: the weights of each layer of the model with its adapters, and what units in flight keep."""

    layers: tuple[int, ...]
    unit: int = 0  # of each device, however many layers
    unit_layer: int = 0  # of each device and layer
    tail: int = 0  # of the head, where the last host holds it


@dataclass(frozen=True)
class Run:
    """What is the same for every node."""

    bases: Mapping[str, Footprint]
    tensor_bytes: int  # hidden states of a unit, on a link
    micro_batches: int = 1
    window: int = 1
    front_learns: bool = True  # gradients go down to the devices' front
    back_on_device: bool = True  # hidden states come back to the device, and gradients leave there
    tail_layers: float = 0.0  # the head, in layers' time, where the last host holds it
    grows_bytes: int = 0  # of a node's process with its first slice, beside what is counted here
    unit_share: float = 0.8  # of what is free beside the weights, units get so much (`split.window`)
    relay_bps: float = math.inf
    relay_round_trip_s: float = 0.0  # on top of the direct way


# ---------------------------------------------------------------- what comes out


@dataclass(frozen=True)
class Part:
    """What a node does. A host holds layers [first, last); a device all layers but these. Seconds and bytes are a step's."""

    node: str
    first: int
    last: int
    base: str
    memory_bytes: int  # of its whole process, at its peak
    compute_s: float
    up_bytes: int
    down_bytes: int


@dataclass(frozen=True)
class Plan:
    hosts: tuple[Part, ...]  # in the routes' order
    devices: tuple[Part, ...]
    step_s: float
    cycle_s: float
    limit: str  # what the step waits for
    memory_limit: str = ""  # the host that would hold more, if it could, and what a step would take then
    left_out: tuple[str, ...] = ()  # hosts without which a step is shorter

    @property
    def chain(self) -> Chain:
        """The hosts, and the layer at which each one ends."""
        return tuple((part.node, part.last) for part in self.hosts)


Chain = tuple[tuple[str, int], ...]


class _Stage(NamedTuple):
    """A host with a slice."""

    base: str
    cycle_s: float
    held_up_s: float  # busy - first, of the busiest of its three resources


class _Label(NamedTuple):
    """A beginning of a chain."""

    cycle_s: float
    held_up_s: float
    relayed: int  # tensors of a unit that pass the relay
    chain: tuple[tuple[int, int], ...]  # (host, where it ends)
    taken: int  # the same hosts, a bit each

    def beats(self, other: _Label) -> bool:
        return (
            self.cycle_s <= other.cycle_s and self.held_up_s <= other.held_up_s and self.relayed <= other.relayed
        )  # fmt: skip


# ---------------------------------------------------------------- the search


def best_plan(run: Run, members: Sequence[Member], hosts: Sequence[Node], count: int | None = None) -> Plan:
    """The plan with the shortest step; with `count`, of those with so many hosts.

    Raises DoesNotFit where memory is short, with how much, RunFailed where there are too few hosts.
    """
    least = 1 if count is None else count
    if len(hosts) < least:
        raise RunFailed(f"a site needs {least} hosts, and {len(hosts)} nodes can be one")
    site = _Site(run, members, hosts)
    site.check_devices()
    label = site.search(count)
    if label is None:
        raise site.too_small(count)
    plan = site.plan(label)
    unlimited = _Site(run, members, [replace(host, memory_bytes=math.inf) for host in hosts])
    free = unlimited.search_one_order(count, plan.step_s * (1 - 1e-9))
    if free is not None:
        plan = replace(plan, memory_limit=_held_back(plan, unlimited.plan(free)))
    return replace(plan, left_out=tuple(sorted({host.name for host in hosts} - {part.node for part in plan.hosts})))


def rated(run: Run, members: Sequence[Member], hosts: Sequence[Node], chain: Chain) -> Plan | None:
    """A given chain as it would do now; None where it is impossible: a host is not here, too small, or not crossed.

    The last host ends where the members' layers now end.
    """
    site = _Site(run, members, hosts)
    numbers = {host.name: number for number, host in enumerate(site.hosts)}
    if not chain or not all(name in numbers for name, _ in chain):
        return None
    label = site.begin()
    for place, (name, cut) in enumerate(chain, 1):
        end = site.last if place == len(chain) else cut
        at = label.chain[-1][1] if label.chain else site.first
        if (end != site.last and end not in site.cuts) or end <= at:
            return None
        stage = site.stage(numbers[name], at, end)
        if stage is None:
            return None
        label = site.extended(label, numbers[name], end, stage)
    return site.plan(label)


def choose(old: Sequence[Plan] | None, new: Sequence[Plan], gain: float = 0.1) -> tuple[Sequence[Plan], str]:
    """The plans of all sites to go on with, and why: the new ones only if their steps are more than `gain` faster.

    `old`: as rated now; None where one of them is no longer possible.
    """
    if old is None:
        return new, "the old plan is no longer possible"
    if [plan.chain for plan in old] == [plan.chain for plan in new]:
        return new, "as before"
    faster = max(plan.step_s for plan in old) / max(plan.step_s for plan in new) - 1
    if faster > gain:
        return new, f"{faster:.0%} faster than the old plan"
    return old, f"a new plan would be {faster:.0%} faster, which is not more than {gain:.0%}"


def deal(hosts: Sequence[Node], sites: int) -> list[list[Node]]:
    """Hosts for each of several sites, the fast ones spread: dealt there and back, as teams are picked. Not a search."""
    ordered = sorted(hosts, key=_quickness)
    dealt: list[list[Node]] = [[] for _ in range(sites)]
    for number, host in enumerate(ordered):
        turn, place = divmod(number, sites)
        dealt[place if turn % 2 == 0 else sites - 1 - place].append(host)
    return dealt


def _quickness(node: Node) -> tuple[float, str]:
    return min(node.layer_s.values(), default=math.inf), node.name


def _held_back(plan: Plan, free: Plan) -> str:
    """The host whose memory costs the most layers."""
    wanted = {part.node: part.last - part.first for part in free.hosts}
    short = {
        part.node: wanted.get(part.node, 0) - (part.last - part.first)
        for part in plan.hosts
    }  # fmt: skip
    short |= {name: layers for name, layers in wanted.items() if name not in short}
    name = max(sorted(short), key=lambda node: short[node])
    return f"memory of {name}: with more, a step would take {free.step_s:.3g} s"


class _Site:
    """Devices and the hosts that there are, ready to be asked for costs."""

    def __init__(self, run: Run, members: Sequence[Member], hosts: Sequence[Node]) -> None:
        self.run = run
        self.members = sorted(members, key=lambda member: member.node.name)
        # The one order that is tried where there are too many hosts for all orders.
        self.hosts = sorted(hosts, key=lambda host: (host.reachable, [-s for s in _quickness(host)[:1]], host.name))
        self.first = min(member.front for member in members)
        self.last = max(member.back_first for member in members)
        # Every route crosses every host by one layer at least.
        self._crossed_from = max(member.front for member in members)
        self._crossed_until = min(member.back_first for member in members)
        inside = range(self._crossed_from + 1, self._crossed_until)
        self.cuts = [cut for cut in inside if self.first < cut < self.last]
        self.slowest = max(self.members, key=lambda m: (self._alone_s(m.node), m.node.name)).node
        self._stages: dict[tuple[int, int, int], _Stage | None] = {}
        self._lefts: dict[int, list[float]] = {}
        self._evens: dict[tuple[int, int], float] = {}

    @cached_property
    def units(self) -> int:
        """Of a step, at each host."""
        return len(self.members) * self.run.micro_batches

    def begin(self) -> _Label:
        """With the devices alone."""
        held_up = [self._device_held_up_s(member.node) for member in self.members]
        return _Label(self.slowest.own_s, max(held_up), 0, (), 0)

    def search(self, count: int | None) -> _Label | None:
        """The best chain; None where nothing fits."""
        found = self.search_one_order(count)
        if len(self.hosts) <= ALL_ORDERS:
            found = self._search(count, found, math.inf if found is None else self.step_s(found), every_order=True)
        return found

    def search_one_order(self, count: int | None, below_s: float = math.inf) -> _Label | None:
        """With each host taken or left out; None where nothing takes less than `below_s` either."""
        return self._search(count, None, below_s, every_order=False)

    def _search(self, count: int | None, best: _Label | None, best_s: float, *, every_order: bool) -> _Label | None:
        """Labels by the cut that they reach, from the first to the last; `best` takes `best_s`."""
        waiting: dict[int, dict[object, list[_Label]]] = {self.first: {0: [self.begin()]}}
        for at in [self.first, *self.cuts]:
            for label in [label for labels in waiting.pop(at, {}).values() for label in labels]:
                if self._bound_s(label, at) >= best_s:
                    continue
                for number in self._next_hosts(label, count, every_order):
                    for end, stage in self._slices(number, at, len(label.chain) + 1, count):
                        longer = self.extended(label, number, end, stage)
                        if self._bound_s(longer, end) >= best_s:
                            continue
                        if end == self.last:
                            best, best_s = longer, self.step_s(longer)
                        else:
                            key = _key(longer, count, every_order)
                            _keep(waiting.setdefault(end, {}).setdefault(key, []), longer)
        return best

    def _next_hosts(self, label: _Label, count: int | None, every_order: bool) -> Iterator[int]:
        if count is not None and len(label.chain) == count:
            return
        begin = 0 if every_order or not label.chain else label.chain[-1][0] + 1
        yield from (number for number in range(begin, len(self.hosts)) if not label.taken >> number & 1)

    def _slices(self, number: int, at: int, length: int, count: int | None) -> Iterator[tuple[int, _Stage]]:
        """What a host can hold from `at` on, as the chain's host number `length`."""
        ends = [cut for cut in self.cuts if cut > at] if length != count else []
        if count is None or length == count:
            ends = [*ends, self.last]
        for end in ends:
            stage = self.stage(number, at, end)
            if stage is not None:
                yield end, stage

    # ------------------------------------------------------------ times

    def stage(self, number: int, first: int, last: int) -> _Stage | None:
        """None where no base fits."""
        key = number, first, last
        if key not in self._stages:
            self._stages[key] = self._stage(self.hosts[number], first, last)
        return self._stages[key]

    def _stage(self, host: Node, first: int, last: int) -> _Stage | None:
        base = next((base for base in host.layer_s if self.missing_bytes(host, base, first, last) <= 0), None)
        if base is None:
            return None
        one_s = host.layer_s[base] * (last - first + self._tail(last))
        own_first_s = host.own_s if host.name == self.slowest.name else 0.0
        busy = [self.compute_s(host, base, first, last) - one_s - own_first_s]
        busy += [
            (self.units - 1) * _seconds(self._tensors(first, last, up) * self.run.tensor_bytes, bps)
            + (self.run.micro_batches * self._own_link_s(host, up) if self._is_device(host) else 0.0)
            for up, bps in ((True, host.up_bps), (False, host.down_bps))
        ]
        return _Stage(base, one_s, max(busy))

    def extended(self, label: _Label, number: int, end: int, stage: _Stage) -> _Label:
        """One host more: its own cycle, the link to it, and after the last one the link back to the device."""
        host = self.hosts[number]
        before = self.hosts[label.chain[-1][0]] if label.chain else self.slowest
        back = bool(label.chain) or self.run.front_learns
        cycle_s = label.cycle_s + stage.cycle_s + self._link_s(before, host, back, relayed=not host.reachable)
        relayed = label.relayed + (0 if host.reachable else 1 + back)
        if end == self.last and self.run.back_on_device:
            cycle_s += self._link_s(host, self.slowest, True, relayed=not host.reachable)
            relayed += 0 if host.reachable else 2
        return _Label(
            cycle_s,
            max(label.held_up_s, stage.held_up_s),
            relayed,
            (*label.chain, (number, end)),
            label.taken | 1 << number,
        )

    def step_s(self, label: _Label) -> float:
        waits_s = (self._rounds - 1) * label.cycle_s
        return label.cycle_s + max(label.held_up_s, self._relay_held_up_s(label), waits_s)

    def _bound_s(self, label: _Label, at: int) -> float:
        """No chain that begins so takes less: the hosts that are left, without their links, share the layers that are left."""
        if at == self.last:
            return self.step_s(label)
        left = self._left(label.taken)
        if not left:
            return math.inf
        for_all = max(0, self._crossed_until - max(at, self._crossed_from))
        others_s = (self.last - at - for_all) * left[0]
        held_up_s = max(label.held_up_s, self._even_held_up_s(label.taken, for_all), self._relay_held_up_s(label))
        together_s = label.cycle_s + others_s + held_up_s + self._fill_s(left, for_all, held_up_s)
        return max(together_s, self._rounds * (label.cycle_s + (self.last - at) * left[0]))

    @cached_property
    def _rounds(self) -> int:
        """How often the window opens in a step."""
        return -(-self.run.micro_batches // self.run.window)

    def _left(self, taken: int) -> list[float]:
        """Seconds a layer of the hosts that are not taken, the fast ones first."""
        if taken not in self._lefts:
            self._lefts[taken] = sorted(
                min(host.layer_s.values(), default=math.inf)
                for number, host in enumerate(self.hosts)
                if not taken >> number & 1
            )
        return self._lefts[taken]

    def _even_held_up_s(self, taken: int, layers: int) -> float:
        """How much the busiest of those hosts is held up where they share `layers`, and the step is the shortest.

        With the fastest j of them sharing evenly in time, each host is held up by `layers` (units - 1) / sum of 1 / s.
        """
        key = taken, layers
        if key not in self._evens:
            rate, found = 0.0, [(math.inf, 0.0)]
            for number, layer_s in enumerate(self._left(taken), 1):
                rate += 1 / max(layer_s, _INSTANT_S)
                held_up_s = layers * (self.units - 1) / rate
                found.append((held_up_s + number * layers / rate, held_up_s))
            self._evens[key] = min(found)[1]
        return self._evens[key]

    def _fill_s(self, left: Sequence[float], layers: float, held_up_s: float) -> float:
        """The part of the cycle where none is held up for longer: the fast hosts take what they can."""
        total = 0.0
        for layer_s in left:
            most = held_up_s / ((self.units - 1) * layer_s) if self.units > 1 and layer_s else math.inf
            total += min(layers, most) * layer_s
            layers -= min(layers, most)
            if layers <= 0:
                break
        return total

    def _relay_held_up_s(self, label: _Label) -> float:
        return (self.units - 1) * _seconds(label.relayed * self.run.tensor_bytes, self.run.relay_bps)

    def _link_s(self, dialler: Node, dialled: Node, back: bool, *, relayed: bool) -> float:
        """A tensor along a link, and one `back`."""
        if dialler.name == dialled.name:
            return 0.0
        run = self.run
        most_bps = run.relay_bps if relayed else math.inf
        ways_s = (dialler.round_trip_s + dialled.round_trip_s) / 2 + (run.relay_round_trip_s if relayed else 0.0)
        there_s = _seconds(run.tensor_bytes, min(dialler.up_bps, dialled.down_bps, most_bps))
        back_s = _seconds(run.tensor_bytes, min(dialled.up_bps, dialler.down_bps, most_bps))
        return there_s + back_s + ways_s if back else there_s + ways_s / 2

    def compute_s(self, host: Node, base: str, first: int, last: int) -> float:
        """In a step: for each device the layers that its route crosses, and what the node does as a device itself."""
        crossed = sum(
            min(last, member.back_first) - max(first, member.front) + self._tail(last) for member in self.members
        )
        return self.run.micro_batches * (host.layer_s[base] * crossed + host.own_s)

    def _tail(self, last: int) -> float:
        return self.run.tail_layers if last == self.last else 0.0

    def _tensors(self, first: int, last: int, up: bool) -> int:
        """Of a unit that a host sends, or receives."""
        onward = last != self.last or self.run.back_on_device
        if not up:
            return 1 + onward
        return onward + (first != self.first or self.run.front_learns)

    def _is_device(self, host: Node) -> bool:
        return any(host.name == member.node.name for member in self.members)

    def _own_tensors(self, up: bool) -> int:
        """The same of a device."""
        return self.run.back_on_device + (1 if up else self.run.front_learns)

    def _own_link_s(self, node: Node, up: bool) -> float:
        """A device's, for one unit."""
        return _seconds(self._own_tensors(up) * self.run.tensor_bytes, node.up_bps if up else node.down_bps)

    def _alone_s(self, node: Node) -> float:
        """What a unit takes at a device and its two links."""
        return node.own_s + self._own_link_s(node, True) + self._own_link_s(node, False)

    def _device_held_up_s(self, node: Node) -> float:
        busiest = max(node.own_s, self._own_link_s(node, True), self._own_link_s(node, False))
        return (self.run.micro_batches - 1) * busiest

    # ------------------------------------------------------------ memory

    def used_bytes(self, base: str, first: int, last: int) -> tuple[int, int]:
        """(weights and adapters, units in flight) of a host."""
        needs = self.run.bases[base]
        weights = sum(needs.layers[first:last]) + (needs.tail if last == self.last else 0)
        return weights, len(self.members) * (needs.unit + (last - first) * needs.unit_layer)

    def missing_bytes(self, host: Node, base: str, first: int, last: int) -> float:
        """What a host is short of for a slice; at most 0 where it fits."""
        run = self.run
        weights, units = self.used_bytes(base, first, last)
        return weights + units / run.unit_share + run.grows_bytes + host.own_bytes - host.memory_bytes

    def check_devices(self) -> None:
        """Raises DoesNotFit for a device that cannot hold what it keeps."""
        for member in self.members:
            short = member.node.own_bytes + self.run.grows_bytes - member.node.memory_bytes
            if short > 0:
                raise DoesNotFit(
                    f"device {member.node.name} keeps layers 0 to {member.front} and those from {member.back_first} on: "
                    f"{short / MB:.0f} MB more than its {member.node.memory_bytes / MB:.0f} MB of free memory",
                    short,
                )

    def too_small(self, count: int | None) -> DoesNotFit:
        """Why no chain fits: how many layers the hosts can hold, and what is missing."""
        layers = self.last - self.first
        room = {host.name: self._most_layers(host) for host in self.hosts}
        most = sum(sorted(room.values(), reverse=True)[: count or None])
        told = ", ".join(f"{name} {number}" for name, number in sorted(room.items()))
        short = min(self._short_bytes(host, layers - most + room[host.name]) for host in self.hosts)
        return DoesNotFit(
            f"the hosts have to hold {layers} layers ({self.first} to {self.last}) and have memory for {most} ({told}): "
            f"{short / MB:.0f} MB more are needed",
            short,
        )

    def _most_layers(self, host: Node) -> int:
        layers = range(self.first + 1, self.last + 1)
        return max((last - self.first for last in layers if self._fits(host, last)), default=0)

    def _fits(self, host: Node, last: int) -> bool:
        return any(self.missing_bytes(host, base, self.first, last) <= 0 for base in host.layer_s)

    def _short_bytes(self, host: Node, layers: int) -> float:
        """What one host lacks to hold so many layers, at least one more than it can."""
        last = min(self.last, self.first + max(layers, self._most_layers(host) + 1))
        return max(0.0, min(self.missing_bytes(host, base, self.first, last) for base in host.layer_s))

    # ------------------------------------------------------------ the answer

    def plan(self, label: _Label) -> Plan:
        hosts = [
            self._host_part(host, stage.base, first, last, in_flight)
            for (host, stage, first, last), in_flight in zip(
                self._slices_of(label), self._in_flight(label), strict=True
            )
        ]
        devices = tuple(map(self._device_part, self.members))
        return Plan(tuple(hosts), devices, self.step_s(label), label.cycle_s, self._limit(label, hosts))

    def _slices_of(self, label: _Label) -> list[tuple[Node, _Stage, int, int]]:
        found, first = [], self.first
        for number, last in label.chain:
            stage = self.stage(number, first, last)
            assert stage is not None
            found.append((self.hosts[number], stage, first, last))
            first = last
        return found

    @property
    def _most_in_flight(self) -> int:
        """What the window allows, and hosts reserve memory for."""
        return len(self.members) * min(self.run.window, self.run.micro_batches)

    def _in_flight(self, label: _Label) -> list[int]:
        """The most units that each host will keep for their backward pass.

        Between a unit's two passes lies its way through all that follows. Meanwhile others come, as often as the slowest
        before lets them. A pass of a frozen layer takes about as long backward as forward.
        """
        slices, away_s = self._slices_of(label), 0.0
        if self.run.back_on_device:
            last = slices[-1][0]
            away_s = self.slowest.back_s + self._link_s(last, self.slowest, True, relayed=not last.reachable)
        away = [away_s]
        for (before, *_), (host, stage, *_) in reversed(list(pairwise(slices))):
            away_s += stage.cycle_s + self._link_s(before, host, True, relayed=not host.reachable)
            away.insert(0, away_s)
        found, every_s = [], 1 / sum(1 / max(self._comes_every_s(m.node), _INSTANT_S) for m in self.members)
        for away_s, (_, stage, *_) in zip(away, slices, strict=True):
            every_s = max(every_s, stage.cycle_s / 2)
            found.append(min(self._most_in_flight, 1 + math.ceil(away_s / every_s - _INSTANT_S)))
        return found

    def _comes_every_s(self, device: Node) -> float:
        """A unit out of a device."""
        return max((device.own_s - device.back_s) / 2, _seconds(self.run.tensor_bytes, device.up_bps))

    def _host_part(self, host: Node, base: str, first: int, last: int, in_flight: int) -> Part:
        weights, units = self.used_bytes(base, first, last)
        used = weights + round(units * in_flight / self._most_in_flight) + host.own_bytes
        moved = [self.units * self._tensors(first, last, up) * self.run.tensor_bytes for up in (True, False)]
        memory, compute_s = self._process_bytes(host) + used, self.compute_s(host, base, first, last)
        return Part(host.name, first, last, base, memory, compute_s, *moved)

    def _device_part(self, member: Member) -> Part:
        node, run = member.node, self.run
        moved = [run.micro_batches * self._own_tensors(up) * run.tensor_bytes for up in (True, False)]
        memory, compute_s = self._process_bytes(node) + node.own_bytes, run.micro_batches * node.own_s
        return Part(node.name, member.front, member.back_first, "", memory, compute_s, *moved)

    def _process_bytes(self, node: Node) -> int:
        return node.idle_bytes + self.run.grows_bytes

    def _limit(self, label: _Label, hosts: Sequence[Part]) -> str:
        """What is busiest in a step, or the window where units wait for that."""
        if (self._rounds - 1) * label.cycle_s > max(label.held_up_s, self._relay_held_up_s(label)):
            return f"the window of {self.run.window} micro-batches in flight (split.window)"
        busy: dict[str, float] = {}
        nodes = {host.name: host for host in self.hosts} | {m.node.name: m.node for m in self.members}
        for part in [*map(self._device_part, self.members), *hosts]:
            node = nodes[part.node]
            busy[f"compute of {part.node}"] = part.compute_s
            for word, moved, bps in (
                ("uplink", part.up_bytes, node.up_bps),
                ("downlink", part.down_bytes, node.down_bps),
            ):
                busy[f"{word} of {part.node}"] = busy.get(f"{word} of {part.node}", 0.0) + _seconds(moved, bps)
        busy["the relay"] = _seconds(self.units * label.relayed * self.run.tensor_bytes, self.run.relay_bps)
        return max(busy, key=lambda name: busy[name])


def _seconds(size: float, bps: float) -> float:
    return 8 * size / bps


def _key(label: _Label, count: int | None, every_order: bool) -> object:
    """What decides how a chain can go on; labels alike in it are compared."""
    newest = label.chain[-1][0]
    if every_order:
        return label.taken, newest
    return newest, len(label.chain) if count is not None else 0


def _keep(labels: list[_Label], label: _Label) -> None:
    if any(other.beats(label) for other in labels):
        return
    labels[:] = [other for other in labels if not label.beats(other)]
    labels.append(label)
