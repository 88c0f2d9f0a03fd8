"""Power of choice (arXiv 2010.01243): draws d candidates in proportion to their data and takes the m with the largest loss.

The losses are those of earlier rounds (the paper's variant without an extra message); an unknown loss counts as the highest.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from strategies.api import Candidate, RoundState, Selected, Selection
from strategies.selection.ranking import drawn, loss_or_highest, take


class PowerOfChoice(Selection):
    def __init__(self, *, d: Annotated[int, Field(ge=0)] = 0) -> None:
        """`d`: number of candidates drawn, at least as many as are wanted; 0: twice as many as are wanted."""
        self.d = d

    def select(self, state: RoundState) -> Selected:
        wanted, candidates = state.at_most(), state.by_name()
        size = min(max(self.d or 2 * wanted, wanted), len(candidates))
        pool = drawn(candidates, [candidate.examples for candidate in candidates], size, state.random)
        selected = take(sorted(pool, key=lambda c: (-loss_or_highest(c), c.name)), wanted, _reason)
        not_drawn = {c.name: f"not among the {size} drawn by their data" for c in candidates}
        return Selected(selected.names, {**not_drawn, **selected.why})


def _reason(candidate: Candidate) -> str:
    return "drawn; no loss yet" if candidate.last_loss is None else f"drawn; loss {candidate.last_loss:.4f}"
