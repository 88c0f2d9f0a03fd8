"""FedEx-LoRA (arXiv 2410.09432): averages the factors as FedIT does, and adds to the base what that mean misses.

Exact, and training continues from the averaged factors. The base is quantized, so the residual goes to the module's carry
factors. Factors of unequal ranks are padded with zeros before they are averaged; a node of lower rank gets the first rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from strategies.aggregation.carry import Carry, CarryRule, padded_mean, without_rounding
from strategies.aggregation.factors import Factors, of_start, product_norm, stacked
from strategies.api import Start


class FedEx(CarryRule):
    """Averages factors and carries the residual of their products."""

    def combine(
        self, module: str, sources: Sequence[Factors], start: Start
    ) -> tuple[np.ndarray, np.ndarray, Carry | None]:
        start_a_RI, _, scale = of_start(module, start, {})
        a_RI, b_OR = padded_mean(sources, start_a_RI, scale)
        missed = residual(sources, a_RI, b_OR, scale)
        return a_RI, b_OR, without_rounding(missed, product_norm(*stacked(sources)))


def residual(sources: Sequence[Factors], a_RI: np.ndarray, b_OR: np.ndarray, scale: float) -> Carry:
    """Returns sum_k p_k s_k B_k A_k - s B A for the averaged A, B; its rank is at most (K - 1) r if all ranks are r."""
    left_OM, right_MI = stacked(sources)
    return Carry(np.concatenate([right_MI, a_RI]), np.concatenate([left_OM, b_OR * np.float64(-scale)], axis=1))
