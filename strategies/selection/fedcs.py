"""FedCS (arXiv 1804.08333): chooses as many devices as fit into a deadline, always next the one that lengthens the round least.

The delay of a set of devices is the time at which all finish together. Beyond 64 devices the greedy choice has a resolution of
1 / 200 of the deadline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

from strategies.api import Candidate, RoundState, Selected, Selection
from strategies.bandwidth.links import Needs, delay_of, needs_of

_EXACT_UP_TO = 64
_PARTS = 200
_BISECTIONS = 50


class FedCS(Selection):
    def __init__(self, *, deadline_s: Annotated[float, Field(gt=0)] = 60.0) -> None:
        """`deadline_s`: deadline of a round, counting the time on the devices."""
        self.deadline_s = deadline_s

    def select(self, state: RoundState) -> Selected:
        candidates = state.by_name()
        if not candidates:
            return Selected([])
        needs, most = needs_of(candidates, state.capacity_bps), state.at_most()
        greedy = _one_by_one if len(candidates) <= _EXACT_UP_TO else _in_parts
        added = greedy(needs, self.deadline_s, most)
        forced = _quickest_alone(needs, added, min(state.least, most) - len(added))
        names = sorted(candidates[index].name for index in [*added, *forced])
        return Selected(names, _reasons(candidates, needs, added, forced, self.deadline_s))


def _one_by_one(needs: Needs, deadline_s: float, most: int) -> dict[int, float]:
    """Returns the devices in the order of their choice, each with the delay of the round with it."""
    added: dict[int, float] = {}
    delay_s = 0.0
    while len(added) < most:
        outside = np.array([index for index in range(len(needs)) if index not in added])
        inside = needs.some(np.array(list(added), dtype=int))

        def left_over(at_s: float, inside: Needs = inside, outside: np.ndarray = outside) -> float:
            return 1 - float(np.sum(inside.shares(at_s))) - float(np.min(needs.some(outside).shares(at_s)))

        if left_over(deadline_s) < 0:
            break
        # The least delay at which the chosen devices and one more fit: that one lengthens the round least.
        low, high = delay_s, deadline_s
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (low, middle) if left_over(middle) >= 0 else (middle, high)
        delay_s = high
        added[int(outside[np.argmin(needs.some(outside).shares(delay_s))])] = delay_s
    return added


def _in_parts(needs: Needs, deadline_s: float, most: int) -> dict[int, float]:
    added: dict[int, float] = {}
    outside = np.ones(len(needs), dtype=bool)
    for delay_s in np.linspace(0, deadline_s, _PARTS + 1)[1:]:
        shares = needs.shares(float(delay_s))
        order = np.flatnonzero(outside)
        order = order[np.argsort(shares[order], kind="stable")]
        room = 1 - float(np.sum(shares[~outside]))
        fit = int(np.sum(np.cumsum(shares[order]) <= room))
        for index in order[: min(fit, most - len(added))]:
            added[int(index)] = float(delay_s)
            outside[index] = False
    return added


def _quickest_alone(needs: Needs, added: dict[int, float], missing: int) -> list[int]:
    """Returns `missing` devices that would finish first on their own, for a round that the deadline leaves too few devices."""
    if missing <= 0:
        return []
    alone = delay_of(needs, np.ones(len(needs)))
    outside = [index for index in range(len(needs)) if index not in added]
    return sorted(outside, key=lambda index: (alone[index], index))[:missing]


def _reasons(
    candidates: Sequence[Candidate], needs: Needs, added: dict[int, float], forced: list[int], deadline_s: float
) -> dict[str, str]:
    round_s = max(added.values(), default=0.0)
    why = {
        candidate.name: f"does not fit into {deadline_s:g} s with the {len(added)} chosen" for candidate in candidates
    }
    for place, (index, delay_s) in enumerate(added.items(), 1):
        why[candidates[index].name] = f"added as number {place} at {delay_s:.3g} s of {round_s:.3g} s in all"
    for index in forced:
        why[candidates[index].name] = f"misses {deadline_s:g} s, but the round needs more devices"
    return why
