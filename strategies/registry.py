"""Finds strategies by the names of a run file, and loads them with their options checked."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgelam_fl.errors import ConfigError, nearest
from edgelam_fl.plan.making import ClientSettings
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
