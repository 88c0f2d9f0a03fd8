"""Channel noise as privacy: the power rule, what arrives, and what each device's updates give away."""

from __future__ import annotations

import math
from random import Random

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant

from edgelam_fl.privacy.accounting import Releases, epsilon_of
from edgelam_fl.privacy.channel import Channel, Exposure, most_scale, noise_of_renyi, sending


def test_power_is_lowered_exactly_if_the_closed_form_is_below_the_limit() -> None:
    """s = min(limit, sigma sqrt(2 eps / alpha) / (|h| sensitivity)), on 2,000 random channels on both sides of the limit."""
    draw = Random(7)
    lowered = 0
    for _ in range(2000):
        amplitude, noise = 10 ** draw.uniform(-7, -3), 10 ** draw.uniform(-7, -2)
        power_w, values, clip = 10 ** draw.uniform(-6, 1), draw.randint(1, 10_000), 10 ** draw.uniform(-2, 1)
        divergence, order, sensitivity = 10 ** draw.uniform(-3, 1), draw.uniform(1.1, 60), 2 * clip
        limit = most_scale(power_w, values, clip)
        closed_form = noise * math.sqrt(2 * divergence / order) / (amplitude * sensitivity)

        sent = sending(Channel(amplitude, noise), limit, noise_of_renyi(divergence, order, sensitivity))

        assert sent.scale == pytest.approx(min(limit, closed_form))
        assert sent.lowered == (closed_form < limit)
        assert sent.noise == pytest.approx(noise / (amplitude * sent.scale))
        spent = order * sensitivity**2 / (2 * sent.noise**2)  # the Renyi divergence of what arrives
        assert spent == pytest.approx(divergence) if sent.lowered else spent <= divergence * (1 + 1e-9)
        assert (sent.scale * clip) ** 2 / values <= power_w * (1 + 1e-9)
        lowered += sent.lowered
    assert 400 < lowered < 1600


def test_rounds_of_unlike_noise_add_up_as_in_another_accountant() -> None:
    exposure = Exposure(1e-5, "pld")
    for multiplier in (3.0, 5.0, 2.5):
        exposure.add("near", multiplier)
    exposure.add("far", 40.0)
    other = PLDAccountant()
    for multiplier in (3.0, 5.0, 2.5):
        other.compose(dp_accounting.GaussianDpEvent(multiplier))
    assert exposure.epsilon("near") == pytest.approx(other.get_epsilon(1e-5), rel=0.01)
    assert exposure.largest == exposure.epsilon("near") > exposure.epsilon("far") > exposure.epsilon("silent") == 0.0
    assert exposure.epsilon("far") == pytest.approx(epsilon_of(Releases(40.0, rounds=1), 1e-5))
