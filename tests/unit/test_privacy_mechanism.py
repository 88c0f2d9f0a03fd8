"""Clipping and noise by their statistics over 10,000 draws; all generators are seeded."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgelam_fl.privacy.mechanism import Bound, clip_to, gaussian, secret_generator

DRAWS = 10_000


def sigma_is(draws: np.ndarray, sigma: float) -> bool:
    """Whether draws can come from N(0, sigma^2): the mean and the mean square within four of their standard errors.

    For 10,000 draws that is 2.8 % of sigma.
    """
    count = draws.size
    mean, scale = float(draws.mean()) / sigma, float(np.mean(draws**2)) / sigma**2
    return abs(mean) < 4 / math.sqrt(count) and abs(scale - 1) < 4 * math.sqrt(2 / count)


def test_noise_has_the_sigma_that_was_asked_for() -> None:
    draws = gaussian((DRAWS,), 0.3, np.random.default_rng(1))
    assert sigma_is(draws, 0.3)
    within = [np.mean(np.abs(draws) < times * 0.3) for times in (1, 2, 3)]
    assert within == pytest.approx([0.6827, 0.9545, 0.9973], abs=0.015)


@pytest.mark.parametrize("wrong", [0.95, 1.05])
def test_a_sigma_wrong_by_five_percent_is_noticed(wrong: float) -> None:
    assert not sigma_is(gaussian((DRAWS,), 0.3 * wrong, np.random.default_rng(1)), 0.3)


def test_no_noise_is_no_noise() -> None:
    assert not gaussian((3, 2), 0.0, np.random.default_rng(1)).any()


def test_nobody_can_repeat_the_noise_of_a_run() -> None:
    assert secret_generator().random() != secret_generator().random()


def test_an_update_is_clipped_as_one_vector() -> None:
    generator = np.random.default_rng(2)
    for _ in range(2000):
        size = 10 ** generator.uniform(-2, 2)
        update = {"a": size * generator.normal(size=(2, 3)), "b": size * generator.normal(size=4)}
        whole = np.concatenate([array.ravel() for array in update.values()])
        clipped, norm = clip_to(update, 1.5)
        assert norm == pytest.approx(np.linalg.norm(whole))
        short = np.concatenate([array.ravel() for array in clipped.values()])
        assert np.linalg.norm(short) == pytest.approx(min(norm, 1.5))
        assert short == pytest.approx(whole * min(1.0, 1.5 / norm))


def test_an_update_within_the_bound_keeps_its_bits() -> None:
    update = {"a": np.array([0.1, -0.2], np.float32)}
    clipped, norm = clip_to(update, 1.0)
    assert clipped["a"] is update["a"]
    assert norm == pytest.approx(math.sqrt(0.05))


def test_the_norm_of_a_large_update_does_not_overflow() -> None:
    clipped, norm = clip_to({"a": np.array([3e30, 4e30], np.float32)}, 5.0)
    assert norm == pytest.approx(5e30)
    assert clipped["a"] == pytest.approx([3.0, 4.0])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_update_that_is_not_finite_is_not_clipped(bad: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        clip_to({"a": np.array([1.0, bad])}, 1.0)


def test_an_adaptive_bound_comes_to_the_quantile_of_the_norms() -> None:
    generator = np.random.default_rng(3)
    bound, bounds = Bound(0.1, quantile=0.7), []
    for _ in range(300):
        norms = np.exp(generator.normal(size=50))
        bound = bound.after(int(np.sum(norms <= bound.clip)), 50, 50, 1.0, generator)
        bounds.append(bound.clip)
    # The 0.7 quantile of exp(N(0, 1)) is exp(0.524).
    assert np.mean(bounds[-150:]) == pytest.approx(math.exp(0.524), rel=0.1)


def test_a_fixed_bound_stays_and_costs_nothing() -> None:
    bound = Bound(2.0)
    assert bound.after(0, 50, 50, 1.0, np.random.default_rng(3)) is bound
    assert (bound.update_noise(1.3), bound.count_noise(1.3)) == (1.3, 0.0)


def test_the_noises_of_an_adaptive_bound_are_together_the_one_that_is_accounted_for() -> None:
    bound = Bound(2.0, quantile=0.5)
    of_update, of_count = bound.update_noise(1.3), bound.count_noise(1.3)
    assert 1 / of_update**2 + 1 / (2 * of_count) ** 2 == pytest.approx(1 / 1.3**2)


def test_the_noise_on_the_count_is_that_which_is_accounted_for() -> None:
    """The bound's logarithm moves by the noisy share, so that the count's noise can be read from it."""
    generator, bound = np.random.default_rng(4), Bound(1.0, quantile=0.5)
    after = [bound.after(30, 60, 600, 1.3, generator).clip for _ in range(DRAWS)]
    counts = -np.log(after) / 0.2 * 600
    assert sigma_is(counts, bound.count_noise(1.3))
    assert not sigma_is(counts, bound.count_noise(1.3) * 1.05)


def test_updates_that_do_not_come_leave_the_bound_in_the_middle() -> None:
    """A count of nobody says nothing: the noise alone moves the bound, around a share of one half."""
    generator, bound = np.random.default_rng(5), Bound(1.0, quantile=0.5)
    after = [bound.after(0, 0, 100, 1.0, generator).clip for _ in range(1000)]
    assert np.mean(np.log(after)) == pytest.approx(0.0, abs=0.001)
