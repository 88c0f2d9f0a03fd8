"""What a strategy sees and returns: plain data, so that a test needs no network.

A strategy is a class; built-in ones have short names (the tables below), any other is named `package.module:Class` in the
run file. Its arguments are keywords with defaults: the run file's `strategy.options`, under the strategy's short name or
its class's name. One is made for a run, so it may remember; whatever it decides by chance comes from `RoundState.random`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Protocol

import numpy as np

from edgelam_fl.errors import ConfigError, nearest
from strategies.options import checked, parameters

BUILT_IN = {
    "aggregation": {
        "fedavg": "strategies.aggregation.fedavg:FedAvg",
        "none": "strategies.aggregation.none:NoAggregation",
        "ffa": "strategies.aggregation.ffa:FfaLora",
        "rolora": "strategies.aggregation.rolora:RoLora",
        "flexlora": "strategies.aggregation.flexlora:FlexLora",
        "hetlora": "strategies.aggregation.hetlora:HetLora",
        "flora": "strategies.aggregation.flora:FLoRA",
        "fedex": "strategies.aggregation.fedex:FedEx",
        "fedsa": "strategies.aggregation.fedsa:FedSa",
        "fedprox": "strategies.aggregation.fedprox:FedProx",
        "scaffold": "strategies.aggregation.scaffold:Scaffold",
        "fedadam": "strategies.aggregation.flower:FedAdam",
        "fedyogi": "strategies.aggregation.flower:FedYogi",
        "fedadagrad": "strategies.aggregation.flower:FedAdagrad",
        "fedavgm": "strategies.aggregation.flower:FedAvgM",
        "fedmedian": "strategies.aggregation.flower:FedMedian",
        "fedtrimmedavg": "strategies.aggregation.flower:FedTrimmedAvg",
        "krum": "strategies.aggregation.flower:Krum",
        "multikrum": "strategies.aggregation.flower:MultiKrum",
    },
    "selection": {
        "all": "strategies.selection.all:SelectAll",
        "random": "strategies.selection.random:RandomSelection",
        "round_robin": "strategies.selection.round_robin:RoundRobin",
        "best_channel": "strategies.selection.best_channel:BestChannel",
        "power_of_choice": "strategies.selection.power_of_choice:PowerOfChoice",
        "oort": "strategies.selection.oort:Oort",
        "fedcs": "strategies.selection.fedcs:FedCS",
        "tifl": "strategies.selection.tifl:TiFL",
        "lyapunov": "strategies.selection.lyapunov:LyapunovSelection",
    },
    "bandwidth": {
        "uniform": "strategies.bandwidth.uniform:Uniform",
        "proportional": "strategies.bandwidth.proportional:Proportional",
        "equalise": "strategies.bandwidth.equalise:Equalise",
        "lyapunov": "strategies.bandwidth.lyapunov:LyapunovBandwidth",
    },
}
_METHODS = {"aggregation": "aggregate", "selection": "select", "bandwidth": "allocate"}


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


# ---------------------------------------------------------------- aggregation


@dataclass(frozen=True)
class ClientSettings:
    """What an aggregation asks of devices and hosts in a round; by default, plain training of both factors."""

    train_a: bool = True
    train_b: bool = True
    prox_mu: float = 0.0  # weight of (mu/2)||w - w_start||^2 in the loss of devices' own layers and copies


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
    restarts: bool = False  # whether it starts factors anew
    personal: bool = False  # whether sources go on with tensors of their own (`Aggregated.personal`)
    corrects_sgd: bool = False  # whether it adds to the gradients of sources that train by plain SGD (`correction`)
    least_sources: int = 1  # fewer sources of a module than this (but for a single one) cannot be aggregated
    of_the_mean: bool = (
        False  # whether it asks for no more than the weighted mean: large rounds are then summed on arrival
    )

    def aggregate(self, contributions: Sequence[Contribution], start: Start) -> Aggregated:
        """Raises TooFewSources where a module has fewer sources than the rule needs."""
        ...

    def client_settings(self, round: int) -> ClientSettings:
        """What devices and hosts must do in this round (the first is 1)."""
        return ClientSettings()

    def correction(self, source: str, names: Iterable[str]) -> Mapping[str, np.ndarray]:
        """What `source` adds to the gradient of each step of the coming round, of the `names` that have any."""
        return {}


def asked_by(aggregation: Any, round: int) -> ClientSettings:
    """What an aggregation asks of the nodes in a round, also where its class does not say."""
    return aggregation.client_settings(round) if hasattr(aggregation, "client_settings") else ClientSettings()


# ---------------------------------------------------------------- by name


def load(kind: str, name: str, options: Mapping[str, Mapping[str, Any]] | None = None) -> Any:
    """An instance of the named strategy, with its part of the run file's `strategy.options`.

    A module of the user's own is found on Python's path and in the working directory. Raises ConfigError naming the known
    strategies, what the module lacks, or the option that cannot be used.
    """
    found = _class(kind, name)
    key, given = _own_options(kind, name, found, options or {})
    values = checked(found, key, given)
    try:
        strategy = found(**values)
    except (ConfigError, ValueError) as error:  # options that the class itself refuses
        raise ConfigError(
            f"{key}: {error}" if values else f"strategy.{kind} = {name!r} cannot be loaded: {error}"
        ) from error
    except TypeError as error:
        raise ConfigError(f"strategy.{kind} = {name!r} cannot be loaded: {error}") from error
    if not callable(getattr(strategy, _METHODS[kind], None)):
        raise ConfigError(f"strategy.{kind} = {name!r} has no method {_METHODS[kind]}(); it is no {kind} strategy")
    return strategy


def load_all(names: Mapping[str, str], options: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The strategies by kind. Raises ConfigError too where options are for none of these, and for no built-in one."""
    loaded = {kind: load(kind, name, options) for kind, name in names.items()}
    known = {name for table in BUILT_IN.values() for name in table} | {type(s).__name__ for s in loaded.values()}
    for name in options:
        if name not in known:
            raise ConfigError(
                f"strategy.options.{name} is for no strategy: {nearest(name, known)} (a built-in's name, or that of the "
                f"class of your own that the run uses)"
            )
    for kind, table in BUILT_IN.items():  # also of those that are not in use: they may be with the next --set
        for name in table.keys() & options.keys():
            load(kind, name, options)
    return loaded


