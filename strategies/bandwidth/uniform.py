"""Gives equal shares, whatever a device has to send."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from strategies.api import Bandwidth, Demand


class Uniform(Bandwidth):
    def allocate(self, demands: Sequence[Demand], capacity_bps: float) -> Mapping[str, float]:
        return {demand.name: 1 / len(demands) for demand in demands}
