"""Beams, channel estimates and the learned beamformer: recorded values, closed forms, symmetries, and what is refused."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from benchmarks.beam_network import train
from edgelam_fl.errors import ConfigError
from edgelam_fl.wireless.beamforming.downlink import Downlink, downlink_at, noise_at, sum_rates
from edgelam_fl.wireless.beamforming.estimation import least_squares, mmse, pilots, received
from edgelam_fl.wireless.beamforming.learned import LearnedPrecoder, Lesson, OutsideTraining
from edgelam_fl.wireless.beamforming.network import BeamNetwork
from edgelam_fl.wireless.beamforming.precoders import mrt, rzf, wmmse, zero_forcing

ANTENNAS = 8


def drawn(users: int, count: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, users, ANTENNAS, dtype=torch.complex128, generator=generator)


def all_beams(channels: torch.Tensor, downlink: Downlink) -> list[torch.Tensor]:
    zf, _ = zero_forcing(channels, downlink)
    return [mrt(channels, downlink), zf, rzf(channels, downlink), wmmse(channels, downlink, iterations=20)]


@pytest.mark.parametrize(
    ("users", "count", "snr_db", "recorded"),
    [
        (4, 200, 10, (7.53, 14.56, 14.83, 14.88)),
        (8, 100, 10, (8.35, 8.45, 15.95, 18.42)),
    ],
)
def test_sum_rates_are_those_of_an_independent_program(
    users: int, count: int, snr_db: float, recorded: tuple[float, ...]
) -> None:
    channels, downlink = drawn(users, count), downlink_at(snr_db)
    beams = [*all_beams(channels, downlink)[:3], wmmse(channels, downlink)]
    rates = [float(sum_rates(channels, one, downlink.noise).mean()) for one in beams]
    assert rates == pytest.approx(recorded, rel=0.02)


def test_beams_use_exactly_the_power_of_the_downlink() -> None:
    downlink = Downlink(noise=0.3, power=2.5)
    for beams in all_beams(drawn(4, 20), downlink):
        assert beams.abs().square().sum((1, 2)).tolist() == pytest.approx([2.5] * 20)


def test_only_the_ratio_of_power_to_noise_matters() -> None:
    channels, once, thrice = drawn(4, 5), Downlink(noise=0.1), Downlink(noise=0.3, power=3)
    for one, other in zip(all_beams(channels, once), all_beams(channels, thrice), strict=True):
        torch.testing.assert_close(sum_rates(channels, one, 0.1), sum_rates(channels, other, 0.3))


def test_a_single_user_gets_the_rate_of_its_channel() -> None:
    channels, downlink = drawn(1, 20), downlink_at(10)
    best = torch.log2(1 + channels.abs().square().sum((1, 2)) / downlink.noise)
    for beams in all_beams(channels, downlink):
        torch.testing.assert_close(sum_rates(channels, beams, downlink.noise), best)


def test_zero_forcing_leaves_no_interference() -> None:
    channels = drawn(4, 20)
    beams, singular = zero_forcing(channels, downlink_at(10))
    heard = (channels @ beams).abs()
    assert singular == 0
    assert float((heard - torch.diag_embed(heard.diagonal(dim1=1, dim2=2))).max()) < 1e-12


def test_a_wmmse_step_never_lowers_the_sum_rate() -> None:
    channels, downlink = drawn(8, 30), downlink_at(10)
    rates = [
        sum_rates(channels, wmmse(channels, downlink, iterations=number), downlink.noise) for number in range(0, 12, 3)
    ]
    for before, after in pairwise(rates):
        assert bool((after >= before - 1e-9).all())


# ---------------------------------------------------------------- what is unusual


def test_users_in_one_place_and_users_that_hear_nothing_get_finite_beams() -> None:
    channels = drawn(3, 3)
    channels[0, 1] = channels[0, 0]
    channels[1, 2] = 0
    beams, singular = zero_forcing(channels, downlink_at(10))
    assert singular == 2
    for one in (beams, *all_beams(channels, downlink_at(10)), woken()(channels, noises(3))):
        assert one.isfinite().all()
        assert one.abs().square().sum((1, 2)).tolist() == pytest.approx([1] * 3)
        assert sum_rates(channels, one, 0.1).isfinite().all()


@pytest.mark.parametrize(("noise", "power"), [(0.1, 0.0), (0.1, -1.0), (0.0, 1.0), (0.1, math.inf), (math.nan, 1.0)])
def test_power_and_noise_must_be_above_zero(noise: float, power: float) -> None:
    with pytest.raises(ConfigError, match=r"(power|noise) = .* must be a finite number above 0"):
        Downlink(noise=noise, power=power)


@pytest.mark.parametrize(
    "channels",
    [drawn(4, 2)[0], drawn(4, 2).real, drawn(4, 2)[:, :0]],
    ids=["no cells", "real", "no users"],
)
def test_channels_of_another_shape_are_refused_with_the_axes(channels: torch.Tensor) -> None:
    for precoder in (mrt, zero_forcing, rzf, wmmse):
        with pytest.raises(ConfigError, match=r"must be complex with the axes \[cell, user, antenna\]"):
            precoder(channels, downlink_at(10))


def test_channels_that_are_not_finite_are_refused() -> None:
    channels = drawn(4, 2)
    channels[0, 0, 0] = math.nan
    with pytest.raises(ConfigError, match="not finite"):
        wmmse(channels, downlink_at(10))


def test_zero_forcing_refuses_more_users_than_antennas() -> None:
    with pytest.raises(ConfigError, match=r"9 users and 8 antennas.*RZF or WMMSE"):
        zero_forcing(drawn(9, 1), downlink_at(10))


# ---------------------------------------------------------------- pilots


@pytest.mark.parametrize(("symbols", "snr_db"), [(4, 0), (8, 10)])
def test_errors_of_estimates_are_those_of_the_closed_forms(symbols: int, snr_db: float) -> None:
    channels, sent, noise = drawn(4, 2000), pilots(symbols, 4, torch.complex128), noise_at(snr_db)
    heard = received(channels, sent, noise, torch.Generator().manual_seed(2))
    for estimate, error in (
        (least_squares(heard, sent), noise / symbols),
        (mmse(heard, sent, noise), noise / (noise + symbols)),
    ):
        assert float((estimate - channels).abs().square().mean()) == pytest.approx(error, rel=0.03)


def test_too_few_pilot_symbols_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 pilot symbols cannot tell 4 users apart: use 4 symbols or more"):
        pilots(3, 4)


# ---------------------------------------------------------------- the network


def woken(seed: int = 3) -> BeamNetwork:
    """A network whose weights and powers differ from RZF's, as after a training."""
    torch.manual_seed(seed)
    network = BeamNetwork(width=8, rounds=2).double()
    for name, parameter in network.named_parameters():
        if ".step." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return network


