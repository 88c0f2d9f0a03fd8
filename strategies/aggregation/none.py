"""No aggregation: every source continues with what it trained itself. The baseline that shows what averaging gains."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from strategies.aggregation.fedavg import FedAvg
from strategies.api import Aggregated, Aggregation, Contribution, Start


class NoAggregation(Aggregation):
    """Leaves each source its own tensors. The exported adapter is still the weighted mean, since a folder holds one adapter."""

    personal = True

    def aggregate(self, contributions: Sequence[Contribution], start: Start) -> Aggregated:
        mean = FedAvg().aggregate(contributions, start)
        personal: dict[str, dict[str, np.ndarray]] = {}
        for contribution in contributions:  # a source has several if its layers differ in weight
            personal.setdefault(contribution.source, {}).update(contribution.tensors)
        return Aggregated(mean.tensors, personal)
