"""Draws devices uniformly, without replacement."""

from __future__ import annotations

from strategies.api import RoundState, Selected, Selection
from strategies.selection.ranking import take


class RandomSelection(Selection):
    ignores_data = True

    def select(self, state: RoundState) -> Selected:
        order = state.by_name()
        state.random.shuffle(order)
        return take(order, state.at_most(), lambda candidate: "drawn at random")
