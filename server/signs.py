"""Signs of life of an attempt: where its nodes are, as they attend, for whoever follows the run.

Decides how often; nothing in a round follows from it. Knows neither who attends nor what is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from edgelam_fl.telemetry.events import Emit, NodeProgress, RoundProgress
from edgelam_fl.telemetry.progress import TELL_EVERY_S, Meter

_FIRST_LOGGED_S = 30.0  # into the run's events; then after twice, four times, ... as long


class Signs:
    """The signs of one attempt at a round, from its beginning on."""

    def __init__(
        self,
        round_: int,
        attempt: int,
        began_s: float,
        *,
        tell: Callable[[RoundProgress | None], None],
        emit: Emit,
    ) -> None:
        """`tell`: takes the newest progress, None once nobody plays. `emit`: takes what is kept."""
        self._meter, self._tell, self._emit = Meter(round_, attempt, began_s), tell, emit
        self._next_told_s, self._next_logged_s = began_s, began_s + _FIRST_LOGGED_S

    def hear(self, nodes: Mapping[str, NodeProgress], now_s: float) -> None:
        """Takes what all nodes that attend said last, and tells it if it is time to."""
        for name, node in nodes.items():
            self._meter.note(name, node, now_s)
        progress = self._meter.progress(now_s) if now_s >= self._next_told_s else None
        if progress is None:
            return
        self._next_told_s = now_s + TELL_EVERY_S
        self._tell(progress)
        if now_s >= self._next_logged_s:
            self._next_logged_s = now_s + (now_s - self._meter.began_s)
            self._emit(replace(progress, nodes=None))

    def end(self) -> None:
        """Says that nobody plays any more."""
        self._tell(None)