def noises(count: int, value: float = 0.1) -> torch.Tensor:
    return torch.full((count,), value, dtype=torch.float64)


def test_an_untrained_network_is_rzf() -> None:
    channels, downlink = drawn(4, 20), downlink_at(10)
    torch.testing.assert_close(BeamNetwork().double()(channels, noises(20)), rzf(channels, downlink))


def test_another_order_of_users_or_antennas_gives_the_same_beams_in_that_order() -> None:
    network, channels = woken(), drawn(5, 10)
    beams = network(channels, noises(10))
    users, antennas = (
        torch.tensor([3, 0, 4, 1, 2]),
        torch.randperm(ANTENNAS, generator=torch.Generator().manual_seed(1)),
    )
    assert not torch.allclose(beams, rzf(channels, downlink_at(10)), atol=1e-3)
    torch.testing.assert_close(network(channels[:, users], noises(10)), beams[:, :, users])
    torch.testing.assert_close(network(channels[:, :, antennas], noises(10)), beams[:, antennas])


@pytest.mark.parametrize(("users", "power"), [(1, 1.0), (6, 2.5), (9, 1.0)])
def test_the_network_takes_any_number_of_users_and_uses_exactly_the_power(users: int, power: float) -> None:
    beams = woken()(drawn(users, 10), noises(10), power=power)
    assert beams.abs().square().sum((1, 2)).tolist() == pytest.approx([power] * 10)


def test_errors_of_the_estimate_count_as_noise() -> None:
    channels = drawn(4, 10)
    beams = BeamNetwork().double()(channels, noises(10), noises(10, 0.2))
    torch.testing.assert_close(beams, rzf(channels, Downlink(noise=0.3)))


@pytest.mark.parametrize("pilot_snr_db", [None, (0.0, 10.0)])
def test_training_beats_rzf_and_repeats_to_the_bit(pilot_snr_db: tuple[float, float] | None) -> None:
    lesson = Lesson(users=(4,), snr_db=(0.0, 0.0), pilot_snr_db=pilot_snr_db, cells=32)
    learned = train(lesson, steps=25, seed=1)
    channels, downlink, sent = drawn(4, 200, seed=9), downlink_at(0), pilots(4, 4, torch.complex128)
    seen, error = channels, 0.0
    if pilot_snr_db is not None:
        seen, error = least_squares(received(channels, sent, 0.5, torch.Generator().manual_seed(2)), sent), 0.5 / 4
    gain = sum_rates(channels, learned(seen, downlink, error), 1.0) - sum_rates(channels, rzf(seen, downlink), 1.0)
    assert float(gain.mean()) > 3 * float(gain.std()) / math.sqrt(len(gain))
    again = train(lesson, steps=25, seed=1).network.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in learned.network.state_dict().items())


def test_beams_outside_the_training_come_with_a_warning() -> None:
    learned = LearnedPrecoder(BeamNetwork(width=8, rounds=1), Lesson(users=(4, 8), snr_db=(0.0, 20.0)))
    learned(drawn(6, 2), downlink_at(20))
    with pytest.warns(OutsideTraining, match="trained on an SNR in dB from 0 to 20, not 25"):
        learned(drawn(6, 2), downlink_at(25))
    with pytest.warns(OutsideTraining, match="trained on users from 4 to 8, not 3"):
        learned(drawn(3, 2), downlink_at(10))
