"""What several selections share: taking the first of an order, and saying of every candidate why."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from random import Random

from strategies.api import Candidate, Selected


def take(ordered: Sequence[Candidate], count: int, reason: Callable[[Candidate], str]) -> Selected:
    """The first `count` of `ordered`; names in their own order. `reason` says by what a candidate was ranked."""
    why = {
        candidate.name: f"{reason(candidate)}: {place} of {len(ordered)}, {count} wanted"
        for place, candidate in enumerate(ordered, 1)
    }
    return Selected(sorted(candidate.name for candidate in ordered[:count]), why)


def drawn(candidates: Sequence[Candidate], weights: Sequence[float], count: int, random: Random) -> list[Candidate]:
    """`count` without replacement, each draw in proportion to the weights left (Efraimidis and Spirakis, 2006).

    Candidates without weight come last. The candidates' order must be the same in every run.
    """
    keys = [random.expovariate(1.0) / weight if weight > 0 else math.inf for weight in weights]
    order = sorted(range(len(candidates)), key=lambda index: (keys[index], candidates[index].name))
    return [candidates[index] for index in order[:count]]


def loss_or_highest(candidate: Candidate) -> float:
    """Who never told a loss is asked first."""
    return math.inf if candidate.last_loss is None else candidate.last_loss
