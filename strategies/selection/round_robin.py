"""Chooses the devices that have waited longest."""

from __future__ import annotations

from strategies.api import Candidate, RoundState, Selected, Selection
from strategies.selection.ranking import take


class RoundRobin(Selection):
    ignores_data = True

    def select(self, state: RoundState) -> Selected:
        order = sorted(state.candidates, key=lambda candidate: (candidate.last_round, candidate.name))
        return take(order, state.at_most(), _reason)


def _reason(candidate: Candidate) -> str:
    return f"last took part in round {candidate.last_round}" if candidate.last_round else "never took part"
