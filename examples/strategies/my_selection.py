"""A selection of your own: the devices with the most examples first, but none twice in a row while others wait.

edgelam run mine.toml --set strategy.selection=my_selection:LargestFirst
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from strategies.api import Candidate, RoundOutcome, RoundState, Selected, Selection


class LargestFirst(Selection):
    def __init__(self, *, rest: bool = True) -> None:
        """`rest`: whether the devices of the last round come last. In the run file: [strategy.options.LargestFirst]."""
        self.rest = rest
        self._last: frozenset[str] = frozenset()

    def select(self, state: RoundState) -> Selected:
        order = sorted(state.candidates, key=self._rank)  # names break ties, so that the given order does not matter
        count = max(state.at_most(), min(state.least, len(order)))
        why = {device.name: f"has {device.examples} examples, place {n}" for n, device in enumerate(order, 1)}
        return Selected(sorted(device.name for device in order[:count]), why)

    def observe(self, outcome: RoundOutcome) -> None:
        """Optional: is told what happened in each round."""
        self._last = frozenset(device.name for device in outcome.devices)

    def state(self) -> Mapping[str, Any]:
        """Needed by a selection that remembers: goes into each checkpoint of the run."""
        return {"last": sorted(self._last)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Its counterpart, for a run that is resumed."""
        self._last = frozenset(state["last"])

    def _rank(self, device: Candidate) -> tuple[bool, int, str]:
        return self.rest and device.name in self._last, -device.examples, device.name
