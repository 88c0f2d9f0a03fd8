"""Which hosts a site's routes cross, in which order, and which layers each of them holds: the shortest step that fits.

What a chain costs is `split.costs`'. The search goes over the cuts from the first layer to the last, and keeps for each (hosts
taken, newest host, cut) every beginning that no other one beats in all that a step's length is made of. So it is exact
for up to `ALL_ORDERS` hosts. Of more it tries one order alone, from those behind the relay and the slow to the fast, each taken
or left out: exact still where all links are alike, none passes the relay and all devices keep the same layers, else near.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import combinations

from edgelam_fl.errors import RunFailed
from edgelam_fl.plan.chain_cost import INSTANT_S, Chain, Label, Member, Node, Plan, Run, Site, Stage, quickness

ALL_ORDERS = 8


def best_plan(run: Run, members: Sequence[Member], hosts: Sequence[Node], count: int | None = None) -> Plan:
    """The plan with the shortest step; with `count`, of those with so many hosts.

    Raises DoesNotFit where memory is short, with how much, RunFailed where there are too few hosts.
    """
    least = 1 if count is None else count
    if len(hosts) < least:
        raise RunFailed(f"a site needs {least} hosts, and {len(hosts)} nodes can be one")
    site = _Search(run, members, hosts)
    site.check_devices()
    label = site.search(count)
    if label is None:
        raise site.too_small(count)
    plan = site.plan(label)
    unlimited = _Search(run, members, [replace(host, memory_bytes=math.inf) for host in hosts])
    free = unlimited.search_one_order(count, plan.step_s * (1 - 1e-9))
    if free is not None:
        plan = replace(plan, memory_limit=_held_back(plan, unlimited.plan(free)))
    return replace(plan, left_out=tuple(sorted({host.name for host in hosts} - {part.node for part in plan.hosts})))


def rated(run: Run, members: Sequence[Member], hosts: Sequence[Node], chain: Chain) -> Plan | None:
    """A given chain as it would do now; None where it is impossible: a host is not here, too small, or not crossed.

    The last host ends where the members' layers now end.
    """
    site = Site(run, members, hosts)
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
    ordered = sorted(hosts, key=quickness)
    dealt: list[list[Node]] = [[] for _ in range(sites)]
    for number, host in enumerate(ordered):
        turn, place = divmod(number, sites)
        dealt[place if turn % 2 == 0 else sites - 1 - place].append(host)
    return dealt


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


class _Search(Site):
    """A site's best chain."""

    def __init__(self, run: Run, members: Sequence[Member], hosts: Sequence[Node]) -> None:
        super().__init__(run, members, hosts)
        self._lefts: dict[int, list[tuple[float, int]]] = {}
        self._quickest: dict[tuple[int, int], float] = {}
        self._evens: dict[tuple[int, int], float] = {}

    def search(self, count: int | None) -> Label | None:
        """The best chain; None where nothing fits."""
        found = self.search_one_order(count)
        if len(self.hosts) <= ALL_ORDERS:
            found = self._search(count, found, math.inf if found is None else self.step_s(found), every_order=True)
        return found

    def search_one_order(self, count: int | None, below_s: float = math.inf) -> Label | None:
        """With each host taken or left out; None where nothing takes less than `below_s` either."""
        return self._search(count, None, below_s, every_order=False)

    def _search(self, count: int | None, best: Label | None, best_s: float, *, every_order: bool) -> Label | None:
        """Labels by the cut that they reach, from the first to the last; `best` takes `best_s`."""
        waiting: dict[int, dict[object, list[Label]]] = {self.first: {0: [self.begin()]}}
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
                            self._keep(waiting.setdefault(end, {}).setdefault(key, []), longer)
        return best

    def _keep(self, labels: list[Label], label: Label) -> None:
        if any(self.beats(other, label) for other in labels):
            return
        labels[:] = [other for other in labels if not self.beats(label, other)]
        labels.append(label)

    def _next_hosts(self, label: Label, count: int | None, every_order: bool) -> Iterator[int]:
        if count is not None and len(label.chain) == count:
            return
        begin = 0 if every_order or not label.chain else label.chain[-1][0] + 1
        yield from (number for number in range(begin, len(self.hosts)) if not label.taken >> number & 1)

    def _slices(self, number: int, at: int, length: int, count: int | None) -> Iterator[tuple[int, Stage]]:
        """What a host can hold from `at` on, as the chain's host number `length`."""
        ends = [cut for cut in self.cuts if cut > at] if length != count else []
        if count is None or length == count:
            ends = [*ends, self.last]
        for end in ends:
            stage = self.stage(number, at, end)
            if stage is not None:
                yield end, stage

    def _bound_s(self, label: Label, at: int) -> float:
        """No chain that begins so takes less: the hosts that are left share the layers that are left, over the shortest ways."""
        if at == self.last:
            return self.step_s(label)
        cycle_s = label.cycle_s + self._quickest_s(label.taken, self.last - at)
        even_s = self._even_s(label.taken, max(0, self.crossed_until - max(at, self.crossed_from)))
        busiest_s = max(label.busiest_s, label.cycle_s - self.slowest.back_s + self.units * even_s)
        return self.least_s(label, cycle_s, busiest_s, label.held_up_s)

    def _left(self, taken: int) -> list[tuple[float, int]]:
        """Of the hosts that are not taken, the fast ones first: seconds a layer, and the most layers that fit."""
        if taken not in self._lefts:
            self._lefts[taken] = sorted(
                (quickness(host)[0], self._most[number])
                for number, host in enumerate(self.hosts)
                if not taken >> number & 1
            )
        return self._lefts[taken]

    @cached_property
    def _most(self) -> list[int]:
        """The most layers that each host can hold, wherever they are."""
        bounds = [self.first, *self.cuts, self.last]
        return [
            max((end - at for at, end in combinations(bounds, 2) if self.stage(number, at, end)), default=0)
            for number in range(len(self.hosts))
        ]

    def _quickest_s(self, taken: int, layers: int) -> float:
        """A unit's time at those hosts, where the fast ones take all they can of `layers`, and on the way to one and back.

        Infinite where the layers do not fit.
        """
        key = taken, layers
        if key not in self._quickest:
            total = 0.0
            for layer_s, most in self._left(taken):
                total += layer_s * min(most, layers)
                layers -= min(most, layers)
            ways = [way_s for number, way_s in enumerate(self._ways_s) if not taken >> number & 1]
            self._quickest[key] = total + min(ways) if ways and not layers else math.inf
        return self._quickest[key]

    @cached_property
    def _ways_s(self) -> list[float]:
        """A unit's shortest way to each host, and if it is the last one's, to the device and back."""
        found = []
        for host in self.hosts:
            ways = [self._link_s(other, host, True) for other in self.hosts if other is not host]
            ways.append(self._link_s(self.slowest, host, self.run.front_learns))
            found.append(min(ways) + (self._link_s(self.slowest, host, True) if self.run.back_on_device else 0.0))
        return found

    def _even_s(self, taken: int, layers: int) -> float:
        """A unit's time at the first of those hosts, where they share `layers` such that each makes the step as long.

        Each host has all units to do and those before it outside, so it may take a unit's part less than the one before it.
        """
        key = taken, layers
        if key not in self._evens:
            rate = sum(
                (1 - 1 / self.units) ** place / max(layer_s, INSTANT_S)
                for place, (layer_s, _) in enumerate(self._left(taken))
            )
            self._evens[key] = layers / rate if rate else math.inf
        return self._evens[key]


def _key(label: Label, count: int | None, every_order: bool) -> object:
    """What decides how a chain can go on; labels alike in it are compared."""
    newest = label.chain[-1][0]
    if every_order:
        return label.taken, newest
    return newest, len(label.chain) if count is not None else 0
