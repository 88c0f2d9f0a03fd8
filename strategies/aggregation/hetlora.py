"""HetLoRA (arXiv 2401.06432): factors of unequal ranks are padded with zeros, averaged, and cut to each node's rank.

A source weighs as its update's size, s_k ||B_k A_k||_F, instead of its labels. s_k is folded into B, since it differs
with the rank. The cut happens on the way to a node. Inexact as FedIT is. Not built: a node's pruning of its own rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from strategies.aggregation.factors import A, B, Factors, by_module, of_start, product_norm
from strategies.aggregation.fedavg import mean_of_heads
from strategies.base import Aggregated, Aggregation, Contribution, Start


class HetLora(Aggregation):
    unequal_ranks = True

    def aggregate(self, contributions: Sequence[Contribution], start: Start) -> Aggregated:
        new = mean_of_heads(contributions)
        for module, sources in by_module(contributions, start).items():
            a_RI, _, scale = of_start(module, start, {})
            new[module + A], new[module + B] = _padded_mean(sources, a_RI, scale)
        return Aggregated(new)


def _padded_mean(sources: Sequence[Factors], start_a_RI: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """A and B in the start's rank. One source in that rank is left as it is."""
    rank = len(start_a_RI)
    if len(sources) == 1 and (sources[0].rank, sources[0].scale) == (rank, scale):
        return sources[0].a_RI, sources[0].b_OR
    a_RI = np.zeros(start_a_RI.shape)
    b_OR = np.zeros((len(sources[0].b_OR), rank))
    for source, weight in zip(sources, _by_size(sources), strict=True):
        a_RI[: source.rank] += weight * source.a_RI
        b_OR[:, : source.rank] += np.float64(weight * source.scale / scale) * source.b_OR
    held = max(source.rank for source in sources)  # rows that nobody trained stay the start's: zeros would never learn
    a_RI[held:] = start_a_RI[held:]
    return a_RI.astype(np.float32), b_OR.astype(np.float32)


def _by_size(sources: Sequence[Factors]) -> list[float]:
    """Each source's share of the updates' sizes; of the labels, where nothing was learned yet."""
    sizes = [source.scale * product_norm(source.b_OR, source.a_RI) for source in sources]
    return [size / sum(sizes) for size in sizes] if sum(sizes) else [source.share for source in sources]
