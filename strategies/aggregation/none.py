"""No aggregation: every device goes on with what it trained itself. The baseline that shows what averaging is worth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from strategies.aggregation.fedavg import FedAvg
from strategies.api import Aggregated, Aggregation, Contribution, Start


class NoAggregation(Aggregation):
    """The exported adapter is still the weighted mean, since a folder holds one."""

    personal = True

    def aggregate(self, contributions: Sequence[Contribution], start: Start) -> Aggregated:
        mean = FedAvg().aggregate(contributions, start)
        personal: dict[str, dict[str, np.ndarray]] = {}
        for contribution in contributions:  # a source has several where its layers have unlike weights
            personal.setdefault(contribution.source, {}).update(contribution.tensors)
        return Aggregated(mean.tensors, personal)
