"""FedAvg on LoRA factors (FedIT, arXiv 2305.05644): A = sum p_k A_k and B = sum p_k B_k, p_k over a module's sources.

Inexact as an average of the products B_k A_k, and the baseline everywhere. A module with one source keeps its bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from edgelam_fl.errors import ConfigError
from strategies.aggregation.factors import in_order, is_factor
from strategies.api import Aggregated, Aggregation, Contribution, Start


class FedAvg(Aggregation):
    needs_only_mean = True

    def aggregate(self, contributions: Sequence[Contribution], start: Start) -> Aggregated:
        mean = WeightedMean()
        for contribution in in_order(contributions):
            mean.add(contribution)
        return Aggregated(mean.result())


def mean_of_heads(contributions: Sequence[Contribution]) -> dict[str, np.ndarray]:
    """The weighted mean of what is no factor (a task's head): every rule for factors needs it besides."""
    mean = WeightedMean()
    for contribution in in_order(contributions):
        heads = {name: array for name, array in contribution.tensors.items() if not is_factor(name)}
        mean.add(replace(contribution, tensors=heads))
    return mean.result()


class WeightedMean:
    """Takes contributions as they arrive and keeps their sums alone: in float64, the size of two of them.

    The order of arrival can change a sum's last float64 bit, and so a rounded fp32 value once in some hundred million.
    """

    def __init__(self) -> None:
        self._sums: dict[str, np.ndarray] = {}
        self._weights: dict[str, float] = {}

    def add(self, contribution: Contribution) -> None:
        """Raises ConfigError where a tensor is shaped otherwise than that of an earlier source."""
        for name, array in contribution.tensors.items():
            weighted = array * np.float64(contribution.weight)
            known = self._sums.get(name)
            if known is None:
                self._sums[name] = weighted
                self._weights[name] = contribution.weight
                continue
            if known.shape != array.shape:
                raise ConfigError(
                    f"this aggregation needs equal ranks: {name} is {list(array.shape)} of {contribution.source} and "
                    f"{list(known.shape)} of others; strategy.aggregation = 'flora', 'fedex', 'flexlora' or 'hetlora' take unequal ones"
                )
            known += weighted
            self._weights[name] += contribution.weight

    def merge(self, other: WeightedMean) -> None:
        """Adds what another one took; that must not be used any more."""
        for name, total in other._sums.items():
            if name in self._sums:
                self._sums[name] += total
            else:
                self._sums[name] = total
            self._weights[name] = self._weights.get(name, 0.0) + other._weights[name]

    def by_weight(self) -> Iterator[tuple[float, dict[str, np.ndarray]]]:
        """The mean of the tensors of each total weight."""
        result = self.result()
        for weight in sorted(set(self._weights.values())):
            yield weight, {name: array for name, array in result.items() if self._weights[name] == weight}

    def result(self) -> dict[str, np.ndarray]:
        """The mean of each tensor over its sources, in fp32."""
        return {name: (total / self._weights[name]).astype(np.float32) for name, total in self._sums.items()}
