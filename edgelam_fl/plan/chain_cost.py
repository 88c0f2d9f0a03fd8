"""The cost model: how long a step over a chain of hosts takes, and what each node computes, sends and holds in it.

Chooses nothing (`search` does), and knows no model, run file or protobuf: numbers in, numbers out (`facts`). The formulas
with their derivation: docs/planner.md. In short, a step takes as long as the longest of

    outside_s + busy_s       of each node's processor, uplink and downlink
    cycle_s + queue_s        of each of these, and of the relay
    window_turns * cycle_s

with cycle_s for one unit's way through the whole chain and back, busy_s for all that a resource does in a step, outside_s
for the first unit's way to the resource and the last unit's way on from there, and queue_s = (units - 1) * pass_s, as
units pass a resource one behind the other. Transfers overlap with computing. Left out: optimizer steps, and a device that
waits for another device's unit on the way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from edgelam_fl.plan.chain_memory import fitting_base, slice_bytes
from edgelam_fl.plan.facts import ChainCost, DeviceEnds, NodeLoad, NodeResources, SiteInstance

INSTANT_S = 1e-12


class HostSlice(NamedTuple):
    """Cost of a slice at a host, wherever in a chain it is."""

    base: str
    unit_s: float  # one unit, forward and backward
    every_s: float  # from one unit to the next; less than unit_s if it computes several at once
    queue_s: float  # (units - 1) * pass_s of the slowest of its processor, uplink and downlink
    compute_s: float  # busy_s of its processor, without the work done while the first unit was not here yet
    link_s: float  # busy_s of the busier of its uplink and downlink


class PartialChain(NamedTuple):
    """The beginning of a chain: the devices, and the first hosts with their slices."""

    cycle_s: float
    queue_s: float  # of the resource with the longest queue; the relay's is kept apart in `relayed`
    busiest_s: float  # outside_s + busy_s of the resource with the most
    relayed: float  # tensors per unit that pass the relay, averaged over all devices' units
    hosts: tuple[tuple[int, int], ...]  # (number of the host, end of its slice)
    taken: int  # the same hosts as a bit mask


class CostModel:
    """Evaluates chains over one site's hosts. A host is named by its number in `hosts`."""

    def __init__(self, instance: SiteInstance) -> None:
        self.instance, self.step = instance, instance.step
        self.devices = sorted(instance.devices, key=lambda device: device.node.name)
        # From unreachable and slow to fast: the one order that is tried if there are too many hosts for all orders.
        self.hosts = sorted(
            instance.hosts, key=lambda host: (host.reachable, -fastest_layer_s(host), host.name)
        )  # fmt: skip
        self.first, self.last = instance.first, instance.last
        # Each device's route crosses each host by at least one layer.
        self.crossed_from = max(device.front for device in self.devices)
        self.crossed_until = min(device.back_first for device in self.devices)
        inside = range(self.crossed_from + 1, self.crossed_until)
        self.cuts = [cut for cut in inside if self.first < cut < self.last]
        self.slowest = max(self.devices, key=lambda device: (self._alone_s(device.node), device.node.name)).node
        self._slices: dict[tuple[int, int, int], HostSlice | None] = {}

    @cached_property
    def units(self) -> int:
        """Number of units in a step, each of which crosses each host."""
        return len(self.devices) * self.step.micro_batches

    @cached_property
    def window_turns(self) -> int:
        """Returns the number of windows that a device's micro-batches need: ceil(micro_batches / window)."""
        return -(-self.step.micro_batches // self.step.window)

    # ------------------------------------------------------------ a chain, host by host

    def empty_chain(self) -> PartialChain:
        """The chain without a host yet: the devices alone."""
        devices = [device.node for device in self.devices]
        busiest_s = self.step.micro_batches * max(device.ends_s for device in devices)
        return PartialChain(self.slowest.ends_s, max(map(self._device_queue_s, devices)), busiest_s, 0.0, (), 0)

    def host_slice(self, number: int, first: int, last: int) -> HostSlice | None:
        """Returns the cost of layers [first, last) at a host; None if they do not fit its memory."""
        key = number, first, last
        if key not in self._slices:
            self._slices[key] = self._host_slice(self.hosts[number], first, last)
        return self._slices[key]

    def _host_slice(self, host: NodeResources, first: int, last: int) -> HostSlice | None:
        base = fitting_base(self.instance, host, first, last)
        if base is None:
            return None
        every_s = host.layer_s[base] * (last - first + self._head_layers(last))
        compute_s = self.compute_s(host, base, first, last)
        ends_s = self.step.micro_batches * host.ends_s
        first_front_s = host.ends_s - host.back_s if host.name == self.slowest.name else 0.0
        # The backward pass of frozen layers takes about as long as the forward pass.
        queues = [(compute_s - ends_s - every_s) / 2]
        queues += [(self.units - 1) * _seconds(self.step.tensor_bytes, bps) for bps in (host.up_bps, host.down_bps)]
        links = [
            self.units * _seconds(self._host_tensors(first, last, up) * self.step.tensor_bytes, bps)
            + (self.step.micro_batches * self._device_link_s(host, up) if self._is_device(host) else 0.0)
            for up, bps in ((True, host.up_bps), (False, host.down_bps))
        ]
        return HostSlice(base, host.workers * every_s, every_s, max(queues), compute_s - first_front_s, max(links))

    def extended(self, chain: PartialChain, number: int, end: int, added: HostSlice) -> PartialChain:
        """Returns the chain with one more host, and with the link back to the device if its slice is the last."""
        host = self.hosts[number]
        before = self.hosts[chain.hosts[-1][0]] if chain.hosts else None
        returns = self.gradient_returns(before is not None)
        link_s = self.link_s(before or self.slowest, host, returns)
        outside_s = chain.cycle_s - self.slowest.back_s
        busiest_s = max(chain.busiest_s, outside_s + added.link_s, outside_s + link_s + added.compute_s)
        cycle_s = chain.cycle_s + link_s + added.unit_s
        relayed = chain.relayed + (1 + returns) * self._relayed_share(before, host)
        if end == self.last and self.step.back_on_device:
            cycle_s += self.exit_s(host)
            relayed += (self._to_back + self._from_back) * self._relayed_share(None, host)
        queue_s = max(chain.queue_s, added.queue_s)
        hosts = (*chain.hosts, (number, end))
        return PartialChain(cycle_s, queue_s, busiest_s, relayed, hosts, chain.taken | 1 << number)

    # ------------------------------------------------------------ the length of a step

    def step_s(self, chain: PartialChain) -> float:
        """Seconds that a step takes over a complete chain."""
        return self.least_step_s(chain, chain.cycle_s, chain.busiest_s, chain.queue_s)

    def least_step_s(self, chain: PartialChain, cycle_s: float, busiest_s: float, queue_s: float) -> float:
        """Seconds that a step takes at least if the chain grows to this cycle, busiest resource and queue."""
        return max(
            cycle_s + max(queue_s, self.relay_queue_s(chain)), busiest_s, cycle_s / 2 + self._device_links_s,
            self.window_turns * cycle_s,
        )  # fmt: skip

    def at_least_as_good(self, one: PartialChain, other: PartialChain) -> bool:
        """Whether `one` ends in a step no longer than `other`, whatever hosts are added to both."""
        return (
            one.cycle_s <= other.cycle_s
            and one.busiest_s <= other.busiest_s
            and one.cycle_s + one.queue_s <= other.cycle_s + other.queue_s
            and one.cycle_s + self.relay_queue_s(one) <= other.cycle_s + self.relay_queue_s(other)
        )

    def relay_queue_s(self, chain: PartialChain) -> float:
        return (self.units - 1) * _seconds(chain.relayed * self.step.tensor_bytes, self.step.relay_bps)

    # ------------------------------------------------------------ computing

    def compute_s(self, host: NodeResources, base: str, first: int, last: int) -> float:
        """Seconds that a host computes in a step: the layers that each route crosses there, and its own ends as a device."""
        crossed = sum(
            min(last, device.back_first) - max(first, device.front) + self._head_layers(last) for device in self.devices
        )
        return self.step.micro_batches * (host.layer_s[base] * crossed + host.ends_s)

    def _head_layers(self, last: int) -> float:
        return self.step.head_layers if last == self.last else 0.0

    def _is_device(self, host: NodeResources) -> bool:
        return any(host.name == device.node.name for device in self.devices)

    # ------------------------------------------------------------ links

    @property
    def _to_back(self) -> float:
        """Tensors per unit from the last host to a device's back."""
        return 1 + self.step.cut_share

    @property
    def _from_back(self) -> float:
        """Tensors per unit from a device's back to the last host."""
        return (self.step.cut_share or 1) * self.step.gradient_share

    def gradient_returns(self, between_hosts: bool) -> float:
        """Returns the tensors per unit that gradients are on links between hosts, or on those from the first host to the devices."""
        returns = not self.step.cut_share if between_hosts else self.step.front_learns
        return self.step.gradient_share if returns else 0.0

    def exit_s(self, host: NodeResources) -> float:
        """Seconds for one unit over the exit link of the slowest device: hidden states to it, their gradient back."""
        return self.link_s(self.slowest, host, self._to_back, there=self._from_back)

    def link_s(self, dialling: NodeResources, dialled: NodeResources, back: float, *, there: float = 1) -> float:
        """Seconds for `there` tensors over a link, and then for `back` tensors the other way."""
        if dialling.name == dialled.name:
            return 0.0
        step, relayed = self.step, self._needs_relay(dialling, dialled)
        most_bps = step.relay_bps if relayed else math.inf
        round_trip_s = (dialling.round_trip_s + dialled.round_trip_s) / 2
        round_trip_s += step.relay_round_trip_s if relayed else 0.0
        there_s = _seconds(there * step.tensor_bytes, min(dialling.up_bps, dialled.down_bps, most_bps))
        back_s = _seconds(back * step.tensor_bytes, min(dialled.up_bps, dialling.down_bps, most_bps))
        return there_s + back_s + round_trip_s if back else there_s + round_trip_s / 2

    def _needs_relay(self, dialling: NodeResources, dialled: NodeResources) -> bool:
        return not dialled.reachable or (dialling.name, dialled.name) in self.step.by_relay

    def _relayed_share(self, before: NodeResources | None, host: NodeResources) -> float:
        """Returns the share of all units that reach a host through the relay, from the host before it or, if None, from their device."""
        dialling = [before] if before is not None else [device.node for device in self.devices]
        return sum(self._needs_relay(node, host) for node in dialling) / len(dialling)

    def _host_tensors(self, first: int, last: int, up: bool) -> float:
        """Number of tensors per unit that a host sends (`up`) or receives."""
        inner, to_device = last != self.last, self.step.back_on_device
        if not up:
            return 1 + (self.gradient_returns(True) if inner else to_device * self._from_back)
        return (1 if inner else to_device * self._to_back) + self.gradient_returns(first != self.first)

    def _device_tensors(self, up: bool) -> float:
        """Number of tensors per unit that a device sends (`up`) or receives."""
        there, back = self.step.back_on_device * self._to_back, self.step.back_on_device * self._from_back
        return 1 + back if up else there + self.gradient_returns(False)

    def _device_link_s(self, node: NodeResources, up: bool) -> float:
        """Seconds per unit of a device's uplink or downlink."""
        return _seconds(self._device_tensors(up) * self.step.tensor_bytes, node.up_bps if up else node.down_bps)

    @cached_property
    def _device_links_s(self) -> float:
        """Seconds per step of the busiest of all devices' uplinks and downlinks."""
        links = [self._device_link_s(device.node, up) for device in self.devices for up in (True, False)]
        return self.step.micro_batches * max(links)

    def _alone_s(self, node: NodeResources) -> float:
        """Seconds of one unit at a device and on its two links."""
        return node.ends_s + self._device_link_s(node, True) + self._device_link_s(node, False)

    def _device_queue_s(self, node: NodeResources) -> float:
        """Returns (micro_batches - 1) * pass_s of the slowest of a device's processor, uplink and downlink."""
        passes = [node.back_s, (node.ends_s - node.back_s) / 2]
        passes += [_seconds(self.step.tensor_bytes, bps) for bps in (node.up_bps, node.down_bps)]
        return (self.step.micro_batches - 1) * max(passes)

    # ------------------------------------------------------------ what a chain means for each node

    def cost(self, chain: PartialChain) -> ChainCost:
        """Returns what a complete chain costs, node by node."""
        in_flight = self._in_flight(chain)
        hosts = [
            self._host_load(host, added.base, first, last, units)
            for (host, added, first, last), units in zip(self._slices_of(chain), in_flight, strict=True)
        ]
        devices = tuple(map(self._device_load, self.devices))
        return ChainCost(tuple(hosts), devices, self.step_s(chain), chain.cycle_s, self._limit(chain, hosts))

    def _slices_of(self, chain: PartialChain) -> list[tuple[NodeResources, HostSlice, int, int]]:
        found, first = [], self.first
        for number, last in chain.hosts:
            added = self.host_slice(number, first, last)
            assert added is not None, "a chain is made of slices that fit"
            found.append((self.hosts[number], added, first, last))
            first = last
        return found

    @property
    def _most_in_flight(self) -> int:
        """The most units that can be in flight at once, for which a host reserves memory."""
        return len(self.devices) * min(self.step.window, self.step.micro_batches)

    def _in_flight(self, chain: PartialChain) -> list[int]:
        """Counts the units that each host keeps for their backward pass at most.

        Between a unit's two passes at a host lies its way through all that follows. Meanwhile further units arrive, as often
        as the slowest resource before the host lets them through.
        """
        slices, away_s = self._slices_of(chain), 0.0
        if self.step.back_on_device:
            away_s = self.slowest.back_s + self.exit_s(slices[-1][0])
        away = [away_s]
        for (before, *_), (host, added, *_) in reversed(list(pairwise(slices))):
            away_s += added.unit_s + self.link_s(before, host, self.gradient_returns(True))
            away.insert(0, away_s)
        found, arrival_s = [], 1 / sum(1 / max(self._sends_every_s(device.node), INSTANT_S) for device in self.devices)
        for away_s, (_, added, *_) in zip(away, slices, strict=True):
            arrival_s = max(arrival_s, added.every_s / 2)
            found.append(min(self._most_in_flight, 1 + math.ceil(away_s / arrival_s - INSTANT_S)))
        return found

    def _sends_every_s(self, device: NodeResources) -> float:
        """Seconds between two units that a device sends."""
        return max((device.ends_s - device.back_s) / 2, _seconds(self.step.tensor_bytes, device.up_bps))

    def _host_load(self, host: NodeResources, base: str, first: int, last: int, in_flight: int) -> NodeLoad:
        weights, units = slice_bytes(self.instance, base, first, last)
        used = weights + round(units * in_flight / self._most_in_flight) + host.ends_bytes
        moved = [
            round(self.units * self._host_tensors(first, last, up) * self.step.tensor_bytes) for up in (True, False)
        ]
        memory, compute_s = self._process_bytes(host) + used, self.compute_s(host, base, first, last)
        return NodeLoad(host.name, first, last, base, memory, compute_s, *moved)

    def _device_load(self, device: DeviceEnds) -> NodeLoad:
        node, step = device.node, self.step
        moved = [round(step.micro_batches * self._device_tensors(up) * step.tensor_bytes) for up in (True, False)]
        memory, compute_s = self._process_bytes(node) + node.ends_bytes, step.micro_batches * node.ends_s
        return NodeLoad(node.name, device.front, device.back_first, "", memory, compute_s, *moved)

    def _process_bytes(self, node: NodeResources) -> int:
        return node.idle_bytes + self.step.growth_bytes

    def _limit(self, chain: PartialChain, hosts: Sequence[NodeLoad]) -> str:
        """Names the resource that is busiest in a step, or the window if units wait for that."""
        if self.window_turns > 1 and self.step_s(chain) <= self.window_turns * chain.cycle_s:
            return f"the window of {self.step.window} micro-batches in flight (split.window)"
        busy_s: dict[str, float] = {}
        nodes = {host.name: host for host in self.hosts} | {device.node.name: device.node for device in self.devices}
        for load in [*map(self._device_load, self.devices), *hosts]:
            node = nodes[load.node]
            busy_s[f"compute of {load.node}"] = load.compute_s
            for link, moved, bps in (
                (f"uplink of {load.node}", load.up_bytes, node.up_bps),
                (f"downlink of {load.node}", load.down_bytes, node.down_bps),
            ):
                busy_s[link] = busy_s.get(link, 0.0) + _seconds(moved, bps)
        busy_s["the relay"] = _seconds(self.units * chain.relayed * self.step.tensor_bytes, self.step.relay_bps)
        return max(busy_s, key=lambda name: busy_s[name])


def fastest_layer_s(node: NodeResources) -> float:
    """Seconds per layer and unit in the node's fastest base; infinite if it has none."""
    return min(node.layer_s.values(), default=math.inf)


def _seconds(size_bytes: float, bps: float) -> float:
    return 8 * size_bytes / bps
