"""What a strategy sees and returns: plain data, so that a test needs no network.

A strategy is a class that takes no arguments. Built-in ones have short names (the tables below); any other is named
`package.module:Class` in the run file.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Protocol

import numpy as np

from edgelam_fl.errors import ConfigError, nearest

BUILT_IN = {
    "aggregation": {
        "fedavg": "strategies.aggregation.fedavg:FedAvg",
        "none": "strategies.aggregation.none:NoAggregation",
        "ffa": "strategies.aggregation.ffa:FfaLora",
        "rolora": "strategies.aggregation.rolora:RoLora",
        "flexlora": "strategies.aggregation.flexlora:FlexLora",
        "hetlora": "strategies.aggregation.hetlora:HetLora",
        "fedprox": "strategies.aggregation.fedprox:FedProx",
        "fedadam": "strategies.aggregation.flower:FedAdam",
        "fedyogi": "strategies.aggregation.flower:FedYogi",
        "fedadagrad": "strategies.aggregation.flower:FedAdagrad",
        "fedavgm": "strategies.aggregation.flower:FedAvgM",
        "fedmedian": "strategies.aggregation.flower:FedMedian",
        "fedtrimmedavg": "strategies.aggregation.flower:FedTrimmedAvg",
        "krum": "strategies.aggregation.flower:Krum",
        "multikrum": "strategies.aggregation.flower:MultiKrum",
    },
    "selection": {"all": "strategies.selection.all:SelectAll"},
    "bandwidth": {"uniform": "strategies.bandwidth.uniform:Uniform"},
}


# ---------------------------------------------------------------- selection


@dataclass(frozen=True)
class Candidate:
    """A device that could take part in the coming round."""

    name: str
    examples: int
    last_loss: float | None = None  # mean a label; None: never trained


@dataclass(frozen=True)
class RoundState:
    round: int
    candidates: Sequence[Candidate]
    random: Random  # seeded by run and round; the only source of chance


@dataclass(frozen=True)
class Selected:
    names: Sequence[str]
    why: Mapping[str, str] = field(default_factory=dict)  # a reason for each candidate, chosen or not


class Selection(Protocol):
    def select(self, state: RoundState) -> Selected: ...


# ---------------------------------------------------------------- bandwidth


@dataclass(frozen=True)
class Demand:
    """What one device has to move in the coming round."""

    name: str
    payload_bytes: float
    compute_s: float


class Bandwidth(Protocol):
    def allocate(self, demands: Sequence[Demand], capacity_bps: float) -> Mapping[str, float]:
        """Shares of the capacity, each in [0, 1], at most 1 together."""
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


@dataclass(frozen=True)
class Start:
    """The global adapter that the round started from, each module in the largest rank of those who hold it."""

    tensors: Mapping[str, np.ndarray]
    scales: Mapping[str, float] = field(default_factory=dict)  # module -> s in this rank; 1 where none is named


@dataclass(frozen=True)
class Aggregated:
    tensors: Mapping[str, np.ndarray]  # the new values of every contributed name, shaped as in the start
    personal: Mapping[str, Mapping[str, np.ndarray]] = field(
        default_factory=dict
    )  # source -> what it starts from instead


class Aggregation(Protocol):
    """How a round's contributions become the next round's adapter. To inherit from it is optional."""

    unequal_ranks: bool = False  # whether sources of one module may differ in rank
    least_sources: int = 1  # fewer sources of a module than this (but for a single one) cannot be aggregated

    def aggregate(self, contributions: Sequence[Contribution], start: Start) -> Aggregated:
        """Raises TooFewSources where a module has fewer sources than the rule needs."""
        ...

    def client_settings(self, round: int) -> ClientSettings:
        """What devices and hosts must do in this round (the first is 1)."""
        return ClientSettings()


def asked_by(aggregation: Any, round: int) -> ClientSettings:
    """What an aggregation asks of the nodes in a round, also where its class does not say."""
    return aggregation.client_settings(round) if hasattr(aggregation, "client_settings") else ClientSettings()


# ---------------------------------------------------------------- by name


def load(kind: str, name: str) -> Any:
    """An instance of the named strategy. Raises ConfigError naming the known ones or what the module lacks."""
    path = BUILT_IN[kind].get(name, name)
    module_name, colon, class_name = path.partition(":")
    if not colon:
        raise ConfigError(
            f"strategy.{kind} = {name!r} is not known; {nearest(name, BUILT_IN[kind])}; your own is named package.module:Class"
        )
    try:
        found = getattr(importlib.import_module(module_name), class_name)
        strategy = found()
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ConfigError(f"strategy.{kind} = {name!r} cannot be loaded: {error}") from error
    method = {"aggregation": "aggregate", "selection": "select", "bandwidth": "allocate"}[kind]
    if not callable(getattr(strategy, method, None)):
        raise ConfigError(f"strategy.{kind} = {name!r} has no method {method}(); it is no {kind} strategy")
    return strategy
