"""No aggregation: every device goes on with what it trained itself. The baseline that shows what averaging is worth."""

from __future__ import annotations

from collections.abc import Sequence

from strategies.aggregation.fedavg import FedAvg
from strategies.base import Aggregated, Contribution


class NoAggregation:
    """The exported adapter is still the weighted mean, since a folder holds one."""

    def aggregate(self, contributions: Sequence[Contribution]) -> Aggregated:
        mean = FedAvg().aggregate(contributions)
        return Aggregated(mean.tensors, personal={c.source: c.tensors for c in contributions})
