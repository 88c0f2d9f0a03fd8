"""Baselines of channel prediction on channels whose answer is known, and the score."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch

from benchmarks.channel_network import SeriesNetwork, predicted, trained
from benchmarks.channel_network import measure as measure_network
from benchmarks.channel_prediction import measure
from edgelam_fl.wireless.channels.links import Channels_NTFM, Links, with_noise
from edgelam_fl.wireless.channels.paths import Paths
from edgelam_fl.wireless.prediction.extrapolation import (
    autoregress,
    last_value,
    own_history,
    own_history_by_bin,
    subspace,
    zero,
)
from edgelam_fl.wireless.prediction.other_band import carried
from edgelam_fl.wireless.prediction.ridge import Ridge, RidgeAcross, RidgeByBin, RidgeBySpeed
from edgelam_fl.wireless.prediction.rows import WAYS, channel_of, corrections, inputs_of, strong_series
from edgelam_fl.wireless.prediction.score import AHEAD, PAST, errors, future_of, nmse_db, past_of, spectral_efficiency
from edgelam_fl.wireless.prediction.series import channels_of, projected, strongest

SNR_DB, NOISE = 10.0, 0.1


@cache
def links() -> Links:
    return Paths(24, seed=3).draw()


def scored(predict: Callable[[Channels_NTFM], Channels_NTFM], snr_db: float = SNR_DB) -> float:
    """Returns the error in dB of a prediction from the noisy past."""
    seen = with_noise(past_of(links().up_NTFM), snr_db, seed=4)
    return nmse_db(errors(predict(seen), future_of(links().up_NTFM)))


# ---------------------------------------------------------------- the score


def test_the_error_is_the_db_of_the_mean_over_links() -> None:
    true = np.ones((2, AHEAD, 3, 2), np.complex64)
    predicted = true * np.array([1.1, 2.0], np.complex64)[:, None, None, None]  # errors of 0.01 and 1
    each = errors(predicted, true)
    assert each == pytest.approx([0.01, 1.0], rel=1e-5)
    assert nmse_db(each) == pytest.approx(10 * np.log10(0.505), abs=1e-4)  # the mean of dB would be -10
    assert nmse_db(np.zeros(2)) == -np.inf


def test_a_matched_beam_gains_all_ports_and_a_crossed_one_nothing() -> None:
    true = np.ones((1, AHEAD, 3, 2), np.complex64)
    assert spectral_efficiency(5j * true, true, 0.0) == pytest.approx(np.log2(1 + 2))
    assert spectral_efficiency(true * np.array([1, -1], np.complex64), true, 0.0) == pytest.approx(0.0, abs=1e-6)
    assert spectral_efficiency(0 * true, true, 0.0) == 0.0


def test_past_and_future_do_not_overlap() -> None:
    slots = np.arange(20).reshape(1, 20, 1, 1).astype(np.complex64)
    assert past_of(slots).real.ravel().tolist() == list(range(PAST))
    assert future_of(slots).real.ravel().tolist() == list(range(PAST, PAST + AHEAD))


# ---------------------------------------------------------------- from the link alone


def test_an_autoregression_continues_a_sum_of_waves() -> None:
    """Two waves obey a recursion of order 2. A group without energy is continued by zeros."""
    slots = np.arange(PAST + AHEAD)
    waves = np.exp(0.3j * slots) + 0.5 * np.exp(-0.8j * slots)
    series = np.stack([waves[None, :PAST], np.zeros((1, PAST))])
    ahead = autoregress(series, order=8)
    assert ahead[0, 0] == pytest.approx(waves[PAST:], abs=2e-3)
    assert np.all(ahead[1] == 0)


def test_zero_is_0_db_and_the_last_value_is_exact_if_nothing_moves() -> None:
    assert scored(zero) == pytest.approx(0.0, abs=1e-5)
    still = Paths(2, seed=1, speeds_kmh=(0.0,)).draw().up_NTFM
    assert nmse_db(errors(last_value(past_of(still)), future_of(still))) < -100


def test_predictors_from_the_links_own_past_are_in_their_known_order() -> None:
    db = {
        "last": scored(last_value),
        "all": scored(own_history),
        "bin": scored(own_history_by_bin),
        "subspace": scored(lambda seen: subspace(seen, NOISE)),
        "subspace by bin": scored(lambda seen: subspace(seen, NOISE, by_bin=True)),
    }
    assert db["last"] > db["all"] + 3
    assert db["all"] > db["subspace"] + 1
    assert db["bin"] > db["subspace by bin"] + 1
    assert db["subspace"] > db["subspace by bin"]


def test_what_is_below_the_noise_is_left_out() -> None:
    noise = with_noise(np.zeros((2, PAST, 48, 32), np.complex64), 0.0, seed=1)
    for by_bin in (False, True):
        assert np.all(subspace(noise, 10.0, by_bin=by_bin) == 0)


def test_series_stand_for_what_was_projected() -> None:
    """Two directions at most: eight hold everything. White noise keeps its power per value."""
    channels = links().up_NTFM[:2] * np.array([1, 1j] + 30 * [0], np.complex64)
    directions = strongest(channels)
    assert np.allclose(channels_of(projected(channels, directions), directions), channels, atol=1e-4)
    noise = with_noise(np.zeros_like(channels), 0.0, seed=1)
    assert np.mean(np.abs(projected(noise, directions)) ** 2) == pytest.approx(1.0, abs=0.05)


# ---------------------------------------------------------------- the band above


def test_paths_that_are_seen_are_carried_over_to_the_band_above() -> None:
    """Three paths between the delays of the profile, in four directions; the matrices are for what is seen, so any slot will do."""
    random = np.random.default_rng(1)
    delays = np.array([0.013, 0.171, 0.4044])  # turns per subcarrier
    both_PF = np.exp(-2j * np.pi * np.outer(delays, np.arange(96)))
    gains_NPX = random.standard_normal((2, 3, 20 * 4, 2)) @ [1, 1j]
    bands = [
        np.fft.ifft(both_PF[:, of].T @ gains_NPX, axis=1, norm="ortho").reshape(2, 48, 20, 4).swapaxes(2, 3)
        for of in (slice(48), slice(48, 96))
    ]
    seen, ahead = bands[0][..., :PAST].astype(np.complex64), np.stack(3 * [bands[0][..., PAST:]], axis=3)
    over = carried(seen, ahead, noise_power=1e-6)
    wanted = np.stack(3 * [bands[1][..., PAST:]], axis=3)
    assert over.shape == ahead.shape
    assert np.sum(np.abs(over[..., 1:, :] - wanted[..., 1:, :]) ** 2) < 0.01 * np.sum(np.abs(wanted[..., 1:, :]) ** 2)
    turned = carried(1j * seen, 1j * ahead, noise_power=1e-6)
    assert np.allclose(turned, 1j * over, atol=1e-3)


@pytest.mark.parametrize("snr_db", [np.inf, 60.0, 10.0, -20.0])
def test_noise_never_makes_the_band_above_much_worse_than_no_prediction(snr_db: float) -> None:
    """With little noise the prediction is far better than none; what is below the noise is predicted as zero."""
    seen, noise_power = with_noise(past_of(links().up_NTFM), snr_db, seed=4), 10 ** (-snr_db / 10)
    found = strong_series(seen, noise_power, AHEAD, 1, other_band=True)
    predicted = np.stack([channel_of(link, np.zeros((1, 2 * AHEAD), np.float32)) for link in found])
    each = errors(predicted, future_of(links().down_NTFM))
    assert np.all(np.isfinite(each))
    assert nmse_db(each) < (-3.0 if snr_db >= 10 else 0.1)
    assert each.max() < 1.5
    for link in strong_series(seen[:2], 1e6, AHEAD, 1, other_band=True):
        assert np.all(link.corrected_PA == 0)


# ---------------------------------------------------------------- fitted to other links


def test_ridges_learn_from_other_links_in_their_known_order() -> None:
    others = Paths(40, seed=5).draw()
    seen, future = with_noise(past_of(others.up_NTFM), SNR_DB, seed=6), future_of(others.up_NTFM)
    one, by_bin = Ridge.fit(seen, future), RidgeByBin.fit(seen, future)
    by_speed = RidgeBySpeed.fit(seen, future, others.speed_kmh)
    db = [
        scored(way)
        for way in (last_value, one.predict, lambda past: by_speed.predict(past, links().speed_kmh))
    ]  # fmt: skip
    assert db[0] > db[1] + 1
    assert db[1] > db[2] + 1
    assert scored(by_bin.predict) < db[1]


def test_a_speed_that_was_not_fitted_gets_the_nearest_weights_and_a_warning() -> None:
    known = links()
    past = past_of(known.up_NTFM)
    ridge = RidgeBySpeed.fit(past, future_of(known.up_NTFM), known.speed_kmh)
    with pytest.warns(UserWarning, match="1 of 2 links have speeds outside 10 to 100 km/h"):
        ahead = ridge.predict(past[:2], np.array([300.0, 58.0]))
    assert np.array_equal(ahead[:1], ridge.by_speed[100.0].predict(past[:1]))
    assert np.array_equal(ahead[1:], ridge.by_speed[60.0].predict(past[1:2]))


def test_the_other_band_is_found_if_it_follows_from_this_one() -> None:
    """Four slots with all of the last slot's subcarriers in reverse order."""
    random = np.random.default_rng(1)
    past = (random.standard_normal((40, PAST, 6, 8)) + 1j * random.standard_normal((40, PAST, 6, 8))).astype(
        np.complex64
    )
    future = np.repeat(past[:, -1:, ::-1], AHEAD, axis=1)
    predicted = RidgeAcross.fit(past[:30], future[:30]).predict(past[30:])
    assert nmse_db(errors(predicted, future[30:])) < -15


