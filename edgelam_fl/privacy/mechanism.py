"""Clipping, Gaussian noise, and a clipping bound that follows the updates: the arithmetic of differential privacy.

Knows arrays and numbers. Does not know what they promise (see `privacy.accounting`), nor whose they are. The noise is the
ordinary floating-point Gaussian of numpy: attacks on the last bits of such noise (Mironov, CCS 2012) are not answered here.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

COUNT_SHARE = 0.1
"""Share of a round's privacy that an adaptive bound spends on its count of the updates that it left whole."""
_BOUND_RATE = 0.2  # how fast an adaptive bound moves: eta_C of arXiv 1905.03871, section 3.1
_MOST_CHANGE = 1e3  # of an adaptive bound over a run, both ways


def secret_generator() -> np.random.Generator:
    """Returns a generator that nobody can repeat: noise whose seed is known protects nothing."""
    return np.random.default_rng(secrets.randbits(256))


def clip_to(tensors: Mapping[str, np.ndarray], bound: float) -> tuple[dict[str, np.ndarray], float]:
    """Returns the tensors, shortened as one vector to an L2 norm of at most `bound`, and their norm before that.

    Tensors within the bound are returned as they are. Raises ValueError for a norm that is not finite.
    """
    norm = math.sqrt(math.fsum(float(np.sum(np.square(array, dtype=np.float64))) for array in tensors.values()))
    if not math.isfinite(norm):
        raise ValueError("an update whose norm is not finite cannot be clipped")
    if norm <= bound:
        return dict(tensors), norm
    return {name: array * np.float64(bound / norm) for name, array in tensors.items()}, norm


def gaussian(shape: tuple[int, ...], sigma: float, generator: np.random.Generator) -> np.ndarray:
    """Returns independent draws from N(0, sigma^2) as float64; zeros for a sigma of 0."""
    return generator.normal(0.0, sigma, shape) if sigma else np.zeros(shape)


@dataclass(frozen=True)
class Bound:
    """A clipping bound: fixed, or following a quantile of the updates' norms (arXiv 1905.03871)."""

    clip: float
    """The L2 norm that an update may have in the coming round."""
    quantile: float = 0.0
    """Share of the updates that the bound is to leave whole; 0: the bound is fixed."""
    first: float = 0.0
    """The bound of the first round, from which an adaptive one moves at most a factor of 1000; 0: `clip`."""

    def update_noise(self, noise: float) -> float:
        """Returns the noise multiplier of the updates, if `noise` is that of everything which a round releases.

        An adaptive bound also releases a count. With the sensitivity 1/2 of a count around its middle, the count's noise z_b
        and the updates' z_u together are one release of 1/z^2 = 1/z_u^2 + 1/(2 z_b)^2 (arXiv 1905.03871, theorem 1).
        """
        return noise / math.sqrt(1 - COUNT_SHARE) if self.quantile else noise

    def count_noise(self, noise: float) -> float:
        """Returns the standard deviation of the noise on the count of the updates that were left whole."""
        return noise / (2 * math.sqrt(COUNT_SHARE)) if self.quantile else 0.0

    def after(self, whole: int, came: int, expected: float, noise: float, generator: np.random.Generator) -> Bound:
        """Returns the bound of the next round, after one in which `whole` of `came` updates were left whole.

        `expected`: the number of updates that a round is planned to have, a constant. Each update counts +1/2 if it was left
        whole, else -1/2, so that an update which is missing counts nothing.
        """
        if not self.quantile:
            return self
        noisy = (whole - came / 2) + float(gaussian((), self.count_noise(noise), generator))
        share = min(1.0, max(0.0, noisy / expected + 0.5))
        first = self.first or self.clip
        clip = self.clip * math.exp(-_BOUND_RATE * (share - self.quantile))
        return replace(self, clip=min(max(clip, first / _MOST_CHANGE), first * _MOST_CHANGE), first=first)
