"""FedAvg on LoRA factors (FedIT, arXiv 2305.05644): A = sum p_k A_k and B = sum p_k B_k, p_k over a module's sources.

Inexact as an average of the products B_k A_k, and the baseline of all comparisons. A module with one source keeps its bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from edgelam_fl.errors import ConfigError
from edgelam_fl.model.adapter import WIDE_BLOCK, Joined, blocks
from strategies.aggregation.factors import in_order, is_factor
from strategies.api import Aggregated, Aggregation, Contribution, Start


class FedAvg(Aggregation):
    """The weighted mean of every tensor over its sources."""

    needs_only_mean = True
    takes_late = True

    def aggregate(self, contributions: Sequence[Contribution], start: Start) -> Aggregated:
        mean = WeightedMean()
        for contribution in in_order(contributions):
            mean.add(contribution)
        return Aggregated(mean.result())


def mean_of_heads(contributions: Sequence[Contribution]) -> dict[str, np.ndarray]:
    """Returns the weighted mean of the tensors that are no factors (a task head), which every rule for factors needs too."""
    mean = WeightedMean()
    for contribution in in_order(contributions):
        heads = {name: array for name, array in contribution.tensors.items() if not is_factor(name)}
        mean.add(replace(contribution, tensors=heads))
    return mean.result()


class WeightedMean:
    """A weighted mean that takes contributions as they arrive and keeps only their sums, in float64.

    The order of arrival can change the last float64 bit of a sum, and so a rounded fp32 value about once in a hundred million.
    """

    def __init__(self) -> None:
        self._sums: dict[str, np.ndarray] = {}
        self._weights: dict[str, float] = {}
        self._joined: dict[tuple[object, ...], np.ndarray] = {}  # by layout, the memory that sums are views of

    def add(self, contribution: Contribution) -> None:
        """Adds a contribution. Raises ConfigError if one of its tensors differs in shape from an earlier source's."""
        if isinstance(contribution.tensors, Joined) and self._add_joined(contribution.tensors, contribution.weight):
            return
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

    def _add_joined(self, tensors: Joined, weight: float) -> bool:
        """Adds all numbers at once, and returns True, if nothing or the same layout began the sums of these tensors."""
        total = self._joined.get(tensors.layout)
        if total is None:
            if tensors.keys() & self._sums.keys():
                return False
            total = self._joined[tensors.layout] = tensors.numbers * np.float64(weight)
            at = 0
            for name, array in tensors.items():
                self._sums[name] = total[at : at + array.size].reshape(array.shape)
                at += array.size
        else:
            room = np.empty(WIDE_BLOCK)
            for block in blocks(len(total), WIDE_BLOCK):
                sums = total[block]
                weighted = room[: len(sums)]
                weighted[:] = tensors.numbers[block]  # two steps are faster than numpy's product of fp32 and float64
                weighted *= weight
                sums += weighted
        for name in tensors:
            self._weights[name] = self._weights.get(name, 0.0) + weight
        return True

    def merge(self, other: WeightedMean) -> None:
        """Adds all that another mean has taken; the other must not be used afterwards."""
        for name, total in other._sums.items():
            if name in self._sums:
                self._sums[name] += total
            else:
                self._sums[name] = total
            self._weights[name] = self._weights.get(name, 0.0) + other._weights[name]

    def by_weight(self) -> Iterator[tuple[float, dict[str, np.ndarray]]]:
        """Yields the means in groups of tensors with the same total weight."""
        result = self.result()
        for weight in sorted(set(self._weights.values())):
            yield weight, {name: array for name, array in result.items() if self._weights[name] == weight}

    def result(self) -> dict[str, np.ndarray]:
        """Returns the mean of each tensor over its sources, in fp32."""
        return {name: (total / self._weights[name]).astype(np.float32) for name, total in self._sums.items()}
