"""Where layers go with split.cuts = "auto": what is known of the nodes becomes a plan, the plan becomes a layout.

`node_costs` has the numbers, `split.planner` finds the plan. Layers move between rounds, where a new plan wins clearly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median_low
from typing import Any

from edgelam_fl.errors import ConfigError, DoesNotFit, RunFailed
from edgelam_fl.plan.chain_cost import Chain, Plan
from edgelam_fl.plan.layout import HostRange, Layout, lay_out, make_layout, who_may_host
from edgelam_fl.plan.search import best_plan, choose, rated
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.plan.speeds import Costs, Problem, near, split_pair
from edgelam_fl.plan.what_fits import nearest_that_fits
from edgelam_fl.wire import edgelam_pb2 as pb

GAIN = 0.1  # a new plan must be so much faster than the old one
_MEASURING_S = 2.0  # about what measuring the links takes: a difference of less in a round is not worth it


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

    def __init__(self, spec: RunSpec, emit: Callable[..., None] = lambda *_, **__: None) -> None:
        self.spec, self.config, self.emit = spec, spec.config, emit
        self._costs = Costs(spec)
        self._chains: tuple[Chain, ...] = ()
        self._newest: tuple[list[Problem], Proposal] | None = None
        self._notes: list[str] = []
        self._took_s = 0.0  # a step of the newest round
        self._usual = 1.0  # times as long as foreseen, with links newly measured

    def layout(
        self, number: int, devices: Sequence[pb.Profile], hosts: Sequence[pb.Profile], shares: Mapping[str, float] = {}
    ) -> Layout:
        """Of round `number`. Raises as `make_layout` does, and DoesNotFit with what would fit."""
        if self.config.split.cuts != "auto" or not self.config.split.hosts:
            return make_layout(self.spec, devices, hosts)
        proposal = self.propose(devices, hosts, shares)
        notes, self._notes = self._notes, []
        self.emit("placement", round=number, **proposal.event(), measured=notes)
        self._chains = tuple(plan.chain for plan in proposal.plans)
        addresses = {host.name: host.address for host in hosts}
        chains = [
            [HostRange(part.node, addresses[part.node], part.first, part.last) for part in plan.hosts]
            for plan in proposal.plans
        ]
        layout = lay_out(self.spec, [device.name for device in devices], chains)
        bases = {part.node: split_pair(part.base) for plan in proposal.plans for part in plan.hosts}
        return replace(layout, bases=bases)

    def propose(
        self, devices: Sequence[pb.Profile], hosts: Sequence[pb.Profile], shares: Mapping[str, float] = {}
    ) -> Proposal:
        """The plan to go on with. With the largest window that memory allows: a host too grants less where it must."""
        for window in range(self.config.split.window, 0, -1):
            problems = self._costs.problems(devices, hosts, shares, window)
            if self._newest and self._newest[0] == problems:
                return replace(self._newest[1], reason="nothing has changed", changed=False)
            try:
                new = [best_plan(problem.run, problem.members, problem.hosts, self._count) for problem in problems]
            except DoesNotFit as error:
                if window > 1:
                    continue
                nearest = nearest_that_fits(self.spec, devices, hosts)
                raise DoesNotFit(f"no split fits: {error}. {nearest}", error.missing_bytes) from error
            break
        proposal = self._chosen(problems, new, window)
        self._newest = problems, proposal
        return proposal

    @property
    def _count(self) -> int | None:
        return None if self.config.split.hosts == "auto" else self.config.split.hosts

    def _chosen(self, problems: Sequence[Problem], new: Sequence[Plan], window: int) -> Proposal:
        tokens = self._costs.tokens
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

    def observe(self, plans: Mapping[str, pb.Plan], reports: Mapping[str, pb.JobReport]) -> None:
        """What a round showed: see `Costs.observe`; and how long its steps took."""
        if self.config.split.cuts != "auto":
            return
        self._notes += self._costs.observe(plans, reports)
        self._took_s = step_seconds(reports.values())

    def check_links(
        self, devices: Sequence[pb.Profile], hosts: Sequence[pb.Profile], shares: Mapping[str, float],
        measure: Callable[[], None],
    ) -> None:  # fmt: skip
        """Has nodes `measure` their links anew where the newest round's steps are not explained by what is known of them.

        Of layers each round tells; of links it tells only that the steps took another time than these can take. `measure`
        changes the profiles. What stays unexplained then is taken to be usual, so that nothing is measured round by round.
        """
        if not self._took_s or self._newest is None:
            return
        window = self._newest[1].window
        ratio = self._unexplained(self._costs.problems(devices, hosts, shares, window))
        if near(ratio, 1.0):
            self._usual = 1.0
        elif not near(ratio, self._usual):
            self._notes.append(f"a step took {ratio:.1f} times as long as was foreseen, so links were measured anew")
            measure()
            self._usual = self._unexplained(self._costs.problems(devices, hosts, shares, window))
        self._took_s = 0.0  # a second attempt at the round may have other cuts, which these steps say nothing of

    def _unexplained(self, problems: Sequence[Problem]) -> float:
        """How many times as long the newest round's steps took as its plan says today; 1 where it is no matter."""
        plans = self._old(problems)
        if plans is None:
            return 1.0
        foreseen_s = max(plan.step_s for plan in plans)
        matters = abs(self._took_s - foreseen_s) * self.config.federation.local_steps > _MEASURING_S
        return self._took_s / foreseen_s if matters else 1.0


def step_seconds(reports: Iterable[pb.JobReport]) -> float:
    """The usual step of the slowest device; 0 where none is known. The first step of a round may take longer."""
    usual = []
    for report in reports:
        seconds = [step.seconds for step in report.steps if step.counted and 0 < step.seconds < math.inf]
        usual += [median_low(seconds)] if seconds else []
    return max(usual, default=0.0)


def _described(plan: Plan) -> dict[str, Any]:
    return {
        "hosts": [asdict(part) for part in plan.hosts], "devices": [asdict(part) for part in plan.devices],
        "step_s": round(plan.step_s, 4), "limit": plan.limit, "memory_limit": plan.memory_limit,
        "left_out": list(plan.left_out),
    }  # fmt: skip


# ---------------------------------------------------------------- before a run


def foresee(spec: RunSpec, profiles: Sequence[pb.Profile]) -> Proposal:
    """What a run of all these nodes would begin with; also of cuts that are given, rated as the planner rates its own."""
    config = spec.config
    devices = sorted((p for p in profiles if p.role == pb.DEVICE), key=lambda device: device.name)
    hosts = who_may_host(config, profiles)
    if not config.split.hosts:
        raise ConfigError("split.hosts = 0: each device trains the whole model, and there is nothing to plan")
    if not devices:
        raise RunFailed("no device is among the nodes, so nobody would train; a node with data is a device (role)")
    if config.split.cuts == "auto":
        return Placement(spec).propose(devices, hosts)
    layout = make_layout(spec, devices, hosts)
    costs, plans = Costs(spec), []
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
