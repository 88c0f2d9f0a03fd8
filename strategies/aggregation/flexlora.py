"""FlexLoRA (arXiv 2402.11505): average the products, then hand them out again as factors by SVD.

dW = sum_k p_k s_k B_k A_k = U S V^T; B = U S / s and A = V^T, cut to the module's largest rank here and to a node's own
rank on the way to it (which is the SVD's best choice at that rank, since the rows of A stand in order). Sources may
differ in rank. With the ranks of all sources together it is exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from strategies.aggregation.factors import A, B, Factors, by_module, of_start, stacked, svd
from strategies.aggregation.fedavg import mean_of_heads
from strategies.base import Aggregated, Aggregation, Contribution, Start


class FlexLora(Aggregation):
    unequal_ranks = True

    def aggregate(self, contributions: Sequence[Contribution], start: Start) -> Aggregated:
        new = mean_of_heads(contributions)
        for module, sources in by_module(contributions, start).items():
            start_a_RI, _, scale = of_start(module, start, {})
            new[module + A], new[module + B] = _from_product(sources, start_a_RI, scale)
        return Aggregated(new)


def _from_product(sources: Sequence[Factors], start_a_RI: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """A and B of the weighted sum, in the start's rank. One source in that rank is left as it is."""
    rank = len(start_a_RI)
    if len(sources) == 1 and (sources[0].rank, sources[0].scale) == (rank, scale):
        return sources[0].a_RI, sources[0].b_OR
    u, values, vt = svd(*stacked(sources))
    a_RI, b_OR = start_a_RI.copy(), np.zeros((len(u), rank), np.float32)
    kept = min(
        rank, len(values)
    )  # rows beyond these keep the start's A: with zeros in both factors they would never learn
    a_RI[:kept] = vt[:kept]
    b_OR[:, :kept] = u[:, :kept] * (values[:kept] / scale)
    return a_RI, b_OR
