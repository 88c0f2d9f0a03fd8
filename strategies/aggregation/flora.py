"""FLoRA (arXiv 2409.05976): stack the sources' factors, add the product to the base, start new factors.

Exact for unequal ranks; s_k is folded into the weights. Not in the table of strategies yet: see `carry`. Then each round
begins from a fresh A, seeded by (run, round, module), and B = 0, and a node downloads the carry of the layers it holds.
"""

from __future__ import annotations

from collections.abc import Sequence

from strategies.aggregation.carry import Carry
from strategies.aggregation.factors import Factors, stacked


def merged(sources: Sequence[Factors]) -> Carry:
    """What the round adds to the base: sum_k p_k s_k B_k A_k, of the sources' ranks together."""
    left_OM, right_MI = stacked(sources)
    return Carry(right_MI, left_OM)
