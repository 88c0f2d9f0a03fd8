"""FedSA-LoRA (arXiv 2410.01463): A is averaged, B stays what each source made of it.

A device's B is of its own layers, a site's of the layers that its hosts train for all its devices. Copies are refused,
since hosts start a round from one adapter for all. The mean of B is in the run's adapter, for a device that never took
part and for who wants one for all; each device's own adapter is beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from strategies.aggregation.factors import B
from strategies.aggregation.fedavg import FedAvg
from strategies.api import Aggregated, Contribution, Start


class FedSa(FedAvg):
    personal = True

    def aggregate(self, contributions: Sequence[Contribution], start: Start) -> Aggregated:
        own: dict[str, dict[str, np.ndarray]] = {}
        for contribution in contributions:  # a source has several where its layers have unlike weights
            of_source = {name: array for name, array in contribution.tensors.items() if name.endswith(B)}
            own.setdefault(contribution.source, {}).update(of_source)
        return Aggregated(super().aggregate(contributions, start).tensors, own)
