"""A run's LoRA beyond rank, alpha and targets, under peft's names and with their meaning. Imports no torch.

The keys are layers_to_transform, use_rslora, use_dora, modules_to_save, rank_pattern and alpha_pattern of peft's LoraConfig. Knows
modules by name; knows neither which of them a model has (`model.adapter`) nor who holds them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

# Ends of the names of a module's tensors: LoRA's two factors, and DoRA's number per row of the matrix.
A, B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
MOST_RANK = 1024  # what lora.rank of a run file allows; nodes refuse plans with more


@dataclass(frozen=True)
class OwnTerms:
    """Modules that have a rank or an alpha of their own."""

    modules: tuple[str, ...]
    rank: int = 0  # 0: the node's
    alpha: float = 0.0  # 0: the run's


@dataclass(frozen=True)
class LoraKind:
    """The adapters of a run, compared with plain LoRA on all layers."""

    layers: tuple[int, ...] = ()  # those with adapters; none: all
    rslora: bool = False  # scales by alpha / sqrt(rank) instead of alpha / rank (arXiv 2312.03732)
    dora: bool = False  # W' = m (W + s B A) / ||W + s B A||, a norm and an m per row (arXiv 2402.09353, equation 5)
    saved: tuple[str, ...] = ()  # ends of the names of modules that learn as a whole
    own: tuple[OwnTerms, ...] = ()

    @cached_property
    def _terms(self) -> dict[str, OwnTerms]:
        return {module: terms for terms in self.own for module in terms.modules}

    def rank_of(self, module: str, rank: int) -> int:
        """Returns the rank of a module on a node whose rank is `rank`."""
        terms = self._terms.get(module)
        return terms.rank if terms and terms.rank else rank

    def alpha_of(self, module: str, alpha: float) -> float:
        """Returns the alpha of a module in a run whose alpha is `alpha`."""
        terms = self._terms.get(module)
        return terms.alpha if terms and terms.alpha else alpha

    def scale_of(self, module: str, rank: int, alpha: float) -> float:
        """Returns s in W + s B A of a module. `rank`: that of its factors. `alpha`: the run's."""
        return self.alpha_of(module, alpha) / (math.sqrt(rank) if self.rslora else rank)

    def alpha_for(self, scale: float, rank: int) -> float:
        """Returns the alpha with which factors of this rank are scaled by `scale`."""
        return scale * (math.sqrt(rank) if self.rslora else rank)


PLAIN = LoraKind()


def own_terms(modules: Iterable[str], ranks: Mapping[str, int], alphas: Mapping[str, float]) -> tuple[OwnTerms, ...]:
    """Returns the modules that a rank_pattern or an alpha_pattern matches, in groups of equal terms."""
    groups: dict[tuple[int, float], list[str]] = {}
    for module in modules:
        terms = int(_first(ranks, module)), _first(alphas, module)
        if any(terms):
            groups.setdefault(terms, []).append(module)
    return tuple(OwnTerms(tuple(found), *terms) for terms, found in groups.items())


def _first(patterns: Mapping[str, float], module: str) -> float:
    """Returns the value of the first pattern that matches; 0: none does."""
    return next((value for pattern, value in patterns.items() if matches(pattern, module)), 0)


def matches(pattern: str, module: str) -> bool:
    """Returns whether a key of a pattern, a regular expression, matches whole name parts at the end of a module's name, as in peft."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def pattern_of(modules: Iterable[str]) -> str:
    """Returns a key of a pattern that matches exactly these modules."""
    return "|".join(re.escape(module) for module in modules)
