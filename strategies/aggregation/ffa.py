"""FFA-LoRA (arXiv 2403.12313): A stays at its common random start, B is trained and averaged.

Exact, since sum p_k B_k A = (sum p_k B_k) A, with half the bytes up. Devices and hosts freeze every A in every round.
"""

from __future__ import annotations

from edgelam_fl.plan.making import ClientSettings
from strategies.aggregation.fedavg import FedAvg


class FfaLora(FedAvg):
    factors_alone = True

    def client_settings(self, round: int) -> ClientSettings:
        return ClientSettings(train_a=False)
