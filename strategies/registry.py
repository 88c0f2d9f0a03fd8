"""Finds strategies by the names of a run file, checks their options, and reads once what each of them can do.

The only place that asks a strategy for its optional attributes and methods. Knows nothing about rounds or nodes.
A new built-in strategy is one file and one line in `BUILT_IN`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from edgelam_fl.bounds import DEFAULT_BOUNDS, Bounds
from edgelam_fl.errors import ConfigError, nearest
from edgelam_fl.plan.making import ClientSettings
from strategies.api import Aggregation, Bandwidth, Remembers, RoundOutcome, Selection
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
        "over_the_air": "strategies.aggregation.over_the_air:OverTheAir",
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
        "poisson": "strategies.selection.poisson:PoissonSelection",
        "lyapunov": "strategies.selection.lyapunov:LyapunovSelection",
    },
    "bandwidth": {
        "uniform": "strategies.bandwidth.uniform:Uniform",
        "proportional": "strategies.bandwidth.proportional:Proportional",
        "equalise": "strategies.bandwidth.equalise:Equalise",
        "lyapunov": "strategies.bandwidth.lyapunov:LyapunovBandwidth",
    },
}
FLOWERS = "flwr.serverapp.strategy"
"""The module whose classes a run file may name as aggregations, besides the built-in ones."""
_PROTOCOLS: dict[str, type] = {"aggregation": Aggregation, "selection": Selection, "bandwidth": Bandwidth}
_METHODS = {"aggregation": "aggregate", "selection": "select", "bandwidth": "allocate"}


# ---------------------------------------------------------------- what a strategy can do


def _forget(outcome: RoundOutcome) -> None:
    """Ignores the outcome of a round: the `observe` of a strategy that has none."""


def _plain_training(round: int) -> ClientSettings:
    """Asks nothing of the nodes: the `client_settings` of an aggregation that has none."""
    return ClientSettings()


def _no_correction(source: str, names: Iterable[str]) -> Mapping[str, np.ndarray]:
    """Adds nothing to gradients: the `correction` of an aggregation that has none."""
    return {}


def _nothing() -> Mapping[str, Any]:
    """Returns an empty memory: the `state` of a strategy that has none."""
    return {}


def _as_new(state: Mapping[str, Any]) -> None:
    """Leaves a strategy as it is: the `restore` of one that has none."""


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """A strategy's abilities beyond the one method of its kind; `strategies.api` documents each name.

    A strategy that lacks an attribute or a method gets the default given here.
    """

    state: Callable[[], Mapping[str, Any]] = _nothing
    restore: Callable[[Mapping[str, Any]], None] = _as_new
    observe: Callable[[RoundOutcome], None] = _forget
    client_settings: Callable[[int], ClientSettings] = _plain_training
    correction: Callable[[str, Iterable[str]], Mapping[str, np.ndarray]] = _no_correction
    unequal_ranks: bool = False
    carries: bool = False
    restarts_factors: bool = False
    factors_alone: bool = False
    personal: bool = False
    corrects_sgd: bool = False
    needs_only_mean: bool = False
    takes_late: bool = False
    least_sources: int = 1
    most_carry_rank: int = 0
    ignores_data: bool = False
    sampling_rate: float = 0.0


@dataclass(frozen=True)
class LoadedStrategy:
    """A strategy of a run: the rule is the author's object, and the capabilities say what else may be asked of it."""

    rule: Any
    capabilities: Capabilities


def with_capabilities(rule: Any) -> LoadedStrategy:
    """Reads the capabilities of a rule. Raises ConfigError for an attribute of another type than its default."""
    given = {field.name: getattr(rule, field.name) for field in fields(Capabilities) if _says(rule, field.name)}
    for field in fields(Capabilities):
        if field.name in given:
            _check_capability(field.name, given[field.name], field.default)
    if given.get("corrects_sgd") and "correction" not in given:
        raise ConfigError("corrects_sgd = True needs a method correction(source, names)")
    for name, method in (("needs_only_mean", "aggregate"), ("takes_late", "aggregate"), ("ignores_data", "select")):
        given[name] = _says_with(type(rule), name, method)
    return LoadedStrategy(rule, Capabilities(**given))


