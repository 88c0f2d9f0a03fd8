"""A bandwidth rule of your own: shares by the root of what a device moves, between uniform and proportional.

edgelam run mine.toml --set strategy.bandwidth=my_bandwidth:ByRoot
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import Field

from strategies.api import Bandwidth, Demand


class ByRoot(Bandwidth):
    def __init__(self, *, power: Annotated[float, Field(ge=0, le=1)] = 0.5) -> None:
        """`power`: 0 is uniform, 1 proportional. The annotation is the rule that the run file's value is checked against."""
        self.power = power

    def allocate(self, demands: Sequence[Demand], capacity_bps: float) -> Mapping[str, float]:
        weights = {demand.name: max(demand.payload_bytes, 1.0) ** self.power for demand in demands}
        total = math.fsum(weights.values())  # exact, so that the devices' order changes no bit
        return {name: weight / total for name, weight in weights.items()}
