"""FedProx (arXiv 1812.06127): FedAvg of devices that are held near the round's start by (mu/2)||w - w_start||^2.

The devices' half is this term's gradient, mu (w - w_start), in their own layers and in their copies on hosts, on the
factors as they are. A joint or sequential host does not have it: its adapter belongs to no single device.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from edgelam_fl.plan.making import ClientSettings
from strategies.aggregation.fedavg import FedAvg


class FedProx(FedAvg):
    def __init__(self, *, mu: Annotated[float, Field(ge=0, le=1e6)] = 0.01) -> None:
        """`mu`: weight of the pull to the round's start; 0 is FedAvg."""
        self.mu = mu

    def client_settings(self, round: int) -> ClientSettings:
        return ClientSettings(prox_mu=self.mu)
