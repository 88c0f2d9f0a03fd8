"""Carry factors: low-rank factors that a rule adds to a module for good, beside a base that never changes (s = 1).

Holds their mathematics and the base class of the rules that make them; `edgelam_fl.model.carry` says how they are named.
Shapes: O out, I in, M rank.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgelam_fl.model.carry import CARRY_A, CARRY_B, is_carry
from strategies.aggregation.factors import A, B, Factors, by_module, of_start, svd
from strategies.aggregation.fedavg import mean_of_heads
from strategies.api import Aggregated, Aggregation, Contribution, Start

_ROUNDING = 1e-7  # share of the whole: smaller singular values are the rounding of fp32, not part of a residual


@dataclass(frozen=True)
class Carry:
    """The carry factors of one module, a [M, I] and b [O, M]; their product is added to the module's weight."""

    a_MI: np.ndarray
    b_OM: np.ndarray

    @property
    def rank(self) -> int:
        return len(self.a_MI)


def carry_of(module: str, tensors: Mapping[str, np.ndarray]) -> Carry | None:
    """Returns the carry factors of a module; None if it has none."""
    a_MI = tensors.get(module + CARRY_A)
    return None if a_MI is None else Carry(a_MI, tensors[module + CARRY_B])


def added(one: Carry | None, other: Carry) -> Carry:
    """Adds two carries exactly: the ranks add up, and the factors of the first come first."""
    if one is None:
        return other
    return Carry(np.concatenate([one.a_MI, other.a_MI]), np.concatenate([one.b_OM, other.b_OM], axis=1))


@dataclass(frozen=True)
class Cut:
    """A carry after it was cut to a rank, and how much that lost."""

    carry: Carry
    lost: float = 0.0  # Frobenius norm of what was cut off
    whole: float = 0.0  # Frobenius norm of the carry before; 0 if nothing was cut


def compressed(carry: Carry, most_rank: int) -> Cut:
    """Cuts a carry to its best approximation of at most this rank."""
    if carry.rank <= most_rank:
        return Cut(carry)
    u, values, vt = svd(carry.b_OM.astype(np.float64), carry.a_MI.astype(np.float64))
    kept = Carry(vt[:most_rank], u[:, :most_rank] * values[:most_rank])
    return Cut(kept, float(np.linalg.norm(values[most_rank:])), float(np.linalg.norm(values)))


def without_rounding(carry: Carry, whole: float) -> Carry | None:
    """Returns the same product in its true rank, without what is below fp32's rounding of `whole`; None if that is all."""
    u, values, vt = svd(carry.b_OM.astype(np.float64), carry.a_MI.astype(np.float64))
    rank = int(np.count_nonzero(values > _ROUNDING * whole))
    return Carry(vt[:rank], u[:, :rank] * values[:rank]) if rank else None


class CarryRule(Aggregation, ABC):
    """A rule that adds to the carry factors of every module with two or more sources. A single source keeps its factors."""

    unequal_ranks = True
    carries = True
    factors_alone = True

    def __init__(self, *, residual: str = "exact") -> None:
        """`residual`: "exact" keeps all that is added, in whatever rank that takes, up to a module's full rank; "svd:RANK"
        cuts the carry of a module to its RANK largest singular values in every round.
        """
        if not re.fullmatch(r"exact|svd:[1-9]\d{0,4}", residual):
            raise ValueError(f"residual = {residual!r} must be 'exact', or 'svd:RANK' as in 'svd:64'")
        self.most_carry_rank = 0 if residual == "exact" else int(residual.removeprefix("svd:"))  # 0: the full rank

    def aggregate(self, contributions: Sequence[Contribution], start: Start) -> Aggregated:
        new, carries, cuts = mean_of_heads(contributions), dict[str, np.ndarray](), list[Cut]()
        for module, sources in by_module(contributions, start).items():
            start_a_RI, _, scale = of_start(module, start, {})
            if len(sources) == 1:
                new[module + A], new[module + B] = padded_mean(sources, start_a_RI, scale)
                continue
            new[module + A], new[module + B], more = self.combine(module, sources, start)
            if more is not None:
                cuts.append(self._cut(added(carry_of(module, start.tensors), more)))
                carries[module + CARRY_A] = cuts[-1].carry.a_MI.astype(np.float32)
                carries[module + CARRY_B] = cuts[-1].carry.b_OM.astype(np.float32)
        return Aggregated(new, carry=carries, facts=_facts(cuts, carries, start))

    @abstractmethod
    def combine(
        self, module: str, sources: Sequence[Factors], start: Start
    ) -> tuple[np.ndarray, np.ndarray, Carry | None]:
        """Returns A and B of a module, in the rank of the start's A, and what is added to its carry."""

    def _cut(self, carry: Carry) -> Cut:
        full_rank = min(carry.a_MI.shape[1], len(carry.b_OM))
        return compressed(carry, min(self.most_carry_rank or full_rank, full_rank))


def padded_mean(sources: Sequence[Factors], start_a_RI: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the weighted mean (A, B) of factors, each padded with zeros to the start's rank; a single source keeps its own.

    s_k is folded into B. Rows of A that no source has come from the start: zeros in both factors would never learn.
    """
    if len(sources) == 1 and (sources[0].rank, sources[0].scale) == (len(start_a_RI), scale):
        return sources[0].a_RI, sources[0].b_OR
    a_RI = np.zeros(start_a_RI.shape)
    b_OR = np.zeros((len(sources[0].b_OR), len(start_a_RI)))
    for source in sources:
        a_RI[: source.rank] += source.share * source.a_RI
        b_OR[:, : source.rank] += np.float64(source.share * source.scale / scale) * source.b_OR
    held = max(source.rank for source in sources)
    a_RI[held:] = start_a_RI[held:]
    return a_RI.astype(np.float32), b_OR.astype(np.float32)


def _facts(cuts: Sequence[Cut], carries: Mapping[str, np.ndarray], start: Start) -> dict[str, float]:
    """Describes the carry factors for the round's event: their size, and which share of those that changed was cut off."""
    there = {name: array for name, array in {**start.tensors, **carries}.items() if is_carry(name)}
    if not there:
        return {}
    whole = math.hypot(*(cut.whole for cut in cuts))
    return {
        "carry_bytes": sum(4 * array.size for array in there.values()),
        "carry_rank": max(len(array) for name, array in there.items() if name.endswith(CARRY_A)),
        "carry_error": math.hypot(*(cut.lost for cut in cuts)) / whole if whole else 0.0,
    }


def product_of(module: str, start: Start, tensors: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Returns left [O, M] and right [M, I], whose product is s B A plus what the carry gained since the start.

    `tensors` are the new ones.
    """
    a_RI, b_OR, scale = of_start(module, start, tensors)
    lefts, rights = [b_OR * np.float64(scale)], [a_RI]
    old, new = carry_of(module, start.tensors), carry_of(module, tensors)
    if new is not None and old is not None:
        kept = old.rank if np.array_equal(new.a_MI[: old.rank], old.a_MI) else 0
        if not kept or not np.array_equal(new.b_OM[:, :kept], old.b_OM):
            kept = 0
            lefts, rights = [*lefts, -old.b_OM], [*rights, old.a_MI]
        new = Carry(new.a_MI[kept:], new.b_OM[:, kept:])
    if new is not None:
        lefts, rights = [*lefts, new.b_OM], [*rights, new.a_MI]
    return np.concatenate(lefts, axis=1), np.concatenate(rights, dtype=np.float64)
