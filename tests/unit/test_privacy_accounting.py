"""Epsilon against sources that share no code with the accountant: closed forms, written out here.

Renyi divergences: Mironov (arXiv 1702.07476) for the Gaussian, Mironov et al. (arXiv 1908.10530, section 3.3) for the
Poisson-sampled Gaussian at integer orders, Canonne et al. (arXiv 2004.00010, proposition 12) for the conversion. Exact Gaussian: Balle and
Wang (arXiv 1805.06530, theorem 8), in which a composition of Gaussians is one Gaussian.
"""

from __future__ import annotations

import builtins
import math
from typing import Any

import numpy as np
import pytest

from edgelam_fl.errors import ConfigError
from edgelam_fl.privacy.accounting import Releases, epsilon_of, noise_for, rounds_within

# noise, rounds, releases per round, sampling, delta
WITHOUT_SAMPLING = [
    (0.8, 1, 1, 1.0, 1e-5),
    (1.0, 1, 1, 1.0, 1e-5),
    (2.0, 10, 1, 1.0, 1e-5),
    (5.0, 30, 1, 1.0, 1e-6),
    (8.0, 100, 1, 1.0, 1e-5),
    (4.0, 4, 11, 1.0, 1e-4),
    (20.0, 100, 3, 1.0, 1e-6),
    (50.0, 1000, 1, 1.0, 1e-5),
    (1.5, 2, 2, 1.0, 1e-3),
    (100.0, 200, 10, 1.0, 1e-7),
]
WITH_SAMPLING = [
    (0.7, 20, 1, 0.1, 1e-5),
    (1.0, 100, 1, 0.1, 1e-5),
    (1.0, 1000, 1, 0.01, 1e-5),
    (2.0, 50, 1, 0.5, 1e-5),
    (1.5, 30, 1, 0.2, 1e-4),
    (3.0, 40, 5, 0.25, 1e-5),
    (1.2, 10, 1, 0.05, 1e-6),
    (4.0, 200, 2, 0.3, 1e-6),
    (0.9, 60, 1, 0.02, 1e-5),
    (6.0, 20, 11, 0.5, 1e-3),
]
ORDERS = [1 + x / 10 for x in range(1, 100)] + list(range(11, 400))


def renyi(noise: float, sampling: float, order: float) -> float:
    """Returns the Renyi divergence of one (sampled) Gaussian release: of integer order by the binomial sum, else by an integral."""
    if sampling == 1:
        return order / (2 * noise**2)
    if order == int(order):
        terms = np.array(
            [
                math.lgamma(order + 1) - math.lgamma(k + 1) - math.lgamma(order - k + 1)
                + (order - k) * math.log1p(-sampling) + k * math.log(sampling) + k * (k - 1) / (2 * noise**2)
                for k in range(int(order) + 1)
            ]
        )  # fmt: skip
    else:
        x = np.linspace(-12 * noise - 2, 12 * noise + order + 2, 4001)
        ratio = np.log1p(sampling * np.expm1((2 * x - 1) / (2 * noise**2)))
        terms = order * ratio - x**2 / (2 * noise**2) + math.log((x[1] - x[0]) / (noise * math.sqrt(2 * math.pi)))
    return float(np.logaddexp.reduce(terms)) / (order - 1)


def epsilon_by_renyi(noise: float, rounds: int, sampling: float, delta: float, orders: Any) -> float:
    """Returns epsilon by the best of the orders."""
    return min(
        rounds * renyi(noise, sampling, order) + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)
        for order in orders
    )


