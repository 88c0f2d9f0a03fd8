"""Over-the-air sums: their error is that of the closed form, and the aggregation that uses them is FedAvg plus it."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest

from edgelam_fl.errors import ConfigError
from edgelam_fl.wireless.over_the_air import air_sum
from strategies.aggregation.fedavg import FedAvg
from strategies.aggregation.over_the_air import OverTheAir
from strategies.api import Contribution, Start
from strategies.registry import load
from tests.unit.conftest import MakeFederation

SIZE = 40_001  # odd: the last symbol carries one number
NAME, ALONE = "base_model.model.layers.0.q_proj.lora_A.weight", "base_model.model.layers.9.q_proj.lora_A.weight"
SOURCES = (("d1", 10.0), ("d2", 30.0), ("site edge-1", 60.0))


def signals(count: int, seed: int = 1) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.normal(scale=1 + number, size=SIZE) for number in range(count)]


@pytest.mark.parametrize("snr", [0.1, 10.0, 1000.0])
@pytest.mark.parametrize("channels", [[1.0, 1.0, 1.0], [0.3j, 1 - 1j, -2.0], [2.0, 0.05 + 0.1j, 1.0]])
def test_the_error_of_a_sum_is_that_of_the_closed_form(snr: float, channels: list[complex]) -> None:
    sent, weights = signals(3), [0.1, 0.3, 0.6]
    arrived = air_sum(sent, weights, channels, snr, np.random.default_rng(2))
    exact = sum(weight * signal for weight, signal in zip(weights, sent, strict=True))
    expected = max(
        (w * math.sqrt(np.mean(s**2)) / abs(h)) ** 2 for w, s, h in zip(weights, sent, channels, strict=True)
    )
    assert arrived.expected_error == pytest.approx(expected / snr)
    assert float(np.mean((arrived.numbers - exact) ** 2)) == pytest.approx(arrived.expected_error, rel=0.05)
    assert float(np.mean(arrived.numbers - exact)) == pytest.approx(0, abs=5 * math.sqrt(arrived.expected_error / SIZE))


def test_nothing_to_say_costs_no_power_and_arrives_exactly() -> None:
    arrived = air_sum([np.zeros((3, 5))] * 2, [0.5, 0.5], [1.0, 1j], 10.0, np.random.default_rng(1))
    assert (arrived.numbers.shape, arrived.expected_error) == ((3, 5), 0)
    assert not arrived.numbers.any()


@pytest.mark.parametrize("snr", [0.0, -1.0, math.inf, math.nan])
def test_a_sum_needs_power(snr: float) -> None:
    with pytest.raises(ConfigError, match=r"needs power: its SNR = .* must be a finite number above 0"):
        air_sum(signals(2), [0.5, 0.5], [1.0, 1.0], snr, np.random.default_rng(1))


def test_a_sum_needs_channels() -> None:
    with pytest.raises(ConfigError, match="a channel of zero carries nothing"):
        air_sum(signals(2), [0.5, 0.5], [1.0, 0.0], 10.0, np.random.default_rng(1))


# ---------------------------------------------------------------- the aggregation


def start(round: int = 1) -> Start:
    generator = np.random.default_rng(7)
    return Start(
        {name: generator.normal(size=(8, 500)).astype(np.float32) for name in (NAME, ALONE)}, seed=5, round=round
    )


def contributions() -> list[Contribution]:
    found = []
    for number, (source, weight) in enumerate(SOURCES):
        generator = np.random.default_rng(number)
        names = (NAME, ALONE) if source == "d1" else (NAME,)
        moved = {n: start().tensors[n] + generator.normal(scale=0.01, size=(8, 500)).astype(np.float32) for n in names}
        found.append(Contribution(source, weight, moved))
    return found


def off(rule: OverTheAir, round: int = 1) -> tuple[float, float]:
    """Returns how far a tensor is from FedAvg's over its update, and what the rule says of it."""
    got, exact = rule.aggregate(contributions(), start(round)), FedAvg().aggregate(contributions(), start(round))
    update = np.linalg.norm(got.tensors[NAME] - start().tensors[NAME])
    return float(np.linalg.norm(got.tensors[NAME] - exact.tensors[NAME]) / update), got.facts["air_error"]


@pytest.mark.parametrize("fading", ["rayleigh", "none"])
@pytest.mark.parametrize("snr_db", [0.0, 20.0])
def test_the_aggregate_is_fedavgs_plus_the_error_that_it_states(
    fading: Literal["rayleigh", "none"], snr_db: float
) -> None:
    measured, stated = off(OverTheAir(snr_db=snr_db, fading=fading))
    assert measured == pytest.approx(stated, rel=0.05)


def test_without_fading_twenty_db_more_are_a_tenth_of_the_error() -> None:
    (loud, _), (quiet, _) = (off(OverTheAir(snr_db=snr_db, fading="none")) for snr_db in (40.0, 20.0))
    assert quiet / loud == pytest.approx(10, rel=0.01)


def test_channels_and_noise_are_drawn_anew_in_every_round_and_repeat_with_the_seed() -> None:
    first, again, next_round = (off(OverTheAir(), number) for number in (1, 1, 2))
    assert first == again
    assert first != next_round


def test_a_tensor_of_one_source_keeps_its_bits() -> None:
    given = contributions()
    assert OverTheAir().aggregate(given, start()).tensors[ALONE] is given[0].tensors[ALONE]


def test_a_run_file_names_it_and_its_options_are_checked() -> None:
    rule = load("aggregation", "over_the_air", {"over_the_air": {"snr_db": 5.0, "fading": "none"}}).rule
    assert (round(rule.snr, 3), rule.fading) == (3.162, "none")
    with pytest.raises(
        ConfigError, match=r"strategy.options.over_the_air.fading = 'rice' must be 'rayleigh' or 'none'"
    ):
        load("aggregation", "over_the_air", {"over_the_air": {"fading": "rice"}})
    with pytest.raises(ConfigError, match=r"snr_db = 1000.0 must be less than or equal to 100"):
        load("aggregation", "over_the_air", {"over_the_air": {"snr_db": 1000.0}})


def test_a_run_sums_devices_over_the_air_and_says_with_what_error(federation: MakeFederation) -> None:
    overrides = ("strategy.aggregation=over_the_air", "strategy.options.over_the_air.snr_db=30", "federation.rounds=1")
    run = federation("abc", "e", *overrides)
    moved = run.nodes["c"].trained
    run.nodes["c"].trained = lambda spans, by: moved(spans, 5 * by)  # type: ignore[method-assign]
    noisy, exact = run.run(), federation("abc", "e", "federation.rounds=1").run()
    off = {name: float(np.abs(array - run.start[name]).max()) for name, array in noisy.items()}
    hosts = [name for name in noisy if ".layers.2." in name or ".layers.3." in name]
    assert hosts
    assert all(np.array_equal(noisy[name], exact[name]) for name in hosts), "one source: nothing is summed"
    assert all(off[name] > 0 for name in noisy)
    said = run.events("round_done")[0]["aggregation"]
    assert 0 < said["air_error"] < 1
    assert not np.array_equal(noisy[min(noisy.keys() - hosts)], exact[min(noisy.keys() - hosts)])
