"""FLoRA (arXiv 2409.05976): stacks the sources' factors, adds their product to the base and starts new factors.

Exact, for unequal ranks too; s_k is folded into the weights. The base is quantized, so the product goes to the module's carry
factors, and each node downloads those of its own layers. Every round has a new random A, seeded by run, round and module, and
B = 0, so optimizers start without moments. A module with one source keeps its factors.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from strategies.aggregation.carry import Carry, CarryRule
from strategies.aggregation.factors import A, B, Factors, stacked
from strategies.api import Start


class FLoRA(CarryRule):
    restarts_factors = True

    def combine(
        self, module: str, sources: Sequence[Factors], start: Start
    ) -> tuple[np.ndarray, np.ndarray, Carry | None]:
        a_RI = start.tensors[module + A]
        return fresh(module, a_RI.shape, start), np.zeros_like(start.tensors[module + B]), merged(sources)


def merged(sources: Sequence[Factors]) -> Carry:
    """Returns what the round adds to the base: sum_k p_k s_k B_k A_k, with the sum of the sources' ranks."""
    left_OM, right_MI = stacked(sources)
    return Carry(right_MI, left_OM)


def fresh(module: str, shape: tuple[int, ...], start: Start) -> np.ndarray:
    """Draws A as peft does, uniform in +-1/sqrt(in). Its first rows are the same in every rank."""
    bound = shape[1] ** -0.5
    generator = np.random.default_rng([start.seed, start.round, zlib.crc32(module.encode())])
    return generator.uniform(-bound, bound, shape).astype(np.float32)
