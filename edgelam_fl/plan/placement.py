"""Decides where layers go with split.cuts = "auto": facts about the nodes become a plan, the plan becomes a layout.

`instance` has the facts, `search` finds the chains. Layers move between rounds if new chains are clearly faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median_low
from typing import Any

from edgelam_fl.errors import ConfigError, DoesNotFit, RunFailed
from edgelam_fl.plan.bases import split_pair
from edgelam_fl.plan.facts import Chain, ChainCost, SiteInstance
from edgelam_fl.plan.footprint import Footprints
from edgelam_fl.plan.fronts import check_memory_for_fronts
from edgelam_fl.plan.instance import InstanceMaker, planned_times, planned_workers
from edgelam_fl.plan.layout import HostRange, Layout, layout_of_chains, make_layout, who_may_host
from edgelam_fl.plan.search import best_chain, cost_of, shortage
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.plan.speeds import Speeds, before_rounds, learned, near
from edgelam_fl.plan.what_fits import hosts_wanted, nearest_that_fits
from edgelam_fl.telemetry.events import Emit, NodePlaced, PlacementMade, SitePlaced
from edgelam_fl.wire import edgelam_pb2 as pb

GAIN = 0.1  # new chains must be so much faster than the old ones
_MEASURING_S = 2.0  # roughly what measuring the links takes: a smaller difference per round is not worth it


@dataclass(frozen=True)
class Proposal:
    """The chains of all sites, with what they cost and why they were chosen."""

    chains: tuple[ChainCost, ...]
    window: int
    tokens: float  # per row, as planned with
    reason: str = "the first plan"
    changed: bool = True

    def event(self, number: int = 0, measured: Sequence[str] = ()) -> PlacementMade:
        """Makes the event of the proposal. `number`: that of the round, 0 if no training follows. `measured`: what the round before showed."""
        return PlacementMade(
            round=number, changed=self.changed, reason=self.reason, step_s=round(longest_step_s(self.chains), 4),
            window=self.window, tokens=round(self.tokens, 1), sites=tuple(map(_described, self.chains)),
            measured=tuple(measured),
        )  # fmt: skip


class Placement:
    """Makes the layout of each round, and learns from the rounds."""

    def __init__(self, spec: RunSpec, emit: Emit = lambda event: None) -> None:
        self.spec, self.config, self.emit = spec, spec.config, emit
        self._footprints, self._speeds = Footprints(spec), before_rounds(spec.config)
        self._chains: tuple[Chain, ...] = ()  # of the newest layout, one per site
        self._newest: tuple[list[SiteInstance], Proposal] | None = None
        self._notes: list[str] = []  # surprises that the next event will mention
        self._took_s = 0.0  # per step of the newest round; 0 once it was compared with its plan
        self._usual = 1.0  # measured over predicted step, with links newly measured

    def state(self) -> dict[str, Any]:
        """Returns what the rounds so far have taught, as plain data.

        The newest proposal is not in it: from the same facts comes the same one. Until then links are not measured again.
        """
        return {
            "chains": [[list(host) for host in chain] for chain in self._chains],
            "tokens": self._speeds.tokens,
            "position_s": [[*key, seconds] for key, seconds in self._speeds.position_s.items()],
            "by_relay": [list(pair) for pair in sorted(self._speeds.by_relay)],
            "notes": list(self._notes),
            "took_s": self._took_s,
            "usual": self._usual,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes what `state` returned."""
        self._chains = tuple(tuple((node, last) for node, last in chain) for chain in state["chains"])
        self._speeds = Speeds(
            tokens=state["tokens"],
            position_s={(node, pair): seconds for node, pair, seconds in state["position_s"]},
            by_relay=frozenset((one, other) for one, other in state["by_relay"]),
        )
        self._notes, self._took_s, self._usual = list(state["notes"]), state["took_s"], state["usual"]

    def layout(
        self, number: int, devices: Sequence[pb.Profile], hosts: Sequence[pb.Profile], shares: Mapping[str, float] = {}
    ) -> Layout:
        """Returns the layout of round `number`. Raises what `make_layout` does, and DoesNotFit with what would fit."""
        check_memory_for_fronts(self.spec, devices)
        if self.config.split.cuts != "auto" or not self.config.split.hosts:
            return make_layout(self.spec, devices, hosts)
        proposal = self.propose(devices, hosts, shares)
        notes, self._notes = self._notes, []
        self.emit(proposal.event(number, notes))
        self._chains = tuple(cost.chain for cost in proposal.chains)
        addresses = {host.name: host.address for host in hosts}
        chains = [
            [HostRange(host.node, addresses[host.node], host.first, host.last) for host in cost.hosts]
            for cost in proposal.chains
        ]
        layout = layout_of_chains(self.spec, [device.name for device in devices], chains)
        bases = {host.node: split_pair(host.base) for cost in proposal.chains for host in cost.hosts}
        return replace(layout, bases=bases)

    def propose(
        self, devices: Sequence[pb.Profile], hosts: Sequence[pb.Profile], shares: Mapping[str, float] = {}
    ) -> Proposal:
        """Returns the chains for the next round, with the largest window that memory allows.

        A host grants a smaller window itself if its memory requires that, so a smaller one is better than none.
        """
        for window in range(self.config.pieces.window, 0, -1):
            instances = self._instances(devices, hosts, shares, window)
            if self._newest and self._newest[0] == instances:
                return replace(self._newest[1], reason="nothing has changed", changed=False)
            try:
                new = [best_chain(instance, hosts_wanted(self.config)) for instance in instances]
            except DoesNotFit as error:
                if window > 1:
                    continue
                nearest = nearest_that_fits(self.spec, devices, hosts)
                raise DoesNotFit(f"no split fits: {error}. {nearest}", error.missing_bytes) from error
            break
        proposal = self._chosen(instances, new, window)
        self._newest = instances, proposal
        return proposal

    def observe(self, plans: Mapping[str, pb.Plan], reports: Mapping[str, pb.JobReport]) -> None:
        """Learns from a round: times, the length of examples, links over the relay, and how long steps took."""
        if self.config.split.cuts != "auto":
            return
        newest = self._newest[0] if self._newest else ()
        planned, workers = planned_times(newest), planned_workers(newest)
        self._speeds, notes = learned(self.spec, self._speeds, planned, plans, reports, workers)
        self._notes += notes
        self._took_s = step_seconds(reports.values())

    def check_links(
        self, devices: Sequence[pb.Profile], hosts: Sequence[pb.Profile], shares: Mapping[str, float],
        measure: Callable[[], None],
    ) -> None:  # fmt: skip
        """Calls `measure` if the newest round's steps took a time that is far off the predicted one.

        A round shows the time of layers, but of links only that steps took longer or shorter than predicted. `measure` has
        nodes measure their links again and changes the profiles. A difference that remains counts as usual from then on,
        so that links are not measured in every round.
        """
        if not self._took_s or self._newest is None:
            return
        window = self._newest[1].window
        ratio = self._took_over_predicted(self._instances(devices, hosts, shares, window))
        if near(ratio, 1.0):
            self._usual = 1.0
        elif not near(ratio, self._usual):
            self._notes.append(f"a step took {ratio:.1f} times as long as predicted, so links were measured again")
            measure()
            self._usual = self._took_over_predicted(self._instances(devices, hosts, shares, window))
        self._took_s = 0.0  # a second attempt at the round may have other cuts, which these steps do not describe

    def _instances(
        self, devices: Sequence[pb.Profile], hosts: Sequence[pb.Profile], shares: Mapping[str, float], window: int
    ) -> list[SiteInstance]:
        maker = InstanceMaker(self._footprints, self._speeds, [*devices, *hosts], window, shares)
        return maker.of_sites(devices, hosts)

    def _chosen(self, instances: Sequence[SiteInstance], new: Sequence[ChainCost], window: int) -> Proposal:
        tokens = self._speeds.tokens
        if not self._chains:
            return Proposal(tuple(new), window, tokens)
        chains, reason = keep_or_change(self._in_use(instances), new)
        changed = tuple(cost.chain for cost in chains) != self._chains
        return Proposal(tuple(chains), window, tokens, reason, changed)

    def _in_use(self, instances: Sequence[SiteInstance]) -> list[ChainCost] | None:
        """Returns what the chains in use would cost now; None if one of them is no longer possible."""
        if len(self._chains) != len(instances):
            return None
        count = hosts_wanted(self.config)
        if count is not None and any(len(chain) != count for chain in self._chains):
            return None
        everyone = tuple(host for instance in instances for host in instance.hosts)
        costs = [
            cost_of(replace(instance, hosts=everyone), chain)
            for instance, chain in zip(instances, self._chains, strict=True)
        ]
        possible = [cost for cost in costs if cost is not None]
        return possible if len(possible) == len(costs) else None

    def _took_over_predicted(self, instances: Sequence[SiteInstance]) -> float:
        """Returns the newest round's step over the one predicted now; 1 if the difference does not matter."""
        costs = self._in_use(instances)
        if costs is None:
            return 1.0
        predicted_s = longest_step_s(costs)
        matters = abs(self._took_s - predicted_s) * self.config.federation.local_steps > _MEASURING_S
        return self._took_s / predicted_s if matters else 1.0


