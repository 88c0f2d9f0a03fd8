"""FedProx (arXiv 1812.06127): FedAvg with a term (mu/2)||w - w_start||^2 that keeps devices near the round's start.

Devices add the gradient of this term, mu (w - w_start), in their own layers and in their copies on hosts, per factor. A joint or
sequential host does not add it: its adapter belongs to no single device.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from edgelam_fl.plan.making import ClientSettings
from strategies.aggregation.fedavg import FedAvg


class FedProx(FedAvg):
    def __init__(self, *, mu: Annotated[float, Field(ge=0, le=1e6)] = 0.01) -> None:
        """`mu`: weight of the pull towards the round's start; 0 gives FedAvg."""
        self.mu = mu

    def client_settings(self, round: int) -> ClientSettings:
        return ClientSettings(prox_mu=self.mu)
