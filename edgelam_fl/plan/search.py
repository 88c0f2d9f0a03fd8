"""Finds the chain of hosts with the shortest step that fits: which hosts, in which order, with which layers.

Costs come from `chain_cost`. The search goes over the cuts from the first layer to the last. For each (hosts taken, newest
host, cut) it keeps every partial chain that no other one matches in all parts of a step's length, so it is exact for up to
`ALL_ORDERS` hosts. With more hosts it tries one order alone, from unreachable and slow hosts to fast ones, each taken or left
out: still exact if all links are alike, none passes the relay and all devices keep the same layers; close to it otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from itertools import combinations

from edgelam_fl.errors import DoesNotFit, RunFailed
from edgelam_fl.plan.chain_cost import INSTANT_S, CostModel, HostSlice, PartialChain, fastest_layer_s
from edgelam_fl.plan.chain_memory import device_shortage, host_shortage
from edgelam_fl.plan.facts import Chain, ChainCost, SiteInstance

ALL_ORDERS = 8


def best_chain(instance: SiteInstance, count: int | None = None) -> ChainCost:
    """Returns the chain with the shortest step; of those with `count` hosts if it is given.

    Raises DoesNotFit with the missing bytes if memory is short, RunFailed if there are fewer hosts than `count`.
    """
    found = _fitting_chain(instance, count)
    if isinstance(found, DoesNotFit):
        raise found
    names = {host.name for host in instance.hosts}
    left_out = tuple(sorted(names - {host.node for host in found.hosts}))
    return replace(found, memory_limit=_memory_limit(instance, count, found), left_out=left_out)


def shortage(instance: SiteInstance, count: int | None = None) -> DoesNotFit | None:
    """Says why no chain, or none with `count` hosts, fits the nodes' memory; None if one does.

    Raises RunFailed if there are fewer hosts than `count`.
    """
    found = _fitting_chain(instance, count)
    return found if isinstance(found, DoesNotFit) else None


def cost_of(instance: SiteInstance, chain: Chain) -> ChainCost | None:
    """Returns what a given chain would cost now; None if a host is gone, too small, or not crossed by every route.

    The last host's slice ends where the hosts' layers end now, whatever the chain says.
    """
    costs = CostModel(instance)
    numbers = {host.name: number for number, host in enumerate(costs.hosts)}
    if not chain or not all(name in numbers for name, _ in chain):
        return None
    partial, at = costs.empty_chain(), costs.first
    for place, (name, cut) in enumerate(chain, 1):
        end = costs.last if place == len(chain) else cut
        if (end != costs.last and end not in costs.cuts) or end <= at:
            return None
        added = costs.host_slice(numbers[name], at, end)
        if added is None:
            return None
        partial, at = costs.extended(partial, numbers[name], end, added), end
    return costs.cost(partial)


def _fitting_chain(instance: SiteInstance, count: int | None) -> ChainCost | DoesNotFit:
    """Returns the best chain, without its memory limit and the hosts left out, or why none fits."""
    least = 1 if count is None else count
    if len(instance.hosts) < least:
        raise RunFailed(f"a site needs {least} hosts, and only {len(instance.hosts)} of the nodes can be one")
    short = device_shortage(instance)
    if short is not None:
        return short
    search = _Search(instance, count)
    found = search.best()
    return host_shortage(instance, count) if found is None else search.costs.cost(found)


def _memory_limit(instance: SiteInstance, count: int | None, best: ChainCost) -> str:
    """Names the host whose memory takes most layers from it, with the step that all would have with endless memory.

    Empty if memory changes nothing.
    """
    endless = replace(instance, hosts=tuple(replace(host, free_bytes=math.inf) for host in instance.hosts))
    search = _Search(endless, count)
    found = search.best_in_one_order(below_s=best.step_s * (1 - 1e-9))
    if found is None:
        return ""
    free = search.costs.cost(found)
    wanted = {host.node: host.last - host.first for host in free.hosts}
    lacking = {host.node: wanted.get(host.node, 0) - (host.last - host.first) for host in best.hosts}
    lacking |= {name: layers for name, layers in wanted.items() if name not in lacking}
    name = max(sorted(lacking), key=lambda node: lacking[node])
    return f"memory of {name}: with more, a step would take {free.step_s:.3g} s"


class _Search:
    """One search over the chains of one instance, of `count` hosts if it is given."""

    def __init__(self, instance: SiteInstance, count: int | None) -> None:
        self.costs, self._count = CostModel(instance), count
        self._remaining: dict[int, list[tuple[float, int]]] = {}
        self._fastest: dict[tuple[int, int], float] = {}
        self._even: dict[tuple[int, int], float] = {}

    def best(self) -> PartialChain | None:
        """Returns the best complete chain; None if nothing fits."""
        found = self.best_in_one_order()
        if len(self.costs.hosts) <= ALL_ORDERS:
            best_s = math.inf if found is None else self.costs.step_s(found)
            found = self._search(found, best_s, every_order=True)
        return found

    def best_in_one_order(self, below_s: float = math.inf) -> PartialChain | None:
        """Returns the best chain with the hosts in the model's order; None if no step is shorter than `below_s`."""
        return self._search(None, below_s, every_order=False)

    def _search(self, best: PartialChain | None, best_s: float, *, every_order: bool) -> PartialChain | None:
        """Extends partial chains cut by cut; `best`, with a step of `best_s`, is the best complete chain so far."""
        costs = self.costs
        waiting: dict[int, dict[object, list[PartialChain]]] = {costs.first: {0: [costs.empty_chain()]}}
        for at in [costs.first, *costs.cuts]:
            for chain in [chain for chains in waiting.pop(at, {}).values() for chain in chains]:
                if self._bound_s(chain, at) >= best_s:
                    continue
                for number in self._next_hosts(chain, every_order):
                    for end, added in self._slices(number, at, len(chain.hosts) + 1):
                        longer = costs.extended(chain, number, end, added)
                        if self._bound_s(longer, end) >= best_s:
                            continue
                        if end == costs.last:
                            best, best_s = longer, costs.step_s(longer)
                        else:
                            key = self._comparable(longer, every_order)
                            self._keep(waiting.setdefault(end, {}).setdefault(key, []), longer)
        return best

    def _keep(self, chains: list[PartialChain], chain: PartialChain) -> None:
        """Adds a chain to those that are alike, and drops all that another one makes needless."""
        if any(self.costs.at_least_as_good(other, chain) for other in chains):
            return
        chains[:] = [other for other in chains if not self.costs.at_least_as_good(chain, other)]
        chains.append(chain)

    def _comparable(self, chain: PartialChain, every_order: bool) -> object:
        """Returns the key of chains with the same ways to continue: of these the worse ones are dropped."""
        newest = chain.hosts[-1][0]
        if every_order:
            return chain.taken, newest
        return newest, len(chain.hosts) if self._count is not None else 0

    def _next_hosts(self, chain: PartialChain, every_order: bool) -> Iterator[int]:
        if self._count is not None and len(chain.hosts) == self._count:
            return
        begin = 0 if every_order or not chain.hosts else chain.hosts[-1][0] + 1
        yield from (number for number in range(begin, len(self.costs.hosts)) if not chain.taken >> number & 1)

    def _slices(self, number: int, at: int, length: int) -> Iterator[tuple[int, HostSlice]]:
        """Yields the slices from layer `at` on that fit a host, as number `length` of the chain, each with its end."""
        ends = [cut for cut in self.costs.cuts if cut > at] if length != self._count else []
        if self._count is None or length == self._count:
            ends = [*ends, self.costs.last]
        for end in ends:
            added = self.costs.host_slice(number, at, end)
            if added is not None:
                yield end, added

    # ------------------------------------------------------------ a lower bound

    def _bound_s(self, chain: PartialChain, at: int) -> float:
        """Seconds that a step takes at least over any chain that begins so: the remaining hosts share the remaining layers."""
        costs = self.costs
        if at == costs.last:
            return costs.step_s(chain)
        cycle_s = chain.cycle_s + self._fastest_s(chain.taken, costs.last - at)
        even_s = self._even_s(chain.taken, max(0, costs.crossed_until - max(at, costs.crossed_from)))
        busiest_s = max(chain.busiest_s, chain.cycle_s - costs.slowest.back_s + costs.units * even_s)
        return costs.least_step_s(chain, cycle_s, busiest_s, chain.queue_s)

    def _remaining_hosts(self, taken: int) -> list[tuple[float, int]]:
        """Lists (seconds per layer, most layers that fit) of the hosts that are not taken, the fast ones first."""
        if taken not in self._remaining:
            self._remaining[taken] = sorted(
                (fastest_layer_s(host), self._most_layers[number])
                for number, host in enumerate(self.costs.hosts)
                if not taken >> number & 1
            )
        return self._remaining[taken]

    @cached_property
    def _most_layers(self) -> list[int]:
        """The most layers that each host can hold, wherever in the model they are."""
        costs = self.costs
        bounds = [costs.first, *costs.cuts, costs.last]
        return [
            max((end - at for at, end in combinations(bounds, 2) if costs.host_slice(number, at, end)), default=0)
            for number in range(len(costs.hosts))
        ]

    def _fastest_s(self, taken: int, layers: int) -> float:
        """Seconds for a unit at the remaining hosts if the fast ones take all layers they can, plus the shortest link.

        Infinite if the layers do not fit.
        """
        key = taken, layers
        if key not in self._fastest:
            total = 0.0
            for layer_s, most in self._remaining_hosts(taken):
                total += layer_s * min(most, layers)
                layers -= min(most, layers)
            links = [link_s for number, link_s in enumerate(self._links_s) if not taken >> number & 1]
            self._fastest[key] = total + min(links) if links and not layers else math.inf
        return self._fastest[key]

    @cached_property
    def _links_s(self) -> list[float]:
        """Seconds of a unit's shortest link to each host, plus those of the link between the last host and the device."""
        costs, found = self.costs, []
        for host in costs.hosts:
            links = [
                costs.link_s(other, host, costs.gradient_returns(True)) for other in costs.hosts if other is not host
            ]
            links.append(costs.link_s(costs.slowest, host, costs.step.front_learns))
            exit_s = costs.exit_s(host) if costs.step.back_on_device else 0.0
            found.append(min(links) + exit_s)
        return found

    def _even_s(self, taken: int, layers: int) -> float:
        """Seconds for a unit at the first of the remaining hosts if they share `layers` so that all end the step together.

        Each host computes all units while the hosts before it count as outside, so its share is smaller by one unit's part.
        """
        key = taken, layers
        if key not in self._even:
            rate = sum(
                (1 - 1 / self.costs.units) ** place / max(layer_s, INSTANT_S)
                for place, (layer_s, _) in enumerate(self._remaining_hosts(taken))
            )
            self._even[key] = layers / rate if rate else math.inf
        return self._even[key]
