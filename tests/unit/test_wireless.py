"""The cell in numbers: path loss, fading, rates, speeds, energy, dropouts, and a round made of them."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from edgelam_fl.config import WirelessSection
from edgelam_fl.wireless.cell import NEAREST_KM, RadioCell, path_loss_db, watts
from edgelam_fl.wireless.fdma import bits_per_hertz, wireless_share
from edgelam_fl.wireless.rounds import DeviceRound, Load, device_round, recorded_device_round, virtual_round
from strategies.api import Candidate, Demand, RoundOutcome, RoundState
from strategies.registry import load
from strategies.selection.lyapunov import LyapunovSelection

NAMES = [f"device-{n}" for n in range(2000)]


def cell(seed: int = 1, **settings: Any) -> RadioCell:
    return RadioCell(WirelessSection(**{"bandwidth_hz": 10e6, **settings}), seed)


# ---------------------------------------------------------------- channels


@pytest.mark.parametrize(
    ("distance_km", "loss_db"), [(0.1, 128.1 - 37.6), (0.5, 128.1 - 37.6 * math.log10(2)), (1, 128.1)]
)
def test_path_loss(distance_km: float, loss_db: float) -> None:
    assert path_loss_db(distance_km) == pytest.approx(loss_db, abs=1e-9)


def test_decibels() -> None:
    assert [watts(30), watts(0), watts(23)] == pytest.approx([1.0, 1e-3, 10**2.3 / 1e3])


def test_a_share_carries_its_rate_and_the_rate_asks_for_its_share() -> None:
    generator = np.random.default_rng(3)
    share, snr = generator.uniform(1e-4, 1, 500), 10 ** generator.uniform(-1, 6, 500)
    carried = bits_per_hertz(share, snr)
    np.testing.assert_allclose(carried, share * np.log(1 + snr / share) / np.log(2), rtol=1e-12)
    np.testing.assert_allclose(wireless_share(carried * math.log(2), snr), share, rtol=1e-9)
    assert list(bits_per_hertz(np.array([0.0, 1.0]), np.array([3.0, 3.0]))) == [0, 2]


def test_places_are_even_over_the_disc() -> None:
    own = cell(radius_m=800)
    distances = np.array([own.distance_km(name) for name in NAMES])
    assert NEAREST_KM <= distances.min() < distances.max() <= 0.8
    inside = float(np.mean(distances < 0.4))
    assert inside == pytest.approx(0.4**2 / 0.8**2, abs=4 * math.sqrt(0.25 * 0.75 / len(NAMES)))


def test_fading_has_mean_1_and_is_exponential_at_an_antenna() -> None:
    def power(antennas: int) -> np.ndarray:
        own = cell(antennas=antennas)
        return np.array([own.fading(name, round_) for name in NAMES[:200] for round_ in range(50)])

    one, four = power(1), power(4)
    spread = 1 / math.sqrt(len(one))
    assert [one.mean(), four.mean()] == pytest.approx([1, 1], abs=4 * spread)
    assert np.mean(one > 1) == pytest.approx(math.exp(-1), abs=4 * spread)
    assert four.var() == pytest.approx(1 / 4, rel=0.1), "the mean of four"


def test_the_ratio_is_power_over_noise() -> None:
    own = cell()
    received_dbm = 23 - path_loss_db(own.distance_km("a")) + 10 * math.log10(own.fading("a", 3))
    noise_dbm = -174 + 10 * math.log10(10e6)
    assert 10 * math.log10(own.snr("a", 3)) == pytest.approx(received_dbm - noise_dbm)
    louder = own.snr("a", 3) * 10 ** ((46 - 23) / 10)
    assert own.downlink_bps("a", 3) == pytest.approx(10e6 * math.log2(1 + louder))


def test_seeds_reproduce_and_names_differ() -> None:
    def facts(own: RadioCell, name: str, round_: int) -> list[float]:
        return [own.distance_km(name), own.flops(name), own.fading(name, round_)]

    assert facts(cell(), "a", 1) == facts(cell(), "a", 1)
    assert facts(cell(), "a", 1)[:2] == facts(cell(), "a", 2)[:2], "a device stays where and what it is"
    for other in (facts(cell(), "b", 1), facts(cell(2), "a", 1)):
        assert all(mine != its for mine, its in zip(facts(cell(), "a", 1), other, strict=True))
    assert cell().fading("a", 1) != cell().fading("a", 2)


# ---------------------------------------------------------------- devices


def test_speeds_spread_around_the_middle() -> None:
    own = cell(flops=1e9, speed_spread=4.0)
    logs = np.log([own.flops(name) / 1e9 for name in NAMES]) / math.log(4)
    assert -1 <= logs.min() < -0.9
    assert 0.9 < logs.max() <= 1
    assert logs.mean() == pytest.approx(0, abs=4 / math.sqrt(3 * len(NAMES)))


def test_stragglers_are_so_many_times_slower() -> None:
    plain, slow = cell(), cell(stragglers=0.2, slowdown=5.0)
    ratios = [plain.flops(name) / slow.flops(name) for name in NAMES]
    assert ratios == pytest.approx([5 if slow.straggles(name) else 1 for name in NAMES])
    share = sum(map(slow.straggles, NAMES)) / len(NAMES)
    assert share == pytest.approx(0.2, abs=4 * math.sqrt(0.2 * 0.8 / len(NAMES)))


def test_dropouts_come_as_often_as_they_should() -> None:
    own = cell(dropout=0.3)
    dropped = own.dropouts(NAMES, 4, 1, least=1)
    assert len(dropped) / len(NAMES) == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / len(NAMES)))
    assert dropped == own.dropouts(NAMES[::-1], 4, 1, least=1)
    assert set(own.dropouts(NAMES[:500], 4, 1, least=1)) == set(dropped) & set(NAMES[:500]), "whoever else is there"
    assert dropped != own.dropouts(NAMES, 5, 1, least=1) != own.dropouts(NAMES, 5, 2, least=1)
    assert cell().dropouts(NAMES, 4, 1, least=1) == []


def test_enough_devices_always_deliver() -> None:
    own = cell(dropout=0.99)
    assert len(own.dropouts(NAMES[:10], 1, 1, least=4)) == 6
    assert own.dropouts(NAMES[:3], 1, 1, least=4) == []


# ---------------------------------------------------------------- rounds


def test_a_device_alone_by_hand() -> None:
    """Rates: 3 on the whole band is 2 bits a hertz; half of it carries log2(1 + 3 / 0.5) / 2."""
    settings = WirelessSection(bandwidth_hz=1e6, power_dbm=30.0)
    part = DeviceRound(bytes_up=1e6, bytes_down=5e5, snr=3.0, compute_s=4.0, download_s=1.0, compute_joules=7.0)
    whole = virtual_round(settings, {"a": part}, {"a": 1.0}, ["b"])
    upload_s = 8e6 / 2e6
    assert (whole.seconds, whole.bytes, whole.joules) == pytest.approx((1 + 4 + upload_s, 1.5e6, 7 + upload_s))
    assert whole.dropped == ("b",)
    half = virtual_round(settings, {"a": part}, {"a": 0.5}).devices["a"]
    assert half.rate_bps == pytest.approx(1e6 * math.log2(7) / 2)
    assert half.seconds == half.download_s + half.compute_s + half.upload_s
    assert recorded_device_round(half) == part


def test_a_round_is_its_slowest_device_and_all_energy() -> None:
    settings = WirelessSection(bandwidth_hz=1e6)
    part = DeviceRound(bytes_up=1000, bytes_down=0, snr=1.0, compute_s=1.0, download_s=0.0, compute_joules=1.0)
    parts = {"a": part, "b": replace(part, compute_s=9.0)}
    whole = virtual_round(settings, parts, {"a": 0.5, "b": 0.5, "c": 0.0})
    assert whole.seconds == whole.devices["b"].seconds
    assert whole.joules == sum(device.joules for device in whole.devices.values()) > 2
    assert virtual_round(settings, {}, {}, ["a"]).seconds == 0


def test_what_a_load_takes() -> None:
    own = cell(kappa=1e-27, flops=8e9, speed_spread=1.0, flops_per_cycle=8.0)
    part = device_round(own, "a", 2, Load(100, 200, 30, operations=16e9), devices=4)
    assert (part.bytes_up, part.bytes_down, part.compute_s) == (100, 230, 2.0)
    assert part.download_s == pytest.approx(8 * (200 + 4 * 30) / own.downlink_bps("a", 2)), (
        "adapters are for all at once"
    )
    assert part.compute_joules == pytest.approx(1e-27 * 2e9 * (1e9) ** 2), "kappa C f^2, 2e9 cycles at 1 GHz"


def test_the_online_scheduler_keeps_the_average_delay_near_its_bound() -> None:
    """200 rounds of 8 devices that move 3 MB and compute for a second or so."""
    bound_s, rounds, band_hz = 2.5, 200, 10e6
    own = cell(flops=2e10)
    scheduler, allocator = LyapunovSelection(delay_s=bound_s, v=2.0), load("bandwidth", "lyapunov").rule

    def seconds(candidates: list[Candidate], parts: dict[str, DeviceRound]) -> float:
        shares = allocator.allocate(
            [Demand(c.name, c.payload_bytes, c.compute_s, snr=c.snr) for c in candidates], band_hz
        )
        return virtual_round(own.settings, {c.name: parts[c.name] for c in candidates}, shares).seconds

    delays, of_all = [], []
    for number in range(1, rounds + 1):
        parts = {name: device_round(own, name, number, Load(3e6, 3e6, 0, 2e10), 8) for name in NAMES[:8]}
        candidates = [
            Candidate(name, payload_bytes=part.bytes_up, compute_s=part.before_sending_s, snr=part.snr)
            for name, part in parts.items()
        ]
        names = scheduler.select(RoundState(number, candidates, random.Random(number), band_hz)).names
        delays.append(seconds([c for c in candidates if c.name in names], parts))
        of_all += [seconds(candidates, parts)] if number % 20 == 0 else []
        scheduler.observe(RoundOutcome(number, delays[-1], []))
    assert sum(delays) / rounds == pytest.approx(bound_s, rel=0.01)
    assert min(of_all) > bound_s, "or the bound would not bind"
