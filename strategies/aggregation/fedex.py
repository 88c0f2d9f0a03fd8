"""FedEx-LoRA (arXiv 2410.09432): factors averaged as FedIT, and what that misses of the products goes to the base.

Exact, and training goes on from the averaged factors. Not in the table of strategies yet: see `carry`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from strategies.aggregation.carry import Carry
from strategies.aggregation.factors import Factors, stacked


def residual(sources: Sequence[Factors], a_RI: np.ndarray, b_OR: np.ndarray, scale: float) -> Carry:
    """sum_k p_k s_k B_k A_k - s B A, of the averaged A, B; of rank (K - 1) r at most where ranks are equal."""
    left_OM, right_MI = stacked(sources)
    return Carry(np.concatenate([right_MI, a_RI]), np.concatenate([left_OM, b_OR * np.float64(-scale)], axis=1))