def keep_or_change(
    old: Sequence[ChainCost] | None, new: Sequence[ChainCost], gain: float = GAIN
) -> tuple[Sequence[ChainCost], str]:
    """Returns the chains of all sites to use, and why: the new ones only if a step is more than `gain` faster.

    `old` is what the chains in use cost now; None if one of them is no longer possible.
    """
    if old is None:
        return new, "the old plan is no longer possible"
    if [cost.chain for cost in old] == [cost.chain for cost in new]:
        return new, "as before"
    faster = longest_step_s(old) / longest_step_s(new) - 1
    if faster > gain:
        return new, f"{faster:.0%} faster than the old plan"
    return old, f"a new plan would be {faster:.0%} faster, which is not more than {gain:.0%}"


def longest_step_s(chains: Iterable[ChainCost]) -> float:
    """Returns the step of the slowest site, for which all others wait."""
    return max(cost.step_s for cost in chains)


def step_seconds(reports: Iterable[pb.JobReport]) -> float:
    """Returns the slowest device's median step; 0 if none is known. The first step of a round may take longer."""
    usual = []
    for report in reports:
        seconds = [step.seconds for step in report.steps if step.counted and 0 < step.seconds < math.inf]
        usual += [median_low(seconds)] if seconds else []
    return max(usual, default=0.0)