def _class(kind: str, name: str) -> type:
    path = BUILT_IN[kind].get(name, name)
    module_name, colon, class_name = path.partition(":")
    if not colon:
        raise ConfigError(
            f"strategy.{kind} = {name!r} is not known; {nearest(name, BUILT_IN[kind])}; your own is named package.module:Class"
        )
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # last: nothing of the user's takes the place of what is installed
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError, TypeError, SyntaxError) as error:
        raise ConfigError(f"strategy.{kind} = {name!r} cannot be loaded: {error}") from error
    if not isinstance(found, type):
        raise ConfigError(f"strategy.{kind} = {name!r} cannot be loaded: it is a {type(found).__name__}, not a class")
    return found


def _own_options(
    kind: str, name: str, found: type, options: Mapping[str, Mapping[str, Any]]
) -> tuple[str, Mapping[str, Any]]:
    """(key in the run file, options). Strategies of two kinds may share a name and its options: each takes its own."""
    label = name if name in BUILT_IN[kind] else found.__name__
    given = options.get(label, {})
    others = [other for other, table in BUILT_IN.items() if other != kind and name in table and name in BUILT_IN[kind]]
    of_others = {option for other in others for option in parameters(_class(other, name))}
    own = {option: value for option, value in given.items() if option in parameters(found) or option not in of_others}
    return f"strategy.options.{label}", own
