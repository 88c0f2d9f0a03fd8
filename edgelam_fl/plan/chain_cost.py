"""What a chain of hosts costs in a step: seconds, bytes, memory. Each with the layers that it is given, none chosen here.

Numbers in, numbers out: knows no model, no protobuf, no torch. `edgelam_fl.plan.speeds` makes the numbers of profiles, and
`split.planner` looks for the chain with the shortest step.

A unit is one micro-batch of one device. Its way takes `cycle_s`: through the device's own layers, each host's, and over
each link, forward and back. A step takes as long as the longest of

    outside_r + busy_r          for each r: a node's processor, its uplink, its downlink
    cycle_s + (n_r - 1) pass_r  for each r, and for the relay
    ceil(m / W) cycle_s

busy_r is what r does in a whole step; outside_r is what the first unit takes to get to r and the last one from there back, when
r has nothing to do; of a device's own links that is taken to be half the cycle. In between other units are there, so what lies
behind r costs nothing as long as it is quicker. Each of its n_r units has to pass r, one behind the other, in both directions:
`pass_r` is the longer of the two passes. m is a device's micro-batches, W its window. p stages that are all alike take
(m + p - 1) t, as GPipe and 1F1B do. Transfers overlap computing; optimizer steps, and waiting of one device for another's unit
on the way, are left out.

A link is as fast as the slower of its two ends; both directions, and all links of a node, share that node's. What cannot be
dialled, by anyone or by the one node that would have to, is reached through the relay: such links take the relay's time too.
Without the relay two nodes are half of both round trips apart, which were measured to the server.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from edgelam_fl.errors import DoesNotFit

MB = 1e6
INSTANT_S = 1e-12


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
    by_relay: frozenset[tuple[str, str]] = frozenset()  # (who dials, who is dialled): pairs that found no other way
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


class Stage(NamedTuple):
    """A host with a slice."""

    base: str
    cycle_s: float
    held_up_s: float  # (n - 1) passes, of the slowest of its three resources
    compute_s: float  # in a step; without what it did as the slowest device while nothing had come here yet
    link_s: float  # the same of the busier of its two links


class Label(NamedTuple):
    """A beginning of a chain."""

    cycle_s: float
    held_up_s: float  # (n - 1) passes, of the slowest resource
    busiest_s: float  # outside + busy, of the resource with the most
    relayed: float  # tensors of a unit that pass the relay, the mean of all devices' units
    chain: tuple[tuple[int, int], ...]  # (host, where it ends)
    taken: int  # the same hosts, a bit each


class Site:
    """Devices and the hosts that there are, ready to be asked for costs."""

    def __init__(self, run: Run, members: Sequence[Member], hosts: Sequence[Node]) -> None:
        self.run = run
        self.members = sorted(members, key=lambda member: member.node.name)
        # The one order that is tried where there are too many hosts for all orders.
        self.hosts = sorted(hosts, key=lambda host: (host.reachable, [-s for s in quickness(host)[:1]], host.name))
        self.first = min(member.front for member in members)
        self.last = max(member.back_first for member in members)
        # Every route crosses every host by one layer at least.
        self.crossed_from = max(member.front for member in members)
        self.crossed_until = min(member.back_first for member in members)
        inside = range(self.crossed_from + 1, self.crossed_until)
        self.cuts = [cut for cut in inside if self.first < cut < self.last]
        self.slowest = max(self.members, key=lambda m: (self._alone_s(m.node), m.node.name)).node
        self._stages: dict[tuple[int, int, int], Stage | None] = {}

    @cached_property
    def units(self) -> int:
        """Of a step, at each host."""
        return len(self.members) * self.run.micro_batches

    def begin(self) -> Label:
        """With the devices alone."""
        devices = [member.node for member in self.members]
        busiest_s = self.run.micro_batches * max(device.own_s for device in devices)
        return Label(self.slowest.own_s, max(map(self._device_held_up_s, devices)), busiest_s, 0.0, (), 0)

    # ------------------------------------------------------------ times

    def stage(self, number: int, first: int, last: int) -> Stage | None:
        """None where no base fits."""
        key = number, first, last
        if key not in self._stages:
            self._stages[key] = self._stage(self.hosts[number], first, last)
        return self._stages[key]

    def _stage(self, host: Node, first: int, last: int) -> Stage | None:
        base = next((base for base in host.layer_s if self.missing_bytes(host, base, first, last) <= 0), None)
        if base is None:
            return None
        one_s = host.layer_s[base] * (last - first + self._tail(last))
        hosting_s = self.compute_s(host, base, first, last)
        own_s = self.run.micro_batches * host.own_s
        own_first_s = host.own_s - host.back_s if host.name == self.slowest.name else 0.0
        # A pass of frozen layers takes about as long backward as forward.
        held_up = [(hosting_s - own_s - one_s) / 2]
        held_up += [(self.units - 1) * _seconds(self.run.tensor_bytes, bps) for bps in (host.up_bps, host.down_bps)]
        links = [
            self.units * _seconds(self._tensors(first, last, up) * self.run.tensor_bytes, bps)
            + (self.run.micro_batches * self._own_link_s(host, up) if self._is_device(host) else 0.0)
            for up, bps in ((True, host.up_bps), (False, host.down_bps))
        ]
        return Stage(base, one_s, max(held_up), hosting_s - own_first_s, max(links))

    def extended(self, label: Label, number: int, end: int, stage: Stage) -> Label:
        """One host more: its own cycle, the link to it, and after the last one the link back to the device."""
        host = self.hosts[number]
        before = self.hosts[label.chain[-1][0]] if label.chain else None
        back = before is not None or self.run.front_learns
        link_s = self._link_s(before or self.slowest, host, back)
        outside_s = label.cycle_s - self.slowest.back_s
        busiest_s = max(label.busiest_s, outside_s + stage.link_s, outside_s + link_s + stage.compute_s)
        cycle_s = label.cycle_s + link_s + stage.cycle_s
        relayed = label.relayed + (1 + back) * self._relayed(before, host)
        if end == self.last and self.run.back_on_device:
            cycle_s += self._link_s(self.slowest, host, True)
            relayed += 2 * self._relayed(None, host)
        return Label(
            cycle_s,
            max(label.held_up_s, stage.held_up_s),
            busiest_s,
            relayed,
            (*label.chain, (number, end)),
            label.taken | 1 << number,
        )

    def step_s(self, label: Label) -> float:
        return self.least_s(label, label.cycle_s, label.busiest_s, label.held_up_s)

    def beats(self, one: Label, other: Label) -> bool:
        """Whether `one` is at least as good for whatever follows: that adds to both cycles alike, and to both sums."""
        return (
            one.cycle_s <= other.cycle_s
            and one.busiest_s <= other.busiest_s
            and one.cycle_s + one.held_up_s <= other.cycle_s + other.held_up_s
            and one.cycle_s + self.relay_held_up_s(one) <= other.cycle_s + self.relay_held_up_s(other)
        )

    def least_s(self, label: Label, cycle_s: float, busiest_s: float, held_up_s: float) -> float:
        """What a step takes, or more, with a cycle and resources at least as busy as these."""
        return max(
            cycle_s + max(held_up_s, self.relay_held_up_s(label)), busiest_s, cycle_s / 2 + self._own_links_s,
            self.rounds * cycle_s,
        )  # fmt: skip

    @cached_property
    def _own_links_s(self) -> float:
        """Of the busiest of the devices' links. It waits for the hosts' half of the cycle: forward or backward."""
        ways = [self._own_link_s(member.node, up) for member in self.members for up in (True, False)]
        return self.run.micro_batches * max(ways)

    @cached_property
    def rounds(self) -> int:
        """How often the window opens in a step."""
        return -(-self.run.micro_batches // self.run.window)

    def relay_held_up_s(self, label: Label) -> float:
        return (self.units - 1) * _seconds(label.relayed * self.run.tensor_bytes, self.run.relay_bps)

    def _by_relay(self, dialler: Node, dialled: Node) -> bool:
        return not dialled.reachable or (dialler.name, dialled.name) in self.run.by_relay

    def _relayed(self, before: Node | None, host: Node) -> float:
        """The part of all units whose link from the host before it, or from their device, passes the relay."""
        diallers = [before] if before is not None else [member.node for member in self.members]
        return sum(self._by_relay(dialler, host) for dialler in diallers) / len(diallers)

    def _link_s(self, dialler: Node, dialled: Node, back: bool) -> float:
        """A tensor along a link, and one `back`."""
        if dialler.name == dialled.name:
            return 0.0
        run, relayed = self.run, self._by_relay(dialler, dialled)
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
        passes = [node.back_s, (node.own_s - node.back_s) / 2]
        passes += [_seconds(self.run.tensor_bytes, bps) for bps in (node.up_bps, node.down_bps)]
        return (self.run.micro_batches - 1) * max(passes)

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

    def plan(self, label: Label) -> Plan:
        hosts = [
            self._host_part(host, stage.base, first, last, in_flight)
            for (host, stage, first, last), in_flight in zip(
                self._slices_of(label), self._in_flight(label), strict=True
            )
        ]
        devices = tuple(map(self._device_part, self.members))
        return Plan(tuple(hosts), devices, self.step_s(label), label.cycle_s, self._limit(label, hosts))

    def _slices_of(self, label: Label) -> list[tuple[Node, Stage, int, int]]:
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

    def _in_flight(self, label: Label) -> list[int]:
        """The most units that each host will keep for their backward pass.

        Between a unit's two passes lies its way through all that follows. Meanwhile others come, as often as the slowest
        before lets them. A pass of a frozen layer takes about as long backward as forward.
        """
        slices, away_s = self._slices_of(label), 0.0
        if self.run.back_on_device:
            away_s = self.slowest.back_s + self._link_s(self.slowest, slices[-1][0], True)
        away = [away_s]
        for (before, *_), (host, stage, *_) in reversed(list(pairwise(slices))):
            away_s += stage.cycle_s + self._link_s(before, host, True)
            away.insert(0, away_s)
        found, every_s = [], 1 / sum(1 / max(self._comes_every_s(m.node), INSTANT_S) for m in self.members)
        for away_s, (_, stage, *_) in zip(away, slices, strict=True):
            every_s = max(every_s, stage.cycle_s / 2)
            found.append(min(self._most_in_flight, 1 + math.ceil(away_s / every_s - INSTANT_S)))
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

    def _limit(self, label: Label, hosts: Sequence[Part]) -> str:
        """What is busiest in a step, or the window where units wait for that."""
        if self.rounds > 1 and self.step_s(label) <= self.rounds * label.cycle_s:
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


def quickness(node: Node) -> tuple[float, str]:
    return min(node.layer_s.values(), default=math.inf), node.name


def _seconds(size: float, bps: float) -> float:
    return 8 * size / bps
