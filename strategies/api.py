"""The data that strategies take and return, and their methods: all that an author has to read. Knows no network.

A strategy is a class that inherits from `Selection`, `Bandwidth` or `Aggregation`; no other class is ever made or called. A
built-in one has a short name (`strategies.registry`), any other is named `package.module:Class` in the run file. The arguments of its `__init__` are keywords with defaults; the run file sets them in `strategy.options`, under the
short name or the name of the class. One object serves a whole run, so it may remember; what it remembers goes through `state`
and `restore` into each checkpoint, so that a run that is resumed goes on as if it had never stopped. All chance comes from
`RoundState.random`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Protocol

import numpy as np

from edgelam_fl.plan.making import ClientSettings

# ---------------------------------------------------------------- memory


class Remembers(Protocol):
    """What every strategy has; one that remembers nothing from round to round leaves both as they are."""

    def state(self) -> Mapping[str, Any]:
        """Returns all that the object has learned in the rounds so far, without its options.

        Allowed: None, bool, int, float, str, numpy arrays and numbers, lists, and dicts with str keys. Called after each round,
        once `observe` or `aggregate` have been.
        """
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes what `state` of an object with the same options returned, before the first round that this object serves.

        Tuples come back as lists, all else as it was, to the last bit.
        """
        del state  # by default there is nothing to remember


# ---------------------------------------------------------------- selection


@dataclass(frozen=True)
class Candidate:
    """A device that could take part in the coming round, and what is known about it. None means never measured."""

    name: str
    examples: int = 0
    last_loss: float | None = None  # mean loss per label over the steps of its last round
    squared_loss: float | None = None  # mean of the squared losses of these steps
    last_round: int = 0  # the newest round that it took part in; 0: none
    last_seconds: float | None = None  # time that this round took on the device
    compute_s: float = 0.0  # computing time per round; for a device never measured the mean of the others
    payload_bytes: float = 0.0  # bytes moved per round, both ways; for a device never measured an estimate
    rate_bps: float | None = None  # rate at which it sent tensors
    limit_bps: float | None = None  # limit of its own link, if that link was seen to slow it down
    snr: float | None = None  # over the whole band, if the capacity is a band in Hz (strategies.bandwidth.links)
    metric: float | None = None
    """Quality of the adapter on its held-out data, 0 to 1: accuracy, else 1 / perplexity; of a task of values 1 / (1 + loss)."""
    tags: frozenset[str] = frozenset()
    memory_bytes: int = 0  # free memory


@dataclass(frozen=True)
class RoundState:
    """The facts that a selection gets before a round."""

    round: int
    candidates: Sequence[Candidate]  # in an order that must not matter
    random: Random  # the only source of chance: seeded by run and round; with differential privacy nobody can repeat it
    capacity_bps: float = 0.0  # shared by the devices, each way; 0: no limit; in Hz if candidates have an snr
    wanted: int = 0  # number of devices to choose; 0: the strategy decides
    least: int = 1  # number of devices without which the round fails

    def by_name(self) -> list[Candidate]:
        """Returns the candidates sorted by name."""
        return sorted(self.candidates, key=lambda candidate: candidate.name)

    def at_most(self) -> int:
        """Returns how many devices to choose, for strategies that would take all."""
        return min(self.wanted or len(self.candidates), len(self.candidates))


@dataclass(frozen=True)
class Selected:
    """The devices that a selection chose."""

    names: Sequence[str]
    why: Mapping[str, str] = field(default_factory=dict)  # a reason for each candidate, chosen or not


@dataclass(frozen=True)
class RoundOutcome:
    """The events of a round, for strategies that remember."""

    round: int
    seconds: float  # until the last device had finished
    devices: Sequence[Candidate]  # devices that delivered, with what the round measured about them
    lost: Sequence[str] = ()  # names of the chosen devices that did not deliver


