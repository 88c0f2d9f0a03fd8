"""HetLoRA (arXiv 2401.06432): pads factors of unequal ranks with zeros, averages them, and cuts them to each node's rank.

The weight of a source is the size of its update, s_k ||B_k A_k||_F, instead of its labels. s_k is folded into B, since it depends
on the rank. Factors are cut when they are sent to a node. Inexact as FedIT is. A node's pruning of its own rank is not built.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from strategies.aggregation.factors import Factors, product_norm
from strategies.aggregation.ranked import RankedRule


class HetLora(RankedRule):
    def combine(
        self, sources: Sequence[Factors], start_a_RI: np.ndarray, scale: float
    ) -> tuple[np.ndarray, np.ndarray]:
        rank = len(start_a_RI)
        a_RI = np.zeros(start_a_RI.shape)
        b_OR = np.zeros((len(sources[0].b_OR), rank))
        for source, weight in zip(sources, _by_size(sources), strict=True):
            a_RI[: source.rank] += weight * source.a_RI
            b_OR[:, : source.rank] += np.float64(weight * source.scale / scale) * source.b_OR
        held = max(
            source.rank for source in sources
        )  # rows that nobody trained stay the start's: zeros would never learn
        a_RI[held:] = start_a_RI[held:]
        return a_RI.astype(np.float32), b_OR.astype(np.float32)


def _by_size(sources: Sequence[Factors]) -> list[float]:
    """Returns each source's share of the sizes of all updates; its share of the labels if nothing was learned yet."""
    sizes = [source.scale * product_norm(source.b_OR, source.a_RI) for source in sources]
    return [size / sum(sizes) for size in sizes] if sum(sizes) else [source.share for source in sources]
