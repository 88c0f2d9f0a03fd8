"""Flower's server optimizers and robust rules, used unchanged: its classes get stand-ins for replies and return arrays.

An optimizer (Reddi et al., arXiv 2003.00295) gets one reply per module, the weighted mean, and keeps its state per module: a
module that nobody trained in a round keeps its state, and nodes may hold different modules. A robust rule gets one reply per
source and is called once per block (modules with the same sources), on the factors A and B themselves: the median of factors is
not the median of their products; with `freeze_a` it is, since only B is trained then. Devices do nothing special for either.

Any other class of Flower's kind, its own or one that inherits from it, is used by its path as a `FlowerClass`, with Flower's own options.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any

import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy.fedopt import FedOpt
from pydantic import Field

from edgelam_fl.errors import ConfigError, TooFewSources
from edgelam_fl.plan.making import ClientSettings
from strategies.aggregation.factors import in_order, module_of
from strategies.aggregation.fedavg import FedAvg
from strategies.api import Aggregated, Aggregation, Contribution, Start

Tensors = Mapping[str, np.ndarray]
Positive = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Malicious = Annotated[int, Field(ge=0)]
_MEMORY = (
    "m_t",
    "v_t",
    "momentum_vector",
)  # what Flower's optimizers keep from step to step: arrays by name, or in order


# ---------------------------------------------------------------- optimizers


class _Optimizer(Aggregation):
    """A rule that takes the weighted mean as a step and applies it with an optimizer on the server."""

    needs_only_mean = True

    def __init__(self, flowers: type, **options: float) -> None:
        self._flowers, self._options = flowers, options
        self._of_module: dict[str, tuple[Any, int]] = {}  # Flower's object, and the number of its steps

    def state(self) -> Mapping[str, Any]:
        return {
            module: {"steps": steps, **{name: getattr(optimizer, name) for name in _MEMORY if hasattr(optimizer, name)}}
            for module, (optimizer, steps) in self._of_module.items()
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        for module, memory in state.items():
            optimizer = self._flowers(**self._options)
            for name in memory.keys() - {"steps"}:
                setattr(optimizer, name, memory[name])
            self._of_module[module] = optimizer, memory["steps"]

    def aggregate(self, contributions: Sequence[Contribution], start: Start) -> Aggregated:
        modules: dict[str, dict[str, np.ndarray]] = {}
        for name, array in FedAvg().aggregate(contributions, start).tensors.items():
            modules.setdefault(module_of(name), {})[name] = array
        new: dict[str, np.ndarray] = {}
        for module, mean in sorted(modules.items()):
            new |= self._step(module, mean, {name: start.tensors[name] for name in mean})
        return Aggregated(new)

    def _step(self, module: str, mean: Tensors, current: Tensors) -> Tensors:
        optimizer, used = self._of_module.get(module, (None, 0))
        optimizer = optimizer or self._flowers(**self._options)
        self._of_module[module] = optimizer, used + 1
        # Flower sets this in configure_train, which needs a grid that we cannot give.
        optimizer.current_arrays = _record(current) if self._flowers is flower.FedAvgM else dict(current)
        return _aggregate(optimizer, used + 1, [_Reply(mean, 1.0)])


class FedAdam(_Optimizer):
    def __init__(
        self, *, eta: Positive = 0.01, beta_1: Decay = 0.9, beta_2: Decay = 0.99, tau: Positive = 1e-3
    ) -> None:
        """Flower's FedAdam with its bias correction; the default `eta` is a tenth of Flower's, since LoRA factors are small. In our
        ranking (docs/benchmarks.md) Flower's own 0.1 learned much faster: try both.

        `eta`: size of a step. `beta_1`, `beta_2`: decay of the moments. `tau`: updates below this size make smaller steps.
        """
        super().__init__(flower.FedAdam, eta=eta, beta_1=beta_1, beta_2=beta_2, tau=tau)


class FedYogi(_Optimizer):
    def __init__(
        self, *, eta: Positive = 0.01, beta_1: Decay = 0.9, beta_2: Decay = 0.99, tau: Positive = 1e-3
    ) -> None:
        """Options as in FedAdam, `eta` being Flower's own; the second moment grows and shrinks slowly, and there is no bias correction."""
        super().__init__(flower.FedYogi, eta=eta, beta_1=beta_1, beta_2=beta_2, tau=tau)


