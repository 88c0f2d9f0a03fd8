"""Attacks on membership, canaries and updates: what they measure is right, on data whose answer is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import pytest

from edgelam_fl.privacy.attacks import membership
from edgelam_fl.privacy.attacks.canaries import chance_exposure, every_secret, exposure, log_probabilities
from edgelam_fl.privacy.attacks.membership import by_loss, by_reference, separation, share_found
from edgelam_fl.privacy.attacks.updates import share_of_best, token_scores, whitening


def test_the_area_is_the_share_of_pairs_in_order_and_equal_scores_count_half() -> None:
    chance = np.random.default_rng(0)
    members_N, others_M = chance.integers(0, 30, 90) + 4.0, chance.integers(0, 30, 140).astype(float)
    higher_NM, alike_NM = members_N[:, None] > others_M, members_N[:, None] == others_M
    expected = (higher_NM + alike_NM / 2).mean()
    assert membership.auc(members_N, others_M) == pytest.approx(expected)
    assert membership.auc(others_M, members_N) == pytest.approx(1 - expected)
    assert membership.auc(members_N, members_N) == pytest.approx(membership.CHANCE_AUC)


def test_the_interval_holds_the_truth_and_shrinks_with_the_examples() -> None:
    truth = NormalDist().cdf(1 / math.sqrt(2))  # of two normal distributions that lie one deviation apart
    chance = np.random.default_rng(1)
    few, many = (separation(chance.normal(1, 1, n), chance.normal(0, 1, n)) for n in (50, 800))
    for found in (few, many):
        assert found.low < truth < found.high
        assert found.low < found.auc < found.high
    assert many.high - many.low == pytest.approx((few.high - few.low) / 4, rel=0.3)
    alike = separation(chance.normal(0, 1, 800), chance.normal(0, 1, 800))
    assert alike.low < membership.CHANCE_AUC < alike.high
    with pytest.raises(ValueError, match="0 members"):
        separation(np.array([]), np.ones(3))
    with pytest.raises(ValueError, match="finite"):
        separation(np.array([1.0, math.inf]), np.ones(3))


def test_one_in_a_hundred_others_may_be_above_the_score_that_counts() -> None:
    others_M = np.arange(1000.0)  # 1 %: the ten from 990 on
    assert share_found(np.array([989.0, 989.5, 2000.0, 5.0]), others_M) == 0.5
    assert share_found(others_M, others_M) == pytest.approx(membership.FALSE_POSITIVES)
    assert share_found(np.array([0.5, 3.5]), np.array([0.0, 1.0])) == 0.5, "of few others, none may be above"


def test_a_reference_takes_the_difficulty_of_a_text_out() -> None:
    chance = np.random.default_rng(2)
    difficulty_2N = chance.normal(4, 2, (2, 400))
    learned_2N = difficulty_2N - np.array([[0.5], [0.1]]) + chance.normal(0, 0.1, (2, 400))  # members gain more
    alone = separation(*by_loss(learned_2N))
    calibrated = separation(*by_reference(learned_2N, difficulty_2N))
    assert alone.auc < 0.65
    assert calibrated.auc > 0.98
    assert calibrated.found > 0.8


# ---------------------------------------------------------------- canaries


def test_exposure_is_the_bits_that_a_rank_saves() -> None:
    probable_K = np.log(np.arange(1, 1025.0))  # the last is the most probable
    assert exposure(probable_K, 1023) == 10.0
    assert exposure(probable_K, 1022) == 9.0
    assert exposure(probable_K, 0) == 0.0
    assert exposure(np.zeros(1024), 7) == pytest.approx(1, abs=0.01), "half of all others count"
    exposures = [exposure(probable_K, secret) for secret in range(1024)]
    assert np.mean(exposures) == pytest.approx(chance_exposure(1024))
    assert chance_exposure(10**6) == pytest.approx(1 / math.log(2), abs=1e-4)


def test_probabilities_of_secrets_are_products_over_their_symbols() -> None:
    chance = np.random.default_rng(3)
    table_VV = chance.normal(size=(7, 7))  # logits of the next symbol, by the last

    def logits(before: Sequence[int], beginnings_BL: np.ndarray) -> np.ndarray:
        last_BL = np.hstack([np.full((len(beginnings_BL), 1), before[-1]), beginnings_BL])
        return table_VV[last_BL]

    symbols = (2, 5, 3)
    log_K = log_probabilities(logits, [0, 4], symbols, 3)
    p_VV = np.exp(table_VV) / np.exp(table_VV).sum(1, keepdims=True)
    expected_K = [p_VV[4, a] * p_VV[a, b] * p_VV[b, c] for a, b, c in every_secret(symbols, 3)]
    np.testing.assert_allclose(np.exp(log_K), expected_K)
    assert len(log_probabilities(logits, [1], symbols, 1)) == 3


# ---------------------------------------------------------------- updates

TOKENS, WIDTH, RANK, PRESENT, ABSENT = 300, 48, 4, slice(0, 12), slice(100, 112)


def gradient(inputs_ND: np.ndarray, rows: int, chance: np.random.Generator) -> np.ndarray:
    """As of a factor or a weight with so many rows: a sum of outer products with the inputs that were there."""
    return chance.normal(size=(rows, len(inputs_ND))) @ inputs_ND


def areas(seed: int) -> list[float]:
    """Returns the AUC of the tokens of PRESENT from: a whole weight, A of one module and of two, A without whitening, A of other tokens, and no change."""
    chance = np.random.default_rng(seed)
    in_common_3D = chance.normal(size=(3, WIDTH))
    inputs_VD = chance.normal(size=(TOKENS, WIDTH)) + chance.normal(size=(TOKENS, 3)) @ in_common_3D
    present_ND, whitening_DD = inputs_VD[PRESENT], whitening(inputs_VD[200:])
    whole = gradient(present_ND, WIDTH, chance)
    one, two = (gradient(present_ND, RANK, chance) for _ in range(2))
    other, none = gradient(inputs_VD[ABSENT], RANK, chance), np.zeros((RANK, WIDTH))

    def area(changes: list[np.ndarray], whitening_DD: np.ndarray = whitening_DD) -> float:
        scores_V = token_scores(changes, inputs_VD, whitening_DD)
        return membership.auc(scores_V[PRESENT], scores_V[PRESENT.stop :])

    return [area([whole]), area([one]), area([one, two]), area([one], np.eye(WIDTH)), area([other]), area([none])]


def test_a_change_tells_the_tokens_that_made_it_from_others() -> None:
    whole, one, two, plain, other, none = np.mean([areas(seed) for seed in range(12)], axis=0)
    assert whole == 1.0, "the rows of a whole weight's gradient span all inputs that were there"
    assert plain + 0.1 < one, "what all inputs have in common drowns the rest"
    assert 0.9 < one < two < whole
    assert other == pytest.approx(membership.CHANCE_AUC, abs=0.05)
    assert none == membership.CHANCE_AUC


def test_the_first_ranked_are_looked_at() -> None:
    present_V = np.array([True, False, True, False])
    assert share_of_best(np.array([3.0, 2.0, 1.0, 0.0]), present_V, 2) == 0.5
    assert share_of_best(np.array([3.0, 0.0, 1.0, 0.5]), present_V, 2) == 1.0
