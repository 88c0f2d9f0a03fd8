"""What a strategy sees and returns: plain data, so that a test needs no network.

A strategy is a class; built-in ones have short names (the tables below), any other is named `package.module:Class` in the
run file. Its arguments are keywords with defaults: the run file's `strategy.options`, under the strategy's short name or
its class's name. One is made for a run, so it may remember; whatever it decides by chance comes from `RoundState.random`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

import numpy as np

from edgelam_fl.plan.making import ClientSettings

# ---------------------------------------------------------------- selection


@dataclass(frozen=True)
class Candidate:
    """A device that could take part in the coming round, and what is known of it. None: never measured."""

    name: str
    examples: int = 0
    last_loss: float | None = None  # mean a label over its last round's steps
    squared_loss: float | None = None  # mean of the squares of these steps' losses
    last_round: int = 0  # that it took part in; 0: in none
    last_seconds: float | None = None  # that its part of that round took
    compute_s: float = 0.0  # of a round; of one never measured as the others' mean
    payload_bytes: float = 0.0  # of a round, both ways; of one never measured as estimated
    rate_bps: float | None = None  # at which its tensors left it
    limit_bps: float | None = None  # beyond which its own link does not go, where that was seen to hold it up
    snr: float | None = None  # over the whole band, where the capacity is a band in Hz (strategies.bandwidth.links)
    metric: float | None = None  # of the adapter on its held-out data, 0 to 1: accuracy, else 1 / perplexity
    tags: frozenset[str] = frozenset()
    memory_bytes: int = 0


@dataclass(frozen=True)
class RoundState:
    round: int
    candidates: Sequence[Candidate]  # in any order, which must not matter
    random: Random  # seeded by run and round; the only source of chance
    capacity_bps: float = 0.0  # shared by the devices, each way; 0: no limit; a band in Hz where candidates have an snr
    wanted: int = 0  # devices; 0: as many as the strategy likes
    least: int = 1  # devices without which the round fails

    def by_name(self) -> list[Candidate]:
        return sorted(self.candidates, key=lambda candidate: candidate.name)

    def at_most(self) -> int:
        """How many to choose, for strategies that would take all."""
        return min(self.wanted or len(self.candidates), len(self.candidates))


@dataclass(frozen=True)
class Selected:
    names: Sequence[str]
    why: Mapping[str, str] = field(default_factory=dict)  # a reason for each candidate, chosen or not


@dataclass(frozen=True)
class RoundOutcome:
    """What became of a round, for strategies that remember."""

    round: int
    seconds: float  # until the last device was through with its part
    devices: Sequence[Candidate]  # those that delivered, with what the round measured of them
    lost: Sequence[str] = ()  # those that were chosen and did not


class Selection(Protocol):
    """It may have a method `observe(outcome: RoundOutcome) -> None` too: called after each round that succeeded."""

    def select(self, state: RoundState) -> Selected: ...


# ---------------------------------------------------------------- bandwidth


@dataclass(frozen=True)
class Demand:
    """What one device has to move in the coming round."""

    name: str
    payload_bytes: float
    compute_s: float
    limit_bps: float | None = None  # as a candidate's, and so is `snr`
    snr: float | None = None


class Bandwidth(Protocol):
    """It may have a method `observe`, as a selection."""

    def allocate(self, demands: Sequence[Demand], capacity_bps: float) -> Mapping[str, float]:
        """Shares of the capacity (as in a RoundState), each in [0, 1], at most 1 together."""
        ...


@dataclass(frozen=True)
class Contribution:
    """What one source trained in a round: a device (its own layers; with copies its adapters on hosts too), or a site
    (its hosts' layers). A source has a second contribution where fewer labels went through some of its layers.
    """

    source: str  # a device's name, or "site " and the names of its hosts
    weight: float  # labels trained in the round, or examples (task.weighting)
    tensors: Mapping[str, np.ndarray]  # peft names -> fp32; a factor that was frozen is not among them
    scales: Mapping[str, float] = field(default_factory=dict)  # module -> s in W0 + s B A; 1 where none is named
    lr_sum: float = 0.0  # of the learning rates of the steps that made it; 0: not known


@dataclass(frozen=True)
class Start:
    """The global adapter that the round started from, each module in the largest rank of those who hold it."""

    tensors: Mapping[str, np.ndarray]
    scales: Mapping[str, float] = field(default_factory=dict)  # module -> s in this rank; 1 where none is named
    seed: int = 0  # the run's
    round: int = 0


@dataclass(frozen=True)
class Aggregated:
    tensors: Mapping[str, np.ndarray]  # the new values of every contributed name, shaped as in the start
    personal: Mapping[str, Mapping[str, np.ndarray]] = field(
        default_factory=dict
    )  # source -> what it starts from instead
    carry: Mapping[str, np.ndarray] = field(default_factory=dict)  # new carry factors (edgelam_fl.model.carry), by name
    facts: Mapping[str, float] = field(default_factory=dict)  # what else the round's event tells


class Aggregation(Protocol):
    """How a round's contributions become the next round's adapter. To inherit from it is optional."""

    unequal_ranks: bool = False  # whether sources of one module may differ in rank
    carries: bool = False  # whether it gives modules carry factors
    restarts_factors: bool = False  # whether it gives modules new factors in every round
    personal: bool = False  # whether sources go on with tensors of their own (`Aggregated.personal`)
    corrects_sgd: bool = False  # whether it adds to the gradients of sources that train by plain SGD (`correction`)
    least_sources: int = 1  # fewer sources of a module than this (but for a single one) cannot be aggregated
    needs_only_mean: bool = False  # whether the weighted mean is enough: large rounds are then summed up on arrival
    most_carry_rank: int = 0  # to which it cuts carry factors; 0: a module's full rank

    def aggregate(self, contributions: Sequence[Contribution], start: Start) -> Aggregated:
        """Raises TooFewSources where a module has fewer sources than the rule needs."""
        ...

    def client_settings(self, round: int) -> ClientSettings:
        """What devices and hosts must do in this round (the first is 1)."""
        return ClientSettings()

    def correction(self, source: str, names: Iterable[str]) -> Mapping[str, np.ndarray]:
        """What `source` adds to the gradient of each step of the coming round, of the `names` that have any."""
        return {}