class FedAdagrad(_Optimizer):
    def __init__(self, *, eta: Positive = 1e-3, tau: Positive = 1e-3) -> None:
        """`eta`: size of a step; the default is a hundredth of Flower's, since no moment slows the first steps and LoRA factors
        are small. `tau`: updates below this size make smaller steps.
        """
        super().__init__(flower.FedAdagrad, eta=eta, tau=tau)


class FedAvgM(_Optimizer):
    def __init__(self, *, learning_rate: Positive = 1.0, momentum: Decay = 0.9) -> None:
        """`learning_rate`: size of the server's step. `momentum`: share of the previous step that is kept; 0 gives FedAvg."""
        super().__init__(flower.FedAvgM, server_learning_rate=learning_rate, server_momentum=momentum)


# ---------------------------------------------------------------- robust rules


class _Robust(Aggregation):
    """A rule that tolerates some lying sources. Modules that only one source trained keep its tensors."""

    def __init__(self, flowers: Any, least_sources: int, freeze_a: bool) -> None:
        self._flowers, self.least_sources, self._freeze_a = flowers, least_sources, freeze_a

    def client_settings(self, round: int) -> ClientSettings:
        return ClientSettings(train_a=not self._freeze_a)

    def aggregate(self, contributions: Sequence[Contribution], start: Start) -> Aggregated:
        new: dict[str, np.ndarray] = {}
        for names, sources in _blocks(contributions):
            if len(sources) == 1:
                new |= {name: sources[0].tensors[name] for name in names}
                continue
            _check_enough(self.least_sources, names, sources, type(self).__name__)
            # In float64: Krum's distances are small differences of large sums.
            replies = [
                _Reply({n: source.tensors[n].astype(np.float64) for n in names}, source.weight) for source in sources
            ]
            new |= _aggregate(self._flowers, 1, replies)
        return Aggregated(new)


class FedMedian(_Robust):
    def __init__(self, *, freeze_a: bool = False) -> None:
        """`freeze_a`: only B learns, as in FFA-LoRA, so that factors can be compared like updates."""
        super().__init__(flower.FedMedian(), 3, freeze_a)


class FedTrimmedAvg(_Robust):
    def __init__(self, *, beta: Annotated[float, Field(ge=0.01, lt=0.5)] = 0.2, freeze_a: bool = False) -> None:
        """`beta`: share of the sources that is cut off at both ends, for every number. `freeze_a`: only B learns."""
        super().__init__(flower.FedTrimmedAvg(beta=beta), _least_trimmed(beta), freeze_a)


class Krum(_Robust):
    def __init__(self, *, malicious: Malicious = 1, freeze_a: bool = False) -> None:
        """`malicious`: number of sources that may lie; 2 malicious + 3 are needed. `freeze_a`: only B learns."""
        super().__init__(flower.Krum(num_malicious_nodes=malicious), 2 * malicious + 3, freeze_a)


class MultiKrum(_Robust):
    def __init__(
        self,
        *,
        malicious: Malicious = 1,
        selected: Annotated[int, Field(ge=1)] = 3,
        freeze_a: bool = False,
    ) -> None:
        """`malicious`: number of sources that may lie. `selected`: number of the best that are averaged, weighted by their labels as
        in Flower; in the paper (arXiv 1703.02757) their mean is plain, so that a liar that is chosen weighs no more than others.
        `freeze_a`: only B learns.
        """
        least = max(2 * malicious + 3, selected + malicious)
        rule = flower.MultiKrum(num_malicious_nodes=malicious, num_nodes_to_select=selected)
        super().__init__(rule, least, freeze_a)


def _least_trimmed(beta: float) -> int:
    """Returns the number of sources of which a share `beta` is at least one."""
    return next((sources for sources in range(3, 101) if int(beta * sources) >= 1), 3)


def _check_enough(least: int, names: Sequence[str], sources: Sequence[Contribution], rule: str) -> None:
    if len(sources) < least:
        raise TooFewSources(
            f"this aggregation ({rule}) needs at least {least} sources, and {names[0]} has {len(sources)}: "
            f"{', '.join(source.source for source in sources)}"
        )


