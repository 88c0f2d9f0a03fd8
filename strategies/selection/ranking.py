"""Helpers of several selections: take the first candidates of an order, draw by weight, give a reason for each candidate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from random import Random

from strategies.api import Candidate, Selected


def take(ordered: Sequence[Candidate], count: int, reason: Callable[[Candidate], str]) -> Selected:
    """Selects the first `count` of `ordered`, with names sorted. `reason` says what a candidate was ranked by."""
    why = {
        candidate.name: f"{reason(candidate)}: {place} of {len(ordered)}, {count} wanted"
        for place, candidate in enumerate(ordered, 1)
    }
    return Selected(sorted(candidate.name for candidate in ordered[:count]), why)


def drawn(candidates: Sequence[Candidate], weights: Sequence[float], count: int, random: Random) -> list[Candidate]:
    """Draws `count` candidates without replacement, each in proportion to the weights left (Efraimidis and Spirakis, 2006).

    Candidates of weight 0 come last. The order of the candidates must be the same in every run.
    """
    keys = [random.expovariate(1.0) / weight if weight > 0 else math.inf for weight in weights]
    order = sorted(range(len(candidates)), key=lambda index: (keys[index], candidates[index].name))
    return [candidates[index] for index in order[:count]]


def loss_or_highest(candidate: Candidate) -> float:
    """Returns the last loss; infinity if there is none, so that unknown devices come first."""
    return math.inf if candidate.last_loss is None else candidate.last_loss
