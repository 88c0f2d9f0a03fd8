"""Chooses every available device."""

from __future__ import annotations

from strategies.api import RoundState, Selected, Selection


class SelectAll(Selection):
    ignores_data = True

    def select(self, state: RoundState) -> Selected:
        names = sorted(candidate.name for candidate in state.candidates)
        return Selected(names, {name: "every available device takes part" for name in names})
