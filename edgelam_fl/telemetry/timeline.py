"""Shares of computing, sending and waiting in a round's train phase, from the event `RoundTimeline`.

Each node counts from the moment at which the phase opened there, so rows of different nodes are shifted by at most the time
of a message. A node keeps its newest intervals only: shares are taken over the time that all nodes still know.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from edgelam_fl.telemetry.events import NodeShares, RoundShares, RoundTimeline, TimelineInterval
from edgelam_fl.telemetry.human import by_name

COMPUTING = ("forward", "backward", "step")
LONGEST_S = 1e7  # a train phase of four months


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

    def shares(self) -> dict[str, NodeShares]:
        """Returns the shares per node, its roles together."""
        nodes = sorted({node for node, _ in self.rows}, key=by_name)
        return {
            node: self._shares([i for key, own in self.rows.items() if key[0] == node for i in own]) for node in nodes
        }

    def _shares(self, intervals: Iterable[BusyTime]) -> NodeShares:
        busy = [(i.kind, max(i.start_s, self.start_s), min(i.end_s, self.end_s)) for i in intervals]
        computed = covered((start, end) for kind, start, end in busy if kind in COMPUTING)
        either = covered((start, end) for _, start, end in busy)
        waited_s = self.end_s - self.start_s - either
        return NodeShares(computed_s=computed, sent_s=either - computed, waited_s=waited_s)


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


def shares_in(timeline: RoundTimeline) -> RoundShares:
    """Makes the event that says what a timeline comes to, per node, to the millisecond."""
    phase = read_phase(timeline)
    nodes = {
        name: NodeShares(computed_s=round(of.computed_s, 3), sent_s=round(of.sent_s, 3), waited_s=round(of.waited_s, 3))
        for name, of in (phase.shares() if phase else {}).items()
    }
    return RoundShares(round=timeline.round, nodes=nodes)


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