def exact_delta(noise: float, epsilon: float) -> float:
    """Returns the delta of one Gaussian release at this epsilon."""

    def below(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    half, shift = 1 / (2 * noise), epsilon * noise
    return below(half - shift) - math.exp(epsilon) * below(-half - shift)


def exact_epsilon(noise: float, delta: float) -> float:
    low, high = 0.0, 500.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if exact_delta(noise, middle) > delta else (low, middle)
    return high


@pytest.mark.parametrize(("noise", "rounds", "per_round", "sampling", "delta"), WITHOUT_SAMPLING)
def test_epsilon_of_gaussians_is_that_of_the_closed_forms(
    noise: float, rounds: int, per_round: int, sampling: float, delta: float
) -> None:
    releases = Releases(noise, rounds, per_round, sampling)
    together = noise / math.sqrt(rounds * per_round)
    fractional = [1 + x / 50 for x in range(1, 1500)]
    by_renyi = epsilon_by_renyi(together, 1, 1.0, delta, fractional)
    assert epsilon_of(releases, delta, "rdp") == pytest.approx(by_renyi, rel=0.01)
    assert epsilon_of(releases, delta, "pld") == pytest.approx(exact_epsilon(together, delta), rel=0.01)


@pytest.mark.parametrize(("noise", "rounds", "per_round", "sampling", "delta"), WITH_SAMPLING)
def test_epsilon_of_sampled_gaussians_is_that_of_the_binomial_sum_and_privacy_losses(
    noise: float, rounds: int, per_round: int, sampling: float, delta: float
) -> None:
    releases = Releases(noise, rounds, per_round, sampling)
    of_round = noise / math.sqrt(per_round)
    by_renyi = epsilon_by_renyi(of_round, rounds, sampling, delta, ORDERS)
    assert epsilon_of(releases, delta, "rdp") == pytest.approx(by_renyi, rel=0.01)
    assert epsilon_of(releases, delta, "pld") == pytest.approx(
        epsilon_by_privacy_losses(of_round, rounds, sampling, delta), rel=0.01
    )


def epsilon_by_privacy_losses(noise: float, rounds: int, sampling: float, delta: float) -> float:
    """Returns epsilon by a grid of privacy losses of our own: rounded to the nearest, and composed by Fourier transform.

    Both directions of the neighbouring relation, with the tails outside the grid left out.
    """
    step, half = 2e-3, 2**15
    return max(_direction(noise, rounds, sampling, delta, step, half, adds) for adds in (False, True))


def _direction(noise: float, rounds: int, sampling: float, delta: float, step: float, half: int, adds: bool) -> float:
    x = np.linspace(-12 * noise - 2, 12 * noise + 3, 100_001)
    without = np.exp(-0.5 * (x / noise) ** 2) / (noise * math.sqrt(2 * math.pi))
    moved = np.exp(-0.5 * ((x - 1) / noise) ** 2) / (noise * math.sqrt(2 * math.pi))
    mixed = (1 - sampling) * without + sampling * moved
    loss = np.log1p(sampling * np.expm1((2 * x - 1) / (2 * noise**2)))
    upper, loss = (without, -loss) if adds else (mixed, loss)
    masses = np.zeros(2 * half)
    # Each loss is shared between its two neighbours on the grid, so that the mean is kept over many rounds.
    place = loss / step
    below = np.floor(place).astype(int)
    part = place - below
    weight = upper * (x[1] - x[0])
    np.add.at(masses, below % (2 * half), weight * (1 - part))
    np.add.at(masses, (below + 1) % (2 * half), weight * part)
    together = np.fft.irfft(np.fft.rfft(masses) ** rounds, 2 * half)
    losses = np.concatenate([np.arange(half), np.arange(-half, 0)]) * step
    low, high = 0.0, half * step
    while high - low > 1e-6:
        middle = (low + high) / 2
        above = losses > middle
        hockey_stick = float(np.sum(together[above] * -np.expm1(middle - losses[above])))
        low, high = (middle, high) if hockey_stick > delta else (low, middle)
    return high


@pytest.mark.parametrize(("accountant", "sampling"), [("pld", 0.1), ("pld", 1.0), ("rdp", 1.0)])
def test_noise_for_a_budget_is_the_smallest_that_keeps_it(accountant: str, sampling: float) -> None:
    noise = noise_for(4.0, 1e-5, 20, 1, sampling, accountant)
    assert epsilon_of(Releases(noise, 20, 1, sampling), 1e-5, accountant) <= 4.0
    assert epsilon_of(Releases(noise * 0.999, 20, 1, sampling), 1e-5, accountant) > 4.0
    assert rounds_within(4.0, 1e-5, Releases(noise, 40, 1, sampling), accountant) == 20


def test_more_of_everything_costs_more_privacy() -> None:
    usual = epsilon_of(Releases(2.0, 10, 1, 0.2), 1e-5)
    assert epsilon_of(Releases(2.0, 10, 2, 0.2), 1e-5) > usual
    assert epsilon_of(Releases(2.0, 11, 1, 0.2), 1e-5) > usual
    assert epsilon_of(Releases(2.0, 10, 1, 0.3), 1e-5) > usual
    assert epsilon_of(Releases(1.9, 10, 1, 0.2), 1e-5) > usual
    assert epsilon_of(Releases(2.0, 10, 1, 0.2), 1e-6) > usual
    assert epsilon_of(Releases(2.0, 0), 1e-5) == 0
    assert epsilon_of(Releases(0.0, 1), 1e-5) == math.inf


def test_no_round_fits_a_budget_that_the_first_exceeds() -> None:
    assert rounds_within(1.0, 1e-5, Releases(0.5, 10)) == 0


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("dp_accounting"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'edgelam-fl\[privacy\]'"):
        epsilon_of(Releases(1.0, 1), 1e-5)