def _says(rule: Any, name: str) -> bool:
    """Returns whether a rule has an attribute that is more than the default which the protocol gives it."""
    if not hasattr(rule, name):
        return False
    value, default = getattr(rule, name), {**vars(Remembers), **vars(Selection), **vars(Aggregation)}.get(name, rule)
    return value is not default and getattr(value, "__func__", value) is not default


def _check_capability(name: str, value: Any, default: Any) -> None:
    if callable(default):
        fits, wanted = callable(value), "a method"
    elif isinstance(default, bool):
        fits, wanted = isinstance(value, bool), "True or False"
    elif isinstance(default, float):
        fits, wanted = isinstance(value, float) and 0 <= value <= 1, "a probability"
    else:
        fits, wanted = isinstance(value, int) and not isinstance(value, bool) and value >= 0, "a number of 0 or more"
    if not fits:
        raise ConfigError(f"its {name} = {value!r:.60} must be {wanted}")


def _says_with(rule: type, name: str, method: str) -> bool:
    """Returns what a class says of its `method`, if the class that says so also defines the method in use: a subclass that
    overrides the method may do otherwise.
    """
    for known in rule.__mro__:
        if name in vars(known):
            return bool(vars(known)[name])
        if method in vars(known):
            return False
    return False


# ---------------------------------------------------------------- by name


def load(
    kind: str, name: str, options: Mapping[str, Mapping[str, Any]] | None = None, bounds: Bounds = DEFAULT_BOUNDS
) -> LoadedStrategy:
    """Makes the named strategy with its options of the run file, and reads its capabilities.

    `bounds`: the modules that a class of the user's own may come from. Raises ConfigError with the known strategies, with
    the allowed modules, with what the class lacks, or with the option that cannot be used; a class that is not allowed or
    declares no strategy is never called.
    """
    found = _class(kind, name, bounds)
    key, given = _own_options(kind, name, found, options or {})
    values = checked(found, key, given)
    try:
        strategy = _flower_class(found, values) if _is_flowers(kind, found) else found(**values)
    except (ConfigError, ValueError) as error:  # the class itself refuses the options
        raise ConfigError(
            f"{key}: {error}" if values else f"strategy.{kind} = {name!r} cannot be loaded: {error}"
        ) from error
    except TypeError as error:
        raise ConfigError(f"strategy.{kind} = {name!r} cannot be loaded: {error}") from error
    try:
        return with_capabilities(strategy)
    except ConfigError as error:
        raise ConfigError(f"strategy.{kind} = {name!r} cannot be loaded: {error}") from error


def load_all(
    names: Mapping[str, str],
    options: Mapping[str, Mapping[str, Any]],
    bounds: Bounds = DEFAULT_BOUNDS,
    *,
    elsewhere: bool = False,
) -> dict[str, LoadedStrategy]:
    """Loads a strategy of each kind in `names`. Raises ConfigError also for options of a strategy that does not exist.

    elsewhere: the run takes place on another machine, whose operator may allow more. What is not allowed here is then not
    imported, and missing in the result.
    """
    loaded = {
        kind: load(kind, name, options, bounds)
        for kind, name in names.items()
        if not (elsewhere and _is_own(kind, name) and not _allowed(name, bounds))
    }
    known = {name for table in BUILT_IN.values() for name in table} | {
        name.rpartition(":")[2] for kind, name in names.items() if _is_own(kind, name)
    }
    for name in options:
        if name not in known:
            raise ConfigError(
                f"strategy.options.{name} belongs to no strategy: {nearest(name, known)} (a built-in's name, or that of the "
                f"class of your own that the run uses)"
            )
    for kind, table in BUILT_IN.items():  # unused strategies too: the next --set may use them
        for name in table.keys() & options.keys():
            load(kind, name, options)
    return loaded


