"""TiFL (arXiv 2001.09249): groups devices into tiers of similar speed and takes a round's devices from one tier.

A tier is drawn with the weight 1 + the number of tiers that do better so far by their mean metric (equal weights while no
metric is known), and has credits: each draw costs one, and when no tier has credits left, all get theirs back. In the paper
(algorithm 2) the i-th worst of n tiers has the weight n - i, so that the best is not drawn before others lack credits, and weights
change every some rounds, if the accuracy fell; here every tier has a chance in every round. Devices that never took part form a
tier of their own that comes first, instead of the paper's profiling rounds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any

from pydantic import Field

from strategies.api import Candidate, RoundState, Selected, Selection
from strategies.selection.ranking import drawn


class TiFL(Selection):
    def __init__(self, *, tiers: Annotated[int, Field(ge=1)] = 5, credits: Annotated[int, Field(ge=1)] = 10) -> None:
        """`tiers`: number of tiers of nearly equal size. `credits`: rounds that a tier may have before all others had theirs."""
        self.tiers, self.credits = tiers, credits
        self._left: dict[int, int] = {}

    def state(self) -> Mapping[str, Any]:
        return {"left": {str(number): credits for number, credits in self._left.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._left = {int(number): credits for number, credits in state["left"].items()}

    def select(self, state: RoundState) -> Selected:
        unmeasured = [c for c in state.by_name() if c.last_seconds is None]
        if unmeasured:
            return self._take(state, unmeasured, "unmeasured", {c.name: "unmeasured" for c in unmeasured})
        tiers = self._tiers(state.by_name())
        if not tiers:
            return Selected([])
        number = self._draw(tiers, state)
        label = {c.name: f"tier {n} of {len(tiers)}" for n, tier in enumerate(tiers, 1) for c in tier}
        return self._take(state, tiers[number], f"tier {number + 1} of {len(tiers)}", label)

    def _tiers(self, candidates: Sequence[Candidate]) -> list[list[Candidate]]:
        """Splits the candidates into tiers, the fastest first."""
        order = sorted(candidates, key=lambda c: (c.last_seconds or 0.0, c.name))
        count = min(self.tiers, len(order))
        borders = [len(order) * number // count for number in range(count + 1)] if count else []
        return [order[first:last] for first, last in pairwise(borders)]

    def _draw(self, tiers: Sequence[Sequence[Candidate]], state: RoundState) -> int:
        with_credits = [n for n in range(len(tiers)) if self._left.get(n, self.credits) > 0]
        if not with_credits:
            self._left.clear()
            with_credits = list(range(len(tiers)))
        metrics = [_mean_metric(tier) for tier in tiers]
        ranks = [sum(other > metric for other in metrics) for metric in metrics]  # how many tiers do better
        number = state.random.choices(with_credits, [1.0 + ranks[n] for n in with_credits])[0]
        self._left[number] = self._left.get(number, self.credits) - 1
        return number

    def _take(self, state: RoundState, tier: Sequence[Candidate], name: str, label: dict[str, str]) -> Selected:
        ordered = sorted(tier, key=lambda c: c.name)
        chosen = drawn(ordered, [1.0] * len(ordered), state.wanted or len(ordered), state.random)
        names = {c.name for c in chosen}
        if len(names) < state.least:  # a small tier must not make a round fail
            others = [c for c in state.by_name() if c.name not in names]
            names |= {c.name for c in drawn(others, [1.0] * len(others), state.least - len(names), state.random)}
        why = {
            c.name: f"{label.get(c.name, 'measured')}: {'chosen' if c.name in names else 'not chosen'}, {name}'s turn"
            for c in state.candidates
        }
        return Selected(sorted(names), why)


def _mean_metric(tier: Sequence[Candidate]) -> float:
    """Returns the mean metric of the tier's devices; 0 if none is known, as nothing was learned there."""
    known = [c.metric for c in tier if c.metric is not None]
    return math.fsum(known) / len(known) if known else 0.0