# ---------------------------------------------------------------- the benchmark


def test_the_benchmark_scores_each_way_on_the_same_links() -> None:
    settings, figures = measure(smoke=True)
    assert settings == {"smoke": True}
    values = {figure.name: figure.value for figure in figures}
    assert values["TDD, any noise: zero, all"] == 0.0
    ways = [name.removesuffix(", all") for name in values if name.endswith(", all")]
    assert len(ways) == 1 + 2 * 9 + 3 * 3
    assert all(f"{way}, spectral efficiency" in values for way in ways)


def test_a_turned_series_is_predicted_turned() -> None:
    torch.manual_seed(1)
    network, series = SeriesNetwork(), torch.randn(3, PAST, dtype=torch.complex64)
    turn = torch.polar(torch.tensor(1.0), torch.tensor(0.7))
    assert torch.allclose(network(turn * series), turn * network(series), atol=1e-5)


def test_the_network_learns_from_other_links() -> None:
    """Four epochs of 24 links are enough to beat the last value; what is below the noise is predicted as zero."""
    network = trained(Paths(24, seed=5).draw(), 1, epochs=4).network
    after = scored(lambda seen: predicted(network, seen))
    assert after < scored(last_value)
    assert after < scored(lambda seen: predicted(SeriesNetwork(), seen)) - 2
    quiet = with_noise(np.zeros((1, PAST, 48, 32), np.complex64), 30.0, seed=1)
    assert np.all(predicted(network, quiet) == 0)


