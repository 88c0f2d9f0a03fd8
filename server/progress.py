"""What a failed attempt leaves to the next attempt at its round: the snapshots that its nodes keep, so that no step is done twice.

The next attempt goes on from the newest step that all nodes of a site have, if each of them is to do the same work as before
(`edgelam_fl.plan.resuming`). Knows nothing about what a snapshot holds.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median_low

from edgelam_fl.plan.layout import Site
from edgelam_fl.plan.resuming import can_resume, newest_common, place
from edgelam_fl.wire import edgelam_pb2 as pb
from server.kept import HubKept
from server.state import PlannedRound

Kept = Sequence[pb.StepSnapshot]


@dataclass(frozen=True, slots=True)
class Progress:
    """The newest attempt at a round, and what is kept of the round so far."""

    plans: Mapping[str, pb.Plan] = field(default_factory=dict)
    """Of the attempt, by node; empty: this is the first one."""
    sites: Sequence[Site] = ()
    """Of the attempt."""
    kept: Mapping[str, Kept] = field(default_factory=dict)
    """The snapshots of each node, as it reported last."""

    def after(self, planned: PlannedRound, kept: Mapping[str, Kept], *, by_chance: bool) -> Progress:
        """Returns what an attempt leaves that failed; `by_chance`: because a host vanished. An attempt that went on from snapshots and
        failed for another reason leaves nothing: the next one begins again.
        """
        went_on = any(plan.first_step for plan in planned.plans.values())
        if went_on and not by_chance:
            return FROM_THE_START
        return Progress(planned.plans, planned.layout.sites, {**self.kept, **kept})

    def newcomers(self, here: Collection[str], least: int) -> dict[str, str]:
        """Returns why devices sit the next attempt out, by name: those that are as far as most of them go on alone if they are enough.

        A device that left the last attempt early, or was not in it, would take all of them back.
        """
        if not self.plans:
            return {}
        steps = {name: max(one.steps for one in self.kept[name]) for name in here if self.kept.get(name)}
        if not steps:
            return {}
        furthest, interval = median_low(steps.values()), max(p.snapshot_every for p in self.plans.values())
        go_on = {name for name, done in steps.items() if done >= furthest - interval}
        if len(go_on) < max(1, least):
            return {}
        return {name: f"the others go on from step {furthest}" for name in here if name not in go_on}

    def go_on(self, plans: Mapping[str, pb.Plan], sites: Sequence[Site], hub: HubKept) -> dict[str, bytes]:
        """Has the nodes of each site go on from the newest step that all of them have, if there is one.

        Returns what nodes are lent for that, by name: a host that takes a lost one's place has what the `hub` kept of it.
        """
        lent: dict[str, bytes] = {}
        if not self.plans:
            return lent
        for site in sites:
            before = self._site_before(site)
            old, new = _plans(self.plans, before), _plans(plans, site)
            if before is None or not can_resume(old, new):
                continue
            lost = {
                plan.node: before_it for plan in new if (before_it := _host_before(plan, old, self.kept)) is not None
            }
            at_hub = {name: hub.steps(plan) for name, plan in lost.items()}
            if common := newest_common(at_hub.get(plan.node, self.kept.get(plan.node, ())) for plan in new):
                lent |= {name: hub.states(plan, common) for name, plan in lost.items()}
                for plan in new:
                    plan.first_step, plan.resume_attempt = common.steps, common.attempt
        return lent

    def _site_before(self, site: Site) -> Site | None:
        return next((one for one in self.sites if set(site.members) <= set(one.members)), None)


FROM_THE_START = Progress()


def _host_before(plan: pb.Plan, before: Sequence[pb.Plan], kept: Mapping[str, Kept]) -> pb.Plan | None:
    """Returns the plan of the host whose snapshots a host needs, since it has none itself; None: it has, or is a device."""
    if plan.routes or not plan.serves or kept.get(plan.node):
        return None
    return next((old for old in before if place(old) == place(plan)), None)


def _plans(plans: Mapping[str, pb.Plan], site: Site | None) -> list[pb.Plan]:
    if site is None:
        return []
    return [plans[name] for name in site.nodes if name in plans]
