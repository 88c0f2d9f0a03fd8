"""FlexLoRA (arXiv 2402.11505): average the products, then hand them out again as factors by SVD.

dW = sum_k p_k s_k B_k A_k = U S V^T; B = U S / s and A = V^T, cut to the module's largest rank here and to a node's own
rank on the way to it (which is the SVD's best choice at that rank, since the rows of A stand in order). Sources may
differ in rank. With the ranks of all sources together it is exact.
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
