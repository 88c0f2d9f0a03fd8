"""Shares of the bandwidth: the formulas, and that finishing together is never slower than the simple rules."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from benchmarks.scheduling import pool, ratios
from edgelam_fl.wireless.fdma import lambert_w_lower_log, wireless_share
from strategies.api import Demand
from strategies.bandwidth.links import (
    Needs,
    delay_of,
    finish_together,
    least_delays,
    needs_of,
)
from strategies.registry import load


def slowest(demands: list[Demand], capacity_bps: float, strategy: str) -> float:
    shares = load("bandwidth", strategy).rule.allocate(demands, capacity_bps)
    return max(d.compute_s + 8 * d.payload_bytes / (shares[d.name] * capacity_bps) for d in demands)


def instance(generator: random.Random) -> list[Demand]:
    return [Demand(d.name, d.payload_bytes, d.compute_s) for d in pool(generator, 7)]


def test_finishing_together_is_never_slower() -> None:
    """2,000 instances of 2 to 10 devices, payloads of 1 to 40 and 0 to 20 s of computing, capacity 10."""
    found = ratios(2000)
    means = {rule: float(np.mean(values)) for rule, values in found.items()}
    print(f"equalise over uniform {means['uniform']:.3f}, over proportional {means['proportional']:.3f}")
    assert all(max(values) <= 1 + 1e-9 for values in found.values())
    assert means == {"uniform": pytest.approx(0.75, abs=0.02), "proportional": pytest.approx(0.85, abs=0.02)}


def test_all_finish_together() -> None:
    demands = instance(random.Random(3))
    shares = load("bandwidth", "equalise").rule.allocate(demands, 10.0)
    ends = [d.compute_s + 8 * d.payload_bytes / (10 * shares[d.name]) for d in demands]
    np.testing.assert_allclose(ends, ends[0], rtol=1e-9)


def test_with_equal_compute_all_send_equally_long() -> None:
    payloads, capacity = (1, 2, 6), 10.0
    demands = [Demand(f"d{n}", payload / 8, 5.0) for n, payload in enumerate(payloads)]
    shares = load("bandwidth", "equalise").rule.allocate(demands, capacity)
    assert list(shares.values()) == pytest.approx([payload / sum(payloads) for payload in payloads])
    # The round that real links are held to: 5 + 9 / 10 against 5 + 6 / (10 / 3).
    assert slowest(demands, capacity, "equalise") == pytest.approx(5 + sum(payloads) / capacity)
    assert slowest(demands, capacity, "uniform") == pytest.approx(5 + max(payloads) / (capacity / 3))


def test_two_devices_by_hand() -> None:
    """b1 + b2 = 1 with S1 / (C (t - c1)) + S2 / (C (t - c2)) = 1: here t^2 - 6 t + 6 = 0, the larger root."""
    demands = [Demand("a", 2 / 8, 0.0), Demand("b", 1 / 8, 3.0)]
    delay, shares = finish_together(needs_of(demands, 1.0))
    assert delay == pytest.approx(3 + math.sqrt(9 - 6))
    assert shares == pytest.approx([2 / delay, 1 / (delay - 3)])


def test_a_slow_link_of_its_own_leaves_capacity_to_the_others() -> None:
    slow, other = Demand("a", 8e6 / 8, 1.0, limit_bps=1e5), Demand("b", 8e6 / 8, 1.0)
    delay, shares = finish_together(needs_of([slow, other], 1e6))
    assert delay == 1 + 8e6 / 1e5, "nothing makes it faster"
    assert delay_of(needs_of([slow, other], 1e6), shares).max() == pytest.approx(delay)


def test_no_payload_is_through_when_it_has_computed() -> None:
    demands = [Demand("a", 0.0, 7.0), Demand("b", 1 / 8, 0.0)]
    delay, shares = finish_together(needs_of(demands, 1.0))
    assert (delay, list(shares)) == (pytest.approx(7.0), pytest.approx([0.0, 1.0]))


def test_proportional_is_by_payload() -> None:
    demands = [Demand("a", 1.0, 9.0), Demand("b", 3.0, 0.0)]
    assert load("bandwidth", "proportional").rule.allocate(demands, 1.0) == {"a": 1 / 4, "b": 3 / 4}


# ---------------------------------------------------------------- wireless


def test_lamberts_lower_branch_solves_its_equation() -> None:
    y = np.array([1.0 + 1e-6, 1.5, 2.0, 5.0, 50.0, 700.0])
    np.testing.assert_allclose(lambert_w_lower_log(np.log(y) - y), -y, rtol=1e-9)
    assert lambert_w_lower_log(np.array([-1.0])) == pytest.approx(-1)


def test_a_wireless_share_carries_its_rate() -> None:
    generator = np.random.default_rng(1)
    snr = 10 ** generator.uniform(-2, 8, 500)
    rho = snr * generator.uniform(1e-9, 0.999, 500)  # below the rate of an endless band
    share = wireless_share(rho, snr)
    np.testing.assert_allclose(share * np.log1p(snr / share), rho, rtol=1e-9)


def test_no_share_is_enough_beyond_an_endless_bands_rate() -> None:
    """b log2(1 + g / b) grows to g / ln 2, never to it."""
    assert list(wireless_share(np.array([2.0, 2.1, 0.0]), np.array([2.0, 2.0, 2.0]))) == [math.inf, math.inf, 0.0]


def test_wireless_devices_finish_together_too() -> None:
    demands = [Demand(f"d{n}", 1e6 * (n + 1), float(n), snr=10.0**n) for n in range(-1 + 1, 5)]
    needs = needs_of(demands, 10e6)
    delay, shares = finish_together(needs)
    assert needs.snr is not None
    rates = 10e6 * shares * np.log2(1 + needs.snr / shares)
    ends = [d.compute_s + 8 * d.payload_bytes / rate for d, rate in zip(demands, rates, strict=True)]
    np.testing.assert_allclose(ends, delay, rtol=1e-6)
    np.testing.assert_allclose(delay_of(needs, shares), ends, rtol=1e-12)


def test_wireless_only_where_every_channel_is_known() -> None:
    assert needs_of([Demand("a", 1, 1, snr=3.0), Demand("b", 1, 1)], 1.0).snr is None


def test_the_least_delay_of_fewer_devices_is_no_longer() -> None:
    needs = needs_of(instance(random.Random(5)), 10.0)
    delays = least_delays(needs, range(1, len(needs) + 1))
    assert np.all(np.diff(delays) >= 0)
    alone = needs.compute_s + needs.alone_s
    assert delays[0] == pytest.approx(np.min(alone))
    assert delays[-1] == pytest.approx(finish_together(needs)[0])


def test_some_of_the_needs() -> None:
    needs = Needs(np.array([1.0, 2.0]), np.array([3.0, 4.0]), np.array([1.0, 2.0]), np.array([5.0, 6.0]))
    one = needs.some(np.array([1]))
    assert (one.compute_s[0], one.alone_s[0], one.snr) == (2.0, 4.0, np.array([6.0]))
