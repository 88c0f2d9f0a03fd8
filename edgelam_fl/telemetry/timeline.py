"""Who computed, sent and waited in a round's train phase, from its "timeline" event (`events.py`).

Every node counts from the moment when the phase opened at it, so rows of unlike nodes stand apart by a message's way at
most. A node keeps its newest intervals only: shares are taken over the time that every node still knows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgelam_fl.telemetry.summary import Event, by_name

COMPUTING = ("forward", "backward", "step")
LONGEST_S = 1e7  # a train phase of four months
Interval = Sequence[Any]  # kind, role, start_s, seconds, step, micro_batch, peer


@dataclass(frozen=True)
class Shares:
    """What a node did with the phase, in seconds; the three add up to the phase."""

    computed_s: float
    sent_s: float  # while it did not compute
    waited_s: float

    @property
    def phase_s(self) -> float:
        return self.computed_s + self.sent_s + self.waited_s


@dataclass(frozen=True)
class Phase:
    """A round's train phase: the time [start_s, end_s) that all rows cover."""

    round: int
    start_s: float
    end_s: float
    rows: Mapping[tuple[str, str], list[Interval]]  # by (node, role): devices first, by name

    def shares(self) -> dict[str, Shares]:
        """By node, its roles together."""
        nodes = sorted({node for node, _ in self.rows}, key=by_name)
        return {
            node: self._shares([i for key, own in self.rows.items() if key[0] == node for i in own]) for node in nodes
        }

    def _shares(self, intervals: Iterable[Interval]) -> Shares:
        busy = [(kind, max(start, self.start_s), min(start + s, self.end_s)) for kind, _, start, s, *_ in intervals]
        computed = covered((start, end) for kind, start, end in busy if kind in COMPUTING)
        either = covered((start, end) for _, start, end in busy)
        return Shares(computed, either - computed, self.end_s - self.start_s - either)


def read_phase(event: Event) -> Phase | None:
    """None where no node tells anything."""
    rows: dict[tuple[str, str], list[Interval]] = {}
    for node, intervals in (event.get("nodes") or {}).items():
        told = [interval for interval in intervals if _possible(interval[2], interval[3])]
        for interval in sorted(told, key=lambda interval: interval[2]):
            rows.setdefault((node, interval[1]), []).append(interval)
    if not rows:
        return None
    # Whoever shows no interval of the round's first step has forgotten it (or came later): nothing is known before.
    starts = [own[0][2] for own in rows.values() if min(interval[4] for interval in own) > 0]
    end = max(start + seconds for own in rows.values() for _, _, start, seconds, *_ in own)
    ordered = sorted(rows, key=lambda key: (key[1] != "device", by_name(key[0])))
    return Phase(event.get("round") or 0, max(starts, default=0.0), end, {key: rows[key] for key in ordered})


def _possible(start_s: float | None, seconds: float | None) -> bool:
    """Nodes are believed what they did, but not everything can be drawn."""
    return start_s is not None and seconds is not None and 0 <= start_s < LONGEST_S and 0 <= seconds < LONGEST_S


def covered(stretches: Iterable[tuple[float, float]]) -> float:
    """The length of the union."""
    length, reached = 0.0, float("-inf")
    for start, end in sorted(stretches):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length
