"""Shares of computing, sending and waiting in a round's train phase, from the event `RoundTimeline`.

Each node counts from the moment at which the phase opened there, so rows of different nodes are shifted by at most the time
of a message. A node keeps its newest intervals only: shares are taken over the time that all nodes still know.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from edgelam_fl.telemetry.events import RoundTimeline, TimelineInterval
from edgelam_fl.telemetry.human import by_name

COMPUTING = ("forward", "backward", "step")
LONGEST_S = 1e7  # a train phase of four months


@dataclass(frozen=True)
class Shares:
    """One node's time in the phase, in seconds; the three add up to the phase."""

    computed_s: float
    sent_s: float  # while it did not compute
    waited_s: float

    @property
    def phase_s(self) -> float:
        return self.computed_s + self.sent_s + self.waited_s


class BusyTime(NamedTuple):
    """A stretch of time in which a node did one thing, with times that can be drawn."""

    kind: str
    start_s: float
    seconds: float
    step: int
    micro_batch: int
    peer: str

    @property
    def end_s(self) -> float:
        return self.start_s + self.seconds


@dataclass(frozen=True)
class Phase:
    """A round's train phase: the time [start_s, end_s) that all rows cover."""

    round: int
    start_s: float
    end_s: float
    rows: Mapping[tuple[str, str], list[BusyTime]]  # per (node, role): devices first, by name

    def shares(self) -> dict[str, Shares]:
        """Returns the shares per node, its roles together."""
        nodes = sorted({node for node, _ in self.rows}, key=by_name)
        return {
            node: self._shares([i for key, own in self.rows.items() if key[0] == node for i in own]) for node in nodes
        }

    def _shares(self, intervals: Iterable[BusyTime]) -> Shares:
        busy = [(i.kind, max(i.start_s, self.start_s), min(i.end_s, self.end_s)) for i in intervals]
        computed = covered((start, end) for kind, start, end in busy if kind in COMPUTING)
        either = covered((start, end) for _, start, end in busy)
        return Shares(computed, either - computed, self.end_s - self.start_s - either)


def read_phase(event: RoundTimeline) -> Phase | None:
    """Makes a phase of a round's timeline; None if no node reported an interval."""
    rows: dict[tuple[str, str], list[BusyTime]] = {}
    for node, intervals in event.nodes.items():
        for role, interval in sorted(_possible(intervals), key=lambda found: found[1].start_s):
            rows.setdefault((node, role), []).append(interval)
    if not rows:
        return None
    # A node without an interval of the round's first step has dropped it, or came later: nothing is known before.
    starts = [own[0].start_s for own in rows.values() if min(interval.step for interval in own) > 0]
    end = max(interval.end_s for own in rows.values() for interval in own)
    ordered = sorted(rows, key=lambda key: (key[1] != "device", by_name(key[0])))
    return Phase(event.round, max(starts, default=0.0), end, {key: rows[key] for key in ordered})


def _possible(intervals: Iterable[TimelineInterval]) -> Iterable[tuple[str, BusyTime]]:
    """Yields (role, interval) of the intervals that can be drawn; nodes may report any number."""
    for kind, role, start_s, seconds, step, micro_batch, peer in intervals:
        if start_s is None or seconds is None:
            continue
        if 0 <= start_s < LONGEST_S and 0 <= seconds < LONGEST_S:
            yield role, BusyTime(kind, start_s, seconds, step, micro_batch, peer)


def covered(stretches: Iterable[tuple[float, float]]) -> float:
    """Returns the length of the union of stretches [start, end)."""
    length, reached = 0.0, float("-inf")
    for start, end in sorted(stretches):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length
