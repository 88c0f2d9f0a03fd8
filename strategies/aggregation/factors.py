"""LoRA factors by module, and their weighted sum sum_k p_k s_k B_k A_k without a matrix of its size.

Shared by the low-rank rules. Knows arrays; knows nothing about rounds or nodes. Shapes: O out, I in, R rank, M the sum of
the ranks of all sources.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from edgelam_fl.model.lora import A, B
from strategies.api import Contribution, Start

_NAMES = 1 << 16  # that are remembered: each is asked about for each node of a round


@dataclass(frozen=True)
class Factors:
    """One source's version of a module."""

    source: str
    share: float  # p_k: its share of the weight of all sources of the module
    scale: float  # s_k
    a_RI: np.ndarray
    b_OR: np.ndarray

    @property
    def rank(self) -> int:
        return len(self.a_RI)


@lru_cache(maxsize=_NAMES)
def is_factor(name: str) -> bool:
    """Whether a tensor is a LoRA factor; other tensors (of a task head) are whole."""
    return name.endswith((A, B))


@lru_cache(maxsize=_NAMES)
def module_of(name: str) -> str:
    """Returns the module that a factor belongs to; for a whole tensor, its own name."""
    return name.removesuffix(A).removesuffix(B)


def in_order(contributions: Iterable[Contribution]) -> list[Contribution]:
    """Sorts contributions by source: sums must not depend on the order of the replies."""
    return sorted(contributions, key=lambda contribution: (contribution.source, contribution.weight))


def by_module(contributions: Sequence[Contribution], start: Start) -> dict[str, list[Factors]]:
    """Returns the sources of each module, in order. A factor that a source did not train is that of the start, cut to the
    source's rank.
    """
    sources: dict[str, list[Contribution]] = {}
    for contribution in in_order(contributions):
        for module in {module_of(name): None for name in contribution.tensors if is_factor(name)}:
            sources.setdefault(module, []).append(contribution)
    return {module: _factors(module, sources[module], start) for module in sorted(sources)}


def of_start(module: str, start: Start, tensors: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, float]:
    """Returns A, B and scale of a module of the global adapter, with the new `tensors` in place of the start's."""
    a_RI, b_OR = (tensors.get(module + end, start.tensors[module + end]) for end in (A, B))
    return a_RI, b_OR, start.scales.get(module, 1.0)


def _factors(module: str, sources: Sequence[Contribution], start: Start) -> list[Factors]:
    total = sum(source.weight for source in sources)
    found = []
    for source in sources:
        a_RI, b_OR = source.tensors.get(module + A), source.tensors.get(module + B)
        if a_RI is None:
            assert b_OR is not None
            a_RI = start.tensors[module + A][: b_OR.shape[1]]
        if b_OR is None:
            b_OR = start.tensors[module + B][:, : len(a_RI)]
        found.append(Factors(source.source, source.weight / total, source.scales.get(module, 1.0), a_RI, b_OR))
    return found


def stacked(sources: Sequence[Factors]) -> tuple[np.ndarray, np.ndarray]:
    """Returns left [O, M] and right [M, I] in float64, whose product is sum_k p_k s_k B_k A_k (FLoRA, arXiv 2409.05976)."""
    left_OM = np.concatenate([s.b_OR * np.float64(s.share * s.scale) for s in sources], axis=1)
    right_MI = np.concatenate([s.a_RI for s in sources], axis=0, dtype=np.float64)
    return left_OM, right_MI


def product_norm(left_OM: np.ndarray, right_MI: np.ndarray) -> float:
    """Returns ||left right||_F by triangular factors in float64, exact to rounding even if the product nearly vanishes."""
    wide = (stack.astype(np.float64) for stack in (left_OM, right_MI.T))
    left, right = (np.asarray(np.linalg.qr(stack, mode="r")) for stack in wide)
    return float(np.linalg.norm(left @ right.T))


def svd(left_OM: np.ndarray, right_MI: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns U, singular values and V^T of left @ right, at most M of them, by QR of both: O((O + I) M^2)."""
    q_left, r_left = np.linalg.qr(left_OM)
    q_right, r_right = np.linalg.qr(right_MI.T)
    u, values, vt = np.linalg.svd(r_left @ r_right.T, full_matrices=False)
    return q_left @ u, values, vt @ q_right.T
