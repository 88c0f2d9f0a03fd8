"""A large round's contributions, summed up as they arrive: for rules that depend on them through their weighted mean alone.

A round of few nodes keeps every reply instead: its result then hangs on no order of arrival, to the bit, and its error is
known. Here it is a weighted mean in float64, rounded to fp32 at the end: another order of arrival can change the last bit
of one value in some hundred million. Sums are kept a site, since a site turns out to lack a host only when all have
replied. Knows contributions; knows nothing about messages.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from strategies.aggregation.fedavg import WeightedMean
from strategies.base import Contribution

KEPT_NODES = 32  # that take part in a round whose replies are kept


def folds(aggregation: Any, nodes: int) -> bool:
    """Whether a round of so many nodes is summed up as it arrives.

    The class that says `of_the_mean` must be the one whose `aggregate` is used: one derived from it may do otherwise.
    """
    for known in type(aggregation).__mro__:
        if "of_the_mean" in vars(known):
            return nodes > KEPT_NODES and bool(known.of_the_mean)  # type: ignore[attr-defined]
        if "aggregate" in vars(known):
            return False
    return False


class Fold:
    def __init__(self) -> None:
        self._of_site: dict[str, WeightedMean] = {}
        self._scales: dict[str, float] = {}

    def add(self, parts: Iterable[tuple[str, Contribution]]) -> None:
        """Of one reply, each part with its site."""
        for site, contribution in parts:
            self._of_site.setdefault(site, WeightedMean()).add(contribution)
            self._scales.update(contribution.scales)

    def contributions(self, broken: Collection[str]) -> list[Contribution]:
        """One for all tensors of the same total weight; nothing of the `broken` sites is in them."""
        mean = WeightedMean()
        for site in sorted(self._of_site.keys() - set(broken)):
            mean.merge(self._of_site.pop(site))
        return [Contribution("the mean", weight, tensors, self._scales) for weight, tensors in mean.by_weight()]
