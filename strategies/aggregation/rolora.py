"""RoLoRA (arXiv 2409.02346): the factors take turns. Odd rounds train and average B, even rounds A; the other is frozen.

Exact in each round, like FFA-LoRA, and A learns too. B comes first: it starts at zero, so A would get no gradient.
"""

from __future__ import annotations

from edgelam_fl.plan.making import ClientSettings
from strategies.aggregation.fedavg import FedAvg


class RoLora(FedAvg):
    factors_alone = True

    def client_settings(self, round: int) -> ClientSettings:
        return ClientSettings(train_a=round % 2 == 0, train_b=round % 2 == 1)
