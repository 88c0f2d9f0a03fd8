"""Flower's server optimizers and robust rules, used unchanged: its classes get stand-ins for replies and return arrays.

An optimizer (Reddi et al., arXiv 2003.00295) gets one reply per module, the weighted mean, and keeps its state per module: a
module that nobody trained in a round keeps its state, and nodes may hold different modules. A robust rule gets one reply per
source and is called once per block (modules with the same sources), on the factors A and B themselves: the median of factors is
not the median of their products; with `freeze_a` it is, since only B is trained then. Devices do nothing special for either.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
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
            if len(sources) < self.least_sources:
                raise TooFewSources(
                    f"this aggregation ({type(self).__name__}) needs at least {self.least_sources} sources, and {names[0]} has "
                    f"{len(sources)}: {', '.join(source.source for source in sources)}"
                )
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
        least = next(sources for sources in range(3, 101) if int(beta * sources) >= 1)
        super().__init__(flower.FedTrimmedAvg(beta=beta), least, freeze_a)


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