def test_the_networks_benchmark_scores_all_seeds() -> None:
    _, figures = measure_network(smoke=True)
    values = {figure.name: figure.value for figure in figures}
    assert values["network on series, all"] < 3.0
    assert values["trainable parameters"] == 311_816


# ---------------------------------------------------------------- as rows for a learned predictor


def test_a_perfect_correction_leaves_the_weaker_series_alone_and_errors_add_up() -> None:
    seen, future = with_noise(past_of(links().up_NTFM), SNR_DB, seed=4), future_of(links().up_NTFM)
    ways = ((6, False, "last"), (6, False, "autoregressions"), (400, False, "last"), (40, True, "autoregressions"))
    for most, other_band, base in ways:
        for number, link in enumerate(strong_series(seen[:4], NOISE, AHEAD, most, other_band=other_band, base=base)):
            wanted, weights, remaining = corrections(link, future[number])
            for given in (wanted, 0 * wanted, 0.5 * wanted):
                (error,) = errors(channel_of(link, given)[None], future[number][None])
                summed = remaining + float(weights @ np.sum((given - wanted) ** 2, axis=1))
                assert error == pytest.approx(summed, rel=1e-3)


def test_no_correction_is_better_than_what_the_link_alone_gives_otherwise() -> None:
    """A mean of several autoregressions has less of the noise in it than any of them."""

    def corrected(seen: Channels_NTFM) -> Channels_NTFM:
        found = strong_series(seen, NOISE, AHEAD, 1)
        return np.stack([channel_of(link, np.zeros((1, 2 * AHEAD), np.float32)) for link in found])

    assert scored(corrected) < scored(lambda seen: subspace(seen, NOISE, by_bin=True))


def test_a_link_of_noise_alone_keeps_its_strongest_series() -> None:
    noise = with_noise(np.zeros((2, PAST, 48, 32), np.complex64), 0.0, seed=1)
    assert [len(link.places_K) for link in strong_series(noise, 100.0, AHEAD, 8)] == [1, 1]
    assert all(
        inputs_of(link, 100.0).shape == (1, 2 * PAST + 1 + 2 * len(WAYS) * AHEAD + 2)
        for link in strong_series(noise, 100.0, AHEAD, 8)
    )
