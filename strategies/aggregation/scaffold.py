"""SCAFFOLD (arXiv 1910.06378): each step of plain SGD is corrected by how a source's gradient differs from everyone's.

    y <- y - eta_l (g - c_i + c)    c_i+ = c_i - c + (x - y) / (K eta_l)    x += eta_g mean (y - x)    c = mean c_i

Devices add c - c_i to their gradients, in their own layers and in their copies on hosts. Unlike in the paper, c_i is kept here,
by the name of the source, since x, y and the learning rates of the steps are known here: the numbers are the same, nothing is
lost with a device, and K eta_l is the exact sum of the rates that a source used. This costs the size of an adapter per round and
device downwards, and memory for one adapter per source here. Means are weighted by labels, as in FedAvg; with equal weights they
are the means of the paper. N counts the sources that have trained a tensor so far: a new source starts with c_i = 0. If only one
source trains a tensor, such as a joint site, c - c_i is 0 and nothing is sent; several sites are corrected like devices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from strategies.aggregation.factors import in_order
from strategies.aggregation.fedavg import FedAvg, WeightedMean
from strategies.api import Aggregated, Aggregation, Contribution, Start

_ZERO = np.float32(0)


class Scaffold(Aggregation):
    corrects_sgd = True

    def __init__(self, *, eta_g: Annotated[float, Field(gt=0, le=100)] = 1.0) -> None:
        """`eta_g`: size of the server's step towards the mean of the sources; 1 takes the mean itself."""
        self.eta_g = eta_g
        self._own: dict[str, dict[str, Contribution]] = {}  # c_i per source and tensor, each with its newest weight
        self._common: Mapping[str, np.ndarray] = {}  # c

    def state(self) -> Mapping[str, Any]:
        own = {
            source: {name: {"weight": one.weight, "control": one.tensors[name]} for name, one in controls.items()}
            for source, controls in self._own.items()
        }
        return {"own": own, "common": self._common}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._common = dict(state["common"])
        self._own = {
            source: {
                name: Contribution(source, one["weight"], {name: one["control"]}) for name, one in controls.items()
            }
            for source, controls in state["own"].items()
        }

    def aggregate(self, contributions: Sequence[Contribution], start: Start) -> Aggregated:
        new = FedAvg().aggregate(contributions, start).tensors
        for contribution in contributions:
            if contribution.lr_sum:
                self._renew(contribution, start)
        self._common = self._mean()
        return Aggregated(
            new if self.eta_g == 1 else {name: self._step(start.tensors[name], new[name]) for name in new}
        )

    def correction(self, source: str, names: Iterable[str]) -> Mapping[str, np.ndarray]:
        found = {name: self._common[name] - self._control(source, name) for name in names if name in self._common}
        return {name: array for name, array in found.items() if array.any()}

    def _renew(self, contribution: Contribution, start: Start) -> None:
        """Updates c_i by option II of the paper's algorithm 1."""
        source, own = contribution.source, self._own.setdefault(contribution.source, {})
        for name, y in contribution.tensors.items():
            mean_step = (start.tensors[name] - y.astype(np.float64)) / contribution.lr_sum
            control = self._control(source, name) - self._common.get(name, _ZERO) + mean_step
            own[name] = Contribution(source, contribution.weight, {name: control.astype(np.float32)})

    def _control(self, source: str, name: str) -> np.ndarray | np.float32:
        known = self._own.get(source, {}).get(name)
        return known.tensors[name] if known is not None else _ZERO

    def _mean(self) -> dict[str, np.ndarray]:
        mean = WeightedMean()
        for control in in_order(control for own in self._own.values() for control in own.values()):
            mean.add(control)
        return mean.result()

    def _step(self, x: np.ndarray, mean: np.ndarray) -> np.ndarray:
        return np.asarray(x + self.eta_g * (mean - x.astype(np.float64)), np.float32)
