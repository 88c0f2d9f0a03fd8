"""FlexLoRA (arXiv 2402.11505): averages the products and factors the mean again by SVD.

dW = sum_k p_k s_k B_k A_k = U S V^T; B = U S / s and A = V^T, cut to the module's largest rank here and to a node's own rank
when they are sent to it (the best approximation at that rank, since the rows of A are in order of their singular values).
Sources may differ in rank. The result is exact if the module's rank is at least the sum of the sources' ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from strategies.aggregation.factors import Factors, stacked, svd
from strategies.aggregation.ranked import RankedRule


class FlexLora(RankedRule):
    def combine(
        self, sources: Sequence[Factors], start_a_RI: np.ndarray, scale: float
    ) -> tuple[np.ndarray, np.ndarray]:
        rank = len(start_a_RI)
        u, values, vt = svd(*stacked(sources))
        a_RI, b_OR = start_a_RI.copy(), np.zeros((len(u), rank), np.float32)
        kept = min(
            rank, len(values)
        )  # rows beyond these keep the start's A: with zeros in both factors they would never learn
        a_RI[:kept] = vt[:kept]
        b_OR[:, :kept] = u[:, :kept] * (values[:kept] / scale)
        return a_RI, b_OR
