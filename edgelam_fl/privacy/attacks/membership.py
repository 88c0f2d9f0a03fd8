"""Membership of an example in a training set, from its loss under the published adapter: how well members stand out.

Two scores per example, by Yeom et al. (arXiv 1709.01604: the loss alone) and by Carlini et al. (arXiv 2112.03570, section
VI: against the loss of a reference model that did not train on it, here the base model without the adapter). Knows neither
models nor texts: takes losses, mean per labelled token.

Shapes: N members, M others, which come from the same distribution but were not learned.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CHANCE_AUC, FALSE_POSITIVES = 0.5, 0.01
_RESAMPLES, _CONFIDENCE = 2000, 0.95


@dataclass(frozen=True)
class Separation:
    """Measures of how well a score separates members from others."""

    auc: float
    """Probability that a member scores above another example; `CHANCE_AUC` for a score that knows nothing."""
    low: float
    """Lower end of the 95 % bootstrap interval of the AUC."""
    high: float
    """Upper end of the interval."""
    found: float
    """Share of members above the score that `FALSE_POSITIVES` of the others reach; the same number by chance."""


def by_loss(losses_N: np.ndarray) -> np.ndarray:
    """Scores examples by their loss under the adapter: a learned example has a small one."""
    return -losses_N


def by_reference(losses_N: np.ndarray, reference_N: np.ndarray) -> np.ndarray:
    """Scores examples by how much smaller the loss is than under the reference model, so that easy texts get no credit."""
    return reference_N - losses_N


def auc(members_N: np.ndarray, others_M: np.ndarray) -> float:
    """Computes the area under the ROC curve as the share of pairs in which the member scores higher; equal scores count half."""
    sorted_M = np.sort(others_M)
    below_N, up_to_N = (np.searchsorted(sorted_M, members_N, side) for side in ("left", "right"))
    return float((below_N + up_to_N).mean() / (2 * len(others_M)))


def share_found(members_N: np.ndarray, others_M: np.ndarray, false_positives: float = FALSE_POSITIVES) -> float:
    """Returns the share of members that score above all others but the highest `false_positives` of them."""
    allowed = int(false_positives * len(others_M))
    return float((members_N > np.sort(others_M)[len(others_M) - 1 - allowed]).mean())


def separation(members_N: np.ndarray, others_M: np.ndarray, seed: int = 0) -> Separation:
    """Measures how well scores separate members from others; the interval comes from resampling both groups.

    Raises ValueError if a group is empty or a score is not finite, since neither has an order.
    """
    if not (len(members_N) and len(others_M) and np.isfinite(members_N).all() and np.isfinite(others_M).all()):
        raise ValueError(f"needs finite scores of both groups, got {len(members_N)} members and {len(others_M)} others")
    chance = np.random.default_rng(seed)
    drawn = [
        auc(chance.choice(members_N, len(members_N)), chance.choice(others_M, len(others_M))) for _ in range(_RESAMPLES)
    ]
    low, high = np.quantile(drawn, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    return Separation(auc(members_N, others_M), float(low), float(high), share_found(members_N, others_M))
