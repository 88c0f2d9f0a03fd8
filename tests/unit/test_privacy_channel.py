"""Channel noise as privacy: the power rule, what arrives, and what each device's updates give away."""

from __future__ import annotations

import math
from pathlib import Path
from random import Random

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant

from edgelam_fl.config import WirelessSection
from edgelam_fl.errors import ConfigError
from edgelam_fl.privacy.accounting import Releases, epsilon_of
from edgelam_fl.privacy.channel import Channel, Exposure, most_scale, noise_of_renyi, sending
from edgelam_fl.telemetry.events import read_events
from edgelam_fl.telemetry.summary import build_summary
from edgelam_fl.telemetry.summary_words import privacy_in_words
from server.checks import check_config
from server.emulated_channel import EmulatedChannel, RoundOnAir
from server.private_sums import PrivateSums
from strategies.api import Contribution
from tests.support import run_config
from tests.unit.conftest import MakeFederation


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

    resumed = Exposure(1e-5, "pld", earlier=2 / 3.0**2)  # two rounds that any device may have had a part in
    resumed.add("near", 3.0)
    assert resumed.largest == pytest.approx(epsilon_of(Releases(3.0, rounds=3), 1e-5))
    assert resumed.epsilon("silent") == pytest.approx(epsilon_of(Releases(3.0, rounds=2), 1e-5))


# ---------------------------------------------------------------- on the server

CLIP, MOVES, NEEDED = 0.5, 2.0, 3.0
UPDATE = np.random.default_rng(1).normal(size=300)  # of an L2 norm of 17, which is clipped
PRIVATE = (
    "split.hosts=0", "privacy.mode=channel", "wireless.bandwidth_hz=1e6", "privacy.epsilon=30", "federation.rounds=2",
)  # fmt: skip


def channel(power_dbm: float) -> tuple[EmulatedChannel, Exposure]:
    exposure = Exposure(1e-5, "pld")
    return EmulatedChannel(WirelessSection(bandwidth_hz=1e6, power_dbm=power_dbm), 1, exposure), exposure


def arrived(air: RoundOnAir, generator: np.random.Generator) -> np.ndarray:
    """Returns what the server makes of one device's update over this channel."""
    sums = PrivateSums(
        start={"m": np.zeros(300, np.float32)}, site_sources=frozenset(), hosts_release=False, clip=CLIP, sigma=0.0,
        expected=1.0, generator=generator, air=air,
    )  # fmt: skip
    sums.add([("", Contribution("a", 1.0, {"m": UPDATE}))])
    (mean,) = sums.contributions(())
    return mean.tensors["m"].astype(np.float64)


@pytest.mark.parametrize(("power_dbm", "lowered"), [(23.0, True), (-50.0, False)])
def test_the_noise_that_arrives_is_what_the_accountant_assumes(power_dbm: float, lowered: bool) -> None:
    """Over 1,000 updates of 300 numbers, of a device that has to lower its power and of one whose power is the limit."""
    over, exposure = channel(power_dbm)
    generator = np.random.default_rng(11)
    noise = []
    for _ in range(1000):
        air = over.in_round(1, values=300, clip=CLIP, noise=NEEDED, moves=MOVES)
        noise.append(arrived(air, generator) - UPDATE * CLIP / np.linalg.norm(UPDATE))
    assert air.sent["a"].lowered == lowered
    measured = float(np.std(noise)) / (MOVES * CLIP)
    assert abs(float(np.mean(noise))) < 4 * float(np.std(noise)) / math.sqrt(300_000)
    assumed = measured / math.sqrt(1000)  # the multiplier of all rounds together, if each has the measured noise
    low, high = (epsilon_of(Releases(assumed * factor, rounds=1), 1e-5) for factor in (1.02, 0.98))
    assert low < exposure.epsilon("a") < high
    assert (measured == pytest.approx(NEEDED / MOVES, rel=0.02)) == lowered
    assert measured > 0.98 * NEEDED / MOVES


def test_what_was_given_away_stays_and_rounds_since_then_count_for_all() -> None:
    before = Exposure(1e-5, "rdp")
    before.add("a", 2.0)
    after = Exposure(1e-5, "rdp")
    after.restore(before.state(), 0.0)
    assert (after.epsilon("a"), after.epsilon("b")) == (before.epsilon("a"), 0.0)
    after.restore(before.state(), 2.0**-2)
    before.add("a", 2.0)
    assert after.epsilon("a") == before.epsilon("a")
    assert after.epsilon("b") == pytest.approx(epsilon_of(Releases(2.0, rounds=1), 1e-5, "rdp"))


def test_each_device_has_the_noise_of_its_own_channel() -> None:
    over, _ = channel(-50.0)
    air = over.in_round(1, values=20_000, clip=CLIP, noise=0.01, moves=MOVES)
    start = {"m": np.zeros(20_000, np.float32)}
    sums = PrivateSums(start, frozenset(), False, CLIP, 0.0, 1.0, np.random.default_rng(2), air)
    for device in ("a", "b"):
        sums.add([("", Contribution(device, 1.0, start))])
    (mean,) = sums.contributions(())
    near, far = (air.sent[device].noise for device in ("a", "b"))
    assert near != far
    assert float(np.std(mean.tensors["m"])) == pytest.approx(math.hypot(near, far), rel=0.03)


@pytest.mark.parametrize(("power_dbm", "rule"), [(23.0, "fedavg"), (-50.0, "ffa")])
def test_a_run_says_whose_power_was_lowered_and_what_was_given_away(
    federation: MakeFederation, power_dbm: float, rule: str
) -> None:
    run = federation("abc", "", *PRIVATE, f"wireless.power_dbm={power_dbm}", f"strategy.aggregation={rule}")
    run.run()
    promised, rounds = run.events("privacy_promised")[0], run.events("channel_noise")
    assert [(one["round"], one["devices"]) for one in rounds] == [(1, 3), (2, 3)]
    if power_dbm > 0:  # every channel of this cell is far better than the promise allows
        assert [(one["lowered"], one["most_over_needed"]) for one in rounds] == [(3, 1.0), (3, 1.0)]
        assert rounds[1]["epsilon"] == pytest.approx(promised["epsilon"], rel=0.01)
        assert rounds[1]["epsilon"] == pytest.approx(run.events("privacy_spent")[1]["epsilon"])
    else:
        assert all(one["lowered"] < 3 and one["most_over_needed"] > 1.0 for one in rounds)
    assert rounds[0]["epsilon"] < rounds[1]["epsilon"] <= promised["epsilon"]
    summary = build_summary(list(read_events(run.folder.path / "events.jsonl")))
    lowered = sum(one["lowered"] for one in rounds)
    assert summary.privacy is not None
    assert f"emulated channel: power lowered for {lowered} of 6 updates" in privacy_in_words(summary.privacy)[-1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("wireless.bandwidth_hz=0", r"'channel' takes its noise from .* wireless.bandwidth_hz = 0 says .*Allowed: a bandwidth"),
        ("split.hosts=1", r"'channel' cannot be combined with hosts that train"),
        ("privacy.clip_quantile=0.5", r"privacy.clip_quantile = 0.5 needs whoever clips to count"),
    ],
)  # fmt: skip
def test_what_a_channel_cannot_protect_is_refused(tiny_folder: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_config(run_config(str(tiny_folder), *PRIVATE, override))
