"""An aggregation of your own: every source counts the same, however many labels it trained, and A stays at its start.

edgelam run mine.toml --set strategy.aggregation=my_aggregation:OneVoteEach
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from edgelam_fl.plan.making import ClientSettings
from strategies.aggregation.fedavg import FedAvg
from strategies.api import Aggregated, Contribution, Start


class OneVoteEach(FedAvg):
    needs_only_mean = False  # large rounds are summed up weighted by labels: ask for every contribution

    def __init__(self, *, freeze_a: bool = True) -> None:
        """`freeze_a`: train only B, so that the mean of the factors is the mean of the products."""
        self.freeze_a = freeze_a

    def aggregate(self, contributions: Sequence[Contribution], start: Start) -> Aggregated:
        """`contributions`: what each source trained, as arrays by name. `start`: what the round began with."""
        return super().aggregate([replace(contribution, weight=1.0) for contribution in contributions], start)

    def client_settings(self, round: int) -> ClientSettings:
        """Optional: says what devices and hosts must do in this round."""
        return ClientSettings(train_a=not self.freeze_a)