def _described(cost: ChainCost) -> SitePlaced:
    return SitePlaced(
        hosts=tuple(NodePlaced(**asdict(host)) for host in cost.hosts),
        devices=tuple(NodePlaced(**asdict(device)) for device in cost.devices),
        step_s=round(cost.step_s, 4),
        limit=cost.limit,
        memory_limit=cost.memory_limit,
        left_out=tuple(cost.left_out),
    )


# ---------------------------------------------------------------- before a run


def first_proposal(spec: RunSpec, profiles: Sequence[pb.Profile]) -> Proposal:
    """Returns what a run of all these nodes would begin with. Cuts that the run file gives are costed, not changed.

    Raises ConfigError if the run file splits nothing, RunFailed if nodes are missing, DoesNotFit if memory is.
    """
    split = spec.config.split
    devices = sorted((p for p in profiles if p.role == pb.DEVICE), key=lambda device: device.name)
    hosts = who_may_host(spec.config, profiles)
    if not split.hosts:
        raise ConfigError("split.hosts = 0: each device trains the whole model, and there is nothing to plan")
    if not devices:
        raise RunFailed("no device is among the nodes, so nobody would train; a node with data is a device (role)")
    check_memory_for_fronts(spec, devices)
    if split.cuts == "auto":
        return Placement(spec).propose(devices, hosts)
    layout = make_layout(spec, devices, hosts)
    maker = InstanceMaker(Footprints(spec), before_rounds(spec.config), [*devices, *hosts], spec.config.pieces.window)
    chains = []
    for site in layout.sites:
        members = [device for device in devices if device.name in site.members]
        names = [host.name for host in site.hosts]
        instance = maker.of_site(members, [host for host in hosts if host.name in names])
        cost = cost_of(instance, tuple((host.name, host.last) for host in site.hosts))
        if cost is None:
            raise shortage(instance, len(names)) or DoesNotFit(
                f"the slices of site {site.name} do not fit its hosts; with split.cuts = 'auto' they would"
            )
        chains.append(cost)
    reason = f"split.cuts = {split.cuts if split.cuts == 'equal' else list(split.cuts)}"
    return Proposal(tuple(chains), maker.window, maker.speeds.tokens, reason)
