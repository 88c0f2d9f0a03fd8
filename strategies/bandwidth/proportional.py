"""Gives shares in proportion to what devices have to move: all send equally long, however long they compute."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from strategies.api import Bandwidth, Demand


class Proportional(Bandwidth):
    def allocate(self, demands: Sequence[Demand], capacity_bps: float) -> Mapping[str, float]:
        total = math.fsum(demand.payload_bytes for demand in demands)  # exact, so that the order changes no bit
        if not total > 0:
            return {demand.name: 1 / len(demands) for demand in demands}
        return {demand.name: demand.payload_bytes / total for demand in demands}
