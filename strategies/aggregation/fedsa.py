"""FedSA-LoRA (arXiv 2410.01463): averages A, and leaves each source its own B.

A device has B of its own layers, a site has B of the layers that its hosts train for all its devices. Copies are refused, since
hosts start a round from one adapter for all devices. The run's adapter holds the mean of B, for devices that never took part and
for use elsewhere; each device's own adapter is exported beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from strategies.aggregation.factors import B
from strategies.aggregation.fedavg import FedAvg
from strategies.api import Aggregated, Contribution, Start


class FedSa(FedAvg):
    personal = True
    factors_alone = True

    def aggregate(self, contributions: Sequence[Contribution], start: Start) -> Aggregated:
        own: dict[str, dict[str, np.ndarray]] = {}
        for contribution in contributions:  # a source has several if its layers differ in weight
            of_source = {name: array for name, array in contribution.tensors.items() if name.endswith(B)}
            own.setdefault(contribution.source, {}).update(of_source)
        return Aggregated(super().aggregate(contributions, start).tensors, own)
