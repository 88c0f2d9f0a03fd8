"""Carry factors: what a rule adds to a module for good, as low-rank factors beside a base that never changes (s = 1).

Only their mathematics: no model, plan or export reads them yet, so the rules that need them are in no table.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from strategies.aggregation.factors import product_norm, svd


@dataclass(frozen=True)
class Carry:
    """Shapes: a [M, I], b [O, M]; their product is added to the module's weight."""

    a_MI: np.ndarray
    b_OM: np.ndarray


def added(one: Carry, other: Carry) -> Carry:
    """The sum of two, exact: the ranks add up."""
    return Carry(np.concatenate([one.a_MI, other.a_MI]), np.concatenate([one.b_OM, other.b_OM], axis=1))


def compressed(carry: Carry, most_rank: int) -> tuple[Carry, float]:
    """The nearest carry of at most this rank, and how far it is: the relative error in the Frobenius norm."""
    if len(carry.a_MI) <= most_rank:
        return carry, 0.0
    u, values, vt = svd(carry.b_OM.astype(np.float64), carry.a_MI.astype(np.float64))
    whole = product_norm(carry.b_OM, carry.a_MI)
    lost = float(np.linalg.norm(values[most_rank:]))
    kept = Carry(vt[:most_rank], u[:, :most_rank] * values[:most_rank])
    return kept, lost / whole if whole else 0.0
