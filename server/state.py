"""The values that a round turns into each other: the state before it, its plan, what came back, its outcome.

All are frozen, and none knows how the next is made: see `server.rounds`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from flwr.app import ArrayRecord

from edgelam_fl.flower import record_bytes
from edgelam_fl.model.adapter import Adapter
from edgelam_fl.plan.layout import Layout, hosts_of, site_source
from edgelam_fl.plan.making import RoundFacts
from edgelam_fl.wire import edgelam_pb2 as pb
from server.best import Best
from server.global_adapter import StartingPoints
from server.holdings import Holdings, NodeHoldings
from server.replies import Reply
from server.schedule import Lineup
from strategies.api import Aggregated, Contribution


@dataclass(frozen=True, slots=True, kw_only=True)
class FederationState:
    """A run's state after its last finished round: all that the next round needs to know of earlier ones
    (beside what strategies and the placement remember).
    """

    round: int = 0
    """The last finished round."""
    step_offset: int = 0
    """Optimizer steps in the finished rounds."""
    adapter: Adapter = field(default_factory=dict)
    """The global adapter. Lacks the modules that no plan has named yet."""
    personal: Mapping[str, Adapter] = field(default_factory=dict)
    """Per source, the tensors that the source starts from instead of the global ones."""
    sites: Mapping[str, str] = field(default_factory=dict)
    """Per device that ever delivered, the newest site that it was a member of, as a source."""
    holdings: Holdings = field(default_factory=Holdings)
    best: Best | None = None
    """What the evaluations so far have shown; None before the first."""

    def after(self, outcome: Outcome) -> FederationState:
        """Returns the state after an attempt at a round. Without an aggregate, only the holdings change."""
        holdings = self.holdings.after(outcome.received.holdings)
        if outcome.aggregated is None:
            return replace(self, holdings=holdings)
        planned, received, new = outcome.planned, outcome.received, outcome.aggregated
        adapter = {**planned.start.adapter, **new.tensors, **new.carry}
        personal = {name: {**self.personal.get(name, {}), **tensors} for name, tensors in new.personal.items()}
        sites = {name: site_source(planned.layout.site_of(name).name) for name in received.devices}
        return FederationState(
            round=planned.facts.round,
            step_offset=self.step_offset + planned.facts.steps,
            adapter={name: np.array(array, order="C") for name, array in adapter.items()},  # holds no reply's bytes
            personal={**self.personal, **personal},  # a source that took no part keeps its own
            sites={**self.sites, **sites},
            holdings=holdings,
            best=self.best,
        )

    @property
    def hosts(self) -> frozenset[str]:
        """The hosts of the sites that devices were members of last: they hold what the next round starts from, and its moments."""
        return frozenset(name for site in self.sites.values() for name in hosts_of(site))

    def exports(self) -> dict[str, Adapter]:
        """Returns, per device, the tensors that it goes on with instead of the global ones: its own and its site's.

        Includes every device that ever delivered: what a device shares may change in rounds without it.
        """
        own = {
            name: {**self.personal.get(site, {}), **self.personal.get(name, {})} for name, site in self.sites.items()
        }
        return {name: tensors for name, tensors in own.items() if tensors}


@dataclass(frozen=True, slots=True)
class Parcel:
    """The tensors that go to one node beside its plan."""

    adapter: ArrayRecord | None
    """The tensors of its starting point that the node lacks; None: it holds exactly its starting point."""
    corrections: tuple[ArrayRecord, ...] = ()
    """One per correction that the plan names, in that order."""
    snapshot: bytes = b""
    """KeptStates of the host whose place the node takes; empty: it has its own snapshot, or needs none."""

    @property
    def size_bytes(self) -> int:
        """Bytes of all arrays on the wire."""
        return sum(map(record_bytes, self.corrections)) + (
            record_bytes(self.adapter) if self.adapter is not None else 0
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRound:
    """One attempt at a round, or the evaluation after the last round: each node's plan and starting point."""

    facts: RoundFacts
    lineup: Lineup
    layout: Layout
    plans: Mapping[str, pb.Plan]
    """By node, hosts first."""
    start: FederationState
    """The state before the round, with the start of each module that its adapter lacked."""
    starts: StartingPoints
    """Of the adapter of `start`."""
    parcels: Mapping[str, Parcel]
    """By node."""
    sums_on_arrival: bool
    """Whether replies are summed up as they arrive, and their tensors let go."""
    began_s: float
    """By the clock of the server's `ExchangeTiming`."""
    supplied_bytes: Mapping[str, int] = field(default_factory=dict)
    """Bytes of the arrays that nodes were sent later, as they asked for them."""

    @property
    def received_bytes(self) -> dict[str, int]:
        """Bytes of the arrays that each node was sent."""
        return {name: parcel.size_bytes + self.supplied_bytes.get(name, 0) for name, parcel in self.parcels.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """The replies of a round's nodes."""

    replies: Mapping[str, Reply]
    """Usable replies, by node; of a large round without their tensors."""
    problems: Mapping[str, str]
    """Why there is no usable reply, by node."""
    codes: Mapping[str, str]
    """The kind of each of these problems, as in `edgelam_fl.errors`, as far as it is known."""
    silent: frozenset[str]
    """The nodes that did not reply at all."""
    broken: Mapping[str, Sequence[str]]
    """The hosts without a usable reply, by site. Nothing of these sites counts."""
    left_out: Mapping[str, str]
    """Why a usable contribution does not count, by source: its update is far larger than the others'."""
    spoilers: Mapping[str, str]
    """Why devices are not trusted with which others have trained one adapter: what these trained is spoiled as well."""
    devices: Sequence[str]
    """The devices whose contributions count: with a usable reply, in sites that are whole."""
    contributions: Sequence[Contribution]
    """What counts, per source and weight; of a large round the mean, per weight."""
    holdings: Mapping[str, NodeHoldings | None]
    """The holdings of each planned node; None: unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The result of a training round."""

    planned: PlannedRound
    received: Received
    aggregated: Aggregated | None = None
    """None: too few devices or sources, and the round has to be tried again."""
    error: float | None = None
    """The aggregate's error against the mean of the sources' products; None: not computed."""
    problem: str = ""
    """Why the contributions could not be aggregated, if that was tried."""
    spoiled: bool = False
    """Whether the round has to be done again without those who spoiled it."""