def _is_own(kind: str, name: str) -> bool:
    """Returns whether a name is that of a class which is not built in, as package.module:Class."""
    return name not in BUILT_IN[kind] and ":" in name


def _allowed(name: str, bounds: Bounds) -> bool:
    """Returns whether a class of the user's own may be imported; a built-in class may be named by its module too."""
    built_in = (path for table in BUILT_IN.values() for path in table.values())
    module = name.partition(":")[0]
    return name in built_in or module == FLOWERS or bounds.allows_module(module)


def _is_flowers(kind: str, found: type) -> bool:
    """Returns whether a class is an aggregation of Flower's kind, its own or one that inherits from it. Imports nothing."""
    return kind == "aggregation" and any(
        known.__module__ == f"{FLOWERS}.strategy" and known.__name__ == "Strategy" for known in found.__mro__
    )


def _flower_class(found: type, options: Mapping[str, Any]) -> Aggregation:
    from strategies.aggregation.flower import FlowerClass  # brings Flower

    return FlowerClass(found, options)


def _class(kind: str, name: str, bounds: Bounds = DEFAULT_BOUNDS) -> type:
    """Returns the named class once it is known to declare the protocol of its kind; imports what is allowed only."""
    path = BUILT_IN[kind].get(name, name)
    module_name, colon, class_name = path.partition(":")
    if not colon:
        package, dot, last = name.rpartition(".")
        meant = f"did you mean '{package}:{last}'?" if dot else nearest(name, BUILT_IN[kind])
        raise ConfigError(f"strategy.{kind} = {name!r} is not known; {meant}; your own is named package.module:Class")
    if not _allowed(path, bounds):
        raise ConfigError(
            f"strategy.{kind} = {name!r} is not imported: on this machine strategies may come from {bounds}. The operator of a "
            f"server allows more with `edgelam server --strategies PACKAGE`; `edgelam run --local` and `edgelam bench` take modules "
            f"in the directory where they are typed"
        )
    try:
        module = importlib.import_module(module_name)
        if module_name == FLOWERS and class_name not in module.__all__:
            raise AttributeError(f"Flower has no strategy {class_name!r}; {nearest(class_name, module.__all__)}")
        found = getattr(module, class_name)
    except (ImportError, AttributeError, ValueError, TypeError, SyntaxError) as error:
        raise ConfigError(f"strategy.{kind} = {name!r} cannot be loaded: {error}") from error
    if not isinstance(found, type):
        raise ConfigError(f"strategy.{kind} = {name!r} cannot be loaded: it is a {type(found).__name__}, not a class")
    protocol, method = _PROTOCOLS[kind], _METHODS[kind]
    own = getattr(found, method, None)
    if _is_flowers(kind, found):
        return found
    if protocol not in found.__mro__ or own is getattr(protocol, method) or not callable(own):
        raise ConfigError(
            f"strategy.{kind} = {name!r} is not a strategy for {kind}: its class must inherit from strategies.api."
            f"{protocol.__name__} and have a method {method}() of its own"
        )
    return found


def _own_options(
    kind: str, name: str, found: type, options: Mapping[str, Mapping[str, Any]]
) -> tuple[str, Mapping[str, Any]]:
    """Returns (key in the run file, options of the strategy).

    Strategies of two kinds may share a name and its section of options: each takes the options that it knows.
    """
    label = name if name in BUILT_IN[kind] else found.__name__
    given = options.get(label, {})
    others = [other for other, table in BUILT_IN.items() if other != kind and name in table and name in BUILT_IN[kind]]
    of_others = {option for other in others for option in parameters(_class(other, name))}
    own = {option: value for option, value in given.items() if option in parameters(found) or option not in of_others}
    return f"strategy.options.{label}", own
