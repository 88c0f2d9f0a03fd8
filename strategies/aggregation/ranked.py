"""The base class of rules for unequal ranks: per module, the sources' factors become one pair in the start's rank."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from strategies.aggregation.factors import A, B, Factors, by_module, of_start
from strategies.aggregation.fedavg import mean_of_heads
from strategies.api import Aggregated, Aggregation, Contribution, Start


class RankedRule(Aggregation, ABC):
    """A rule that combines the factors of each module on its own; task heads are averaged."""

    unequal_ranks = True
    factors_alone = True

    def aggregate(self, contributions: Sequence[Contribution], start: Start) -> Aggregated:
        new = mean_of_heads(contributions)
        for module, sources in by_module(contributions, start).items():
            start_a_RI, _, scale = of_start(module, start, {})
            if len(sources) == 1 and (sources[0].rank, sources[0].scale) == (len(start_a_RI), scale):
                new[module + A], new[module + B] = sources[0].a_RI, sources[0].b_OR  # a single source keeps its factors
            else:
                new[module + A], new[module + B] = self.combine(sources, start_a_RI, scale)
        return Aggregated(new)

    @abstractmethod
    def combine(
        self, sources: Sequence[Factors], start_a_RI: np.ndarray, scale: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns A and B of a module, in the rank of the start's A."""