def _blocks(contributions: Sequence[Contribution]) -> Iterator[tuple[list[str], list[Contribution]]]:
    """Yields each group of names that the same sources trained, with these sources in order."""
    sources: dict[str, list[Contribution]] = {}
    for contribution in in_order(contributions):
        for name in contribution.tensors:
            sources.setdefault(name, []).append(contribution)
    blocks: dict[tuple[str, ...], list[str]] = {}
    for name, of_name in sorted(sources.items()):
        shapes = {source.tensors[name].shape for source in of_name}
        if len(shapes) > 1:
            raise ConfigError(f"this aggregation needs equal ranks: {name} has shapes {sorted(shapes)}")
        blocks.setdefault(tuple(source.source for source in of_name), []).append(name)
    for names in blocks.values():
        yield names, [_joined(names, of_source) for of_source in _by_source(names, sources)]


def _by_source(names: Sequence[str], sources: Mapping[str, list[Contribution]]) -> Iterator[list[Contribution]]:
    """Yields the contributions of each source to these names; a source has several if its layers differ in weight."""
    for position in range(len(sources[names[0]])):
        yield [sources[name][position] for name in names]


def _joined(names: Sequence[str], contributions: Sequence[Contribution]) -> Contribution:
    tensors = {name: one.tensors[name] for name, one in zip(names, contributions, strict=True)}
    return Contribution(contributions[0].source, max(one.weight for one in contributions), tensors)


# ---------------------------------------------------------------- any class of Flower's kind

_NO_ADAPTERS = {  # Flower's classes that aggregate something else, or by something that a contribution does not have
    flower.QFedAvg: "it weighs sources by their losses, which an aggregation does not get here",
    flower.FedXgbBagging: "it aggregates trees, and an adapter has none",
    flower.FedXgbCyclic: "it hands trees on, and an adapter has none",
    flower.DifferentialPrivacyClientSideAdaptiveClipping: "privacy.mode of the run file is differential privacy here",
    flower.DifferentialPrivacyClientSideFixedClipping: "privacy.mode of the run file is differential privacy here",
    flower.DifferentialPrivacyServerSideAdaptiveClipping: "privacy.mode of the run file is differential privacy here",
    flower.DifferentialPrivacyServerSideFixedClipping: "privacy.mode of the run file is differential privacy here",
}
_NOBODY = "nothing here reads it"
_ELSEWHERE = {  # options of Flower's classes for what they are not asked for here, and what has their place
    "fraction_train": "strategy.selection and federation.devices_per_round choose devices",
    "fraction_evaluate": "every device evaluates; federation.evaluate_every says how often",
    "min_train_nodes": "federation.min_nodes says how many devices a round needs",
    "min_evaluate_nodes": "every device evaluates; federation.evaluate_every says how often",
    "min_available_nodes": "federation.expect_nodes says for how many devices a run waits",
    "weighted_by_key": "task.weighting says by what sources are weighted",
    "eta_l": "optimizer.lr is the devices' learning rate",
    **dict.fromkeys(
        ("arrayrecord_key", "configrecord_key", "train_metrics_aggr_fn", "evaluate_metrics_aggr_fn"), _NOBODY
    ),
}