class Selection(Remembers, Protocol):
    """Chooses the devices of a round.

    A selection may also have `observe(outcome: RoundOutcome) -> None`, which is called after each round that succeeded.
    """

    ignores_data: bool = (
        False  # whether its choice depends on nothing that devices measured or computed from their data
    )
    sampling_rate: float = 0.0  # probability with which each candidate is chosen, by a coin of its own; 0: not so

    def select(self, state: RoundState) -> Selected:
        """Names candidates, each once, and gives a reason for each candidate."""
        ...


# ---------------------------------------------------------------- bandwidth


@dataclass(frozen=True)
class Demand:
    """One device's payload and compute in the coming round."""

    name: str
    payload_bytes: float
    compute_s: float
    limit_bps: float | None = None  # this and `snr`: as in a Candidate
    snr: float | None = None


class Bandwidth(Remembers, Protocol):
    """Shares the capacity out to the devices of a round. It may have `observe`, as a selection may."""

    def allocate(self, demands: Sequence[Demand], capacity_bps: float) -> Mapping[str, float]:
        """Returns each device's share of the capacity (as in a RoundState): in [0, 1], with a sum of at most 1."""
        ...


@dataclass(frozen=True)
class Contribution:
    """The tensors that one source trained in a round.

    A source is a device (its own layers; with copies also its adapters on hosts) or a site (the layers of its hosts). A source
    has a second contribution if fewer labels went through some of its layers.
    """

    source: str  # a device's name, or "site " and the names of its hosts
    weight: float  # number of labels trained in the round, or of examples (task.weighting)
    tensors: Mapping[str, np.ndarray]  # peft names -> fp32; without factors that were frozen
    scales: Mapping[str, float] = field(default_factory=dict)  # module -> s in W0 + s B A; 1 if a module is missing
    lr_sum: float = 0.0  # sum of the learning rates of its steps; 0: not known


@dataclass(frozen=True)
class Start:
    """The global adapter that a round started from, each module in the largest rank among its holders."""

    tensors: Mapping[str, np.ndarray]
    scales: Mapping[str, float] = field(default_factory=dict)  # module -> s in this rank; 1 if a module is missing
    seed: int = 0  # of the run
    round: int = 0


@dataclass(frozen=True)
class Aggregated:
    """The result of an aggregation over a round's contributions."""

    tensors: Mapping[str, np.ndarray]  # new values of every contributed name, shaped as in the start
    personal: Mapping[str, Mapping[str, np.ndarray]] = field(
        default_factory=dict
    )  # source -> tensors that it starts from instead
    carry: Mapping[str, np.ndarray] = field(default_factory=dict)  # new carry factors (edgelam_fl.model.carry), by name
    facts: Mapping[str, float] = field(default_factory=dict)  # more numbers for the round's event


class Aggregation(Remembers, Protocol):
    """Makes the next round's adapter of a round's contributions."""

    unequal_ranks: bool = False  # whether sources of one module may differ in rank
    carries: bool = False  # whether it gives modules carry factors
    restarts_factors: bool = False  # whether it gives modules new factors in every round
    factors_alone: bool = False  # whether what it promises is of s B A alone, and so not of DoRA (lora.use_dora)
    personal: bool = False  # whether sources continue with tensors of their own (`Aggregated.personal`)
    corrects_sgd: bool = False  # whether it adds to the gradients of sources that train by plain SGD (`correction`)
    least_sources: int = 1  # sources of a module that the rule needs, unless there is only one
    needs_only_mean: bool = False  # whether the weighted mean is enough: large rounds are then summed up on arrival
    takes_late: bool = False  # whether an update of the round before may be one of its contributions
    most_carry_rank: int = 0  # rank to which it cuts carry factors; 0: the full rank of a module

    def aggregate(self, contributions: Sequence[Contribution], start: Start) -> Aggregated:
        """Combines the contributions. Raises TooFewSources if a module has fewer sources than the rule needs."""
        ...

    def client_settings(self, round: int) -> ClientSettings:
        """Returns what devices and hosts must do in this round; the first round is 1."""
        return ClientSettings()

    def correction(self, source: str, names: Iterable[str]) -> Mapping[str, np.ndarray]:
        """Returns what `source` adds to the gradient of each step of the coming round, for those `names` that get something."""
        return {}
