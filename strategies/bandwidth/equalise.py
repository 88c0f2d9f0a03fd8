"""Gives shares with which all devices finish together: a device that computes longer sends faster.

No other shares let the slowest device finish earlier. `strategies.bandwidth.links` has the wired and the wireless form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from strategies.api import Bandwidth, Demand
from strategies.bandwidth.links import finish_together, needs_of


class Equalise(Bandwidth):
    def allocate(self, demands: Sequence[Demand], capacity_bps: float) -> Mapping[str, float]:
        ordered = sorted(demands, key=lambda demand: demand.name)
        if not ordered:
            return {}
        # Without a limit any shares will do: take those of a narrow capacity.
        _, shares = finish_together(needs_of(ordered, capacity_bps or 1.0))
        return {demand.name: float(share) for demand, share in zip(ordered, shares, strict=True)}