class FlowerClass(Aggregation):
    """A class of Flower's kind as an aggregation: of its methods, `aggregate_train` is called, and no other.

    It gets one reply per source. A server optimizer (FedOpt, FedAvgM) keeps its memory per tensor, as nodes may hold different ones;
    any other class is called once per block, and keeps its memory per block.
    """

    def __init__(self, flowers: type, options: Mapping[str, Any]) -> None:
        """`flowers`: the class. Raises ConfigError for one that cannot aggregate adapters, and for an option without effect here."""
        for known, why in _NO_ADAPTERS.items():
            if issubclass(flowers, known):
                raise ConfigError(f"{known.__name__} cannot aggregate adapters: {why}")
        for name in options:
            if name in _ELSEWHERE:
                raise ConfigError(f"{name} has no effect here: {_ELSEWHERE[name]}")
        self._make = partial(flowers, **options)
        with _quiet():
            self._new = self._make()
        self.least_sources = _least_sources(self._new)
        self._per_tensor = isinstance(self._new, FedOpt | flower.FedAvgM)
        self._of_unit: dict[str, tuple[Any, int]] = {}  # Flower's object, and the number of its steps

    def client_settings(self, round: int) -> ClientSettings:
        return ClientSettings(prox_mu=self._new.proximal_mu if isinstance(self._new, flower.FedProx) else 0.0)

    def state(self) -> Mapping[str, Any]:
        return {unit: {"steps": steps, "memory": self._memory(rule)} for unit, (rule, steps) in self._of_unit.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        for unit, saved in state.items():
            rule = self._fresh()
            vars(rule).update(saved["memory"])
            self._of_unit[unit] = rule, saved["steps"]

    def aggregate(self, contributions: Sequence[Contribution], start: Start) -> Aggregated:
        new: dict[str, np.ndarray] = {}
        for names, sources in _blocks(contributions):
            if len(sources) == 1 and self.least_sources > 1:
                new |= {name: sources[0].tensors[name] for name in names}
                continue
            _check_enough(self.least_sources, names, sources, type(self._new).__name__)
            for unit in [[name] for name in names] if self._per_tensor else [names]:
                new |= self._step(unit, sources, start)
        return Aggregated(new)

    def _step(self, names: Sequence[str], sources: Sequence[Contribution], start: Start) -> Tensors:
        unit = "\n".join(names)
        rule, used = self._of_unit.get(unit) or (self._fresh(), 0)
        self._of_unit[unit] = rule, used + 1
        if self._per_tensor:  # Flower sets this in configure_train, which needs a grid that we cannot give
            current = {name: start.tensors[name].astype(np.float64) for name in names}
            rule.current_arrays = _record(current) if isinstance(rule, flower.FedAvgM) else current
        replies = [
            _Reply({name: source.tensors[name].astype(np.float64) for name in names}, source.weight)
            for source in sources
        ]
        number = used + 1 if self._per_tensor else max(1, start.round)
        return _aggregate(rule, number, replies)

    def _fresh(self) -> Any:
        with _quiet():
            return self._make()

    def _memory(self, rule: Any) -> dict[str, Any]:
        """Returns the attributes that a rule has changed since it was made; what no checkpoint can hold is refused there."""
        as_new = vars(self._new)
        return {
            name: value
            for name, value in vars(rule).items()
            if name != "current_arrays" and not _is_same(value, as_new.get(name))
        }


def _is_same(value: Any, other: Any) -> bool:
    plain = isinstance(value, bool | int | float | str) and type(value) is type(other)
    return value is other or (plain and bool(value == other))


def _least_sources(rule: Any) -> int:
    """Returns how many sources a rule of Flower's needs, so that what it is for holds."""
    if isinstance(rule, flower.Bulyan):
        return int(4 * rule.num_malicious_nodes + 3)
    if isinstance(rule, flower.MultiKrum):  # Krum too
        return int(max(2 * rule.num_malicious_nodes + 3, rule.num_nodes_to_select + rule.num_malicious_nodes))
    if isinstance(rule, flower.FedTrimmedAvg):
        return _least_trimmed(rule.beta)
    return 3 if isinstance(rule, flower.FedMedian) else 1


# ---------------------------------------------------------------- as Flower sees it


class _Reply:
    """A stand-in with what Flower's classes read of a Message; a real Message needs a running ServerApp."""

    def __init__(self, tensors: Tensors, weight: float) -> None:
        self.content = RecordDict({"arrays": _record(tensors), "metrics": MetricRecord({"num-examples": weight})})

    def has_error(self) -> bool:
        return False


def _record(tensors: Tensors) -> ArrayRecord:
    return ArrayRecord({name: Array(np.ascontiguousarray(array)) for name, array in tensors.items()})


def _aggregate(flowers: Any, number: int, replies: Sequence[_Reply]) -> dict[str, np.ndarray]:
    with _quiet():
        record, _ = flowers.aggregate_train(number, replies)
    if record is None:
        raise TooFewSources(f"{type(flowers).__name__} of Flower made nothing of {len(replies)} sources")
    return {name: array.numpy().astype(np.float32) for name, array in record.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences Flower's log, which has a line per call and so per module."""
    log = logging.getLogger("flwr")
    before = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(before)
