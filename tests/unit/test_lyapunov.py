"""The Lyapunov scheduler against all subsets, and over many rounds against its bound."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import pytest

from benchmarks.scheduling import BOUND_S, CAPACITY_BPS, excess_over_brute_force, follow, pool
from strategies.api import Candidate, RoundOutcome, RoundState
from strategies.bandwidth.links import finish_together, least_delays, needs_of
from strategies.selection.lyapunov import LyapunovSelection, best_count


def test_it_equals_brute_force() -> None:
    """Over every subset of up to 8 devices, each with its best shares; the delays come from a bisection of their own."""
    generator = random.Random(7)
    assert max(excess_over_brute_force(generator) for _ in range(200)) < 1e-9


def test_over_wireless_channels_too() -> None:
    generator = random.Random(7)
    for _ in range(10):
        candidates = [replace(c, snr=generator.expovariate(1 / 20)) for c in pool(generator, generator.randint(1, 8))]
        scheduler = LyapunovSelection(delay_s=20.0, v=10.0)
        scheduler.queue = generator.uniform(0, 20)

        def objective(chosen: Sequence[Candidate], scheduler: LyapunovSelection = scheduler) -> float:
            delay_s = finish_together(needs_of(chosen, CAPACITY_BPS))[0]
            return scheduler.v / len(chosen) + scheduler.queue / scheduler.delay_s * delay_s

        best = min(objective(s) for n in range(1, len(candidates) + 1) for s in combinations(candidates, n))
        names = scheduler.select(RoundState(1, candidates, random.Random(1), CAPACITY_BPS)).names
        assert objective([c for c in candidates if c.name in names]) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("devices", [65, 200])
def test_beyond_64_devices_it_is_within_a_thousandth_of_the_full_scan(devices: int) -> None:
    generator = random.Random(devices)
    for _ in range(10):
        needs = needs_of(pool(generator, devices), CAPACITY_BPS)
        delays = least_delays(needs, range(1, devices + 1))
        for pressure in (0.0, 1e-5, 1e-3, 0.1, 10.0):
            scanned = min(10 / n + pressure * delay for n, delay in enumerate(delays, 1))
            count, delay = best_count(needs, 10.0, pressure, 1, devices)
            assert 10 / count + pressure * delay <= scanned * (1 + 1e-3)
            assert delay == pytest.approx(delays[count - 1])


def test_without_a_queue_all_take_part() -> None:
    candidates = pool(random.Random(1), 70)
    for v in (0.0, 1.0):
        selected = LyapunovSelection(v=v).select(RoundState(1, candidates, random.Random(1), CAPACITY_BPS))
        assert len(selected.names) == len(candidates)


def test_the_queue_holds_what_the_rounds_took_too_long() -> None:
    scheduler = LyapunovSelection(delay_s=20.0)
    for seconds, queue in (
        (30.0, 30 / 20 - 1),
        (40.0, 30 / 20 + 40 / 20 - 2),
        (1.0, 1.5 + 2.0 + 1 / 20 - 3),
        (0.0, 0.0),
    ):
        scheduler.observe(RoundOutcome(1, seconds, []))
        assert scheduler.queue == pytest.approx(queue)


def test_the_average_delay_converges_to_the_bound() -> None:
    rounds = 800
    strict, lenient = follow(10.0, rounds), follow(100.0, rounds)
    for followed in (strict, lenient):
        most = BOUND_S * (1 + followed.queue / rounds)
        assert followed.average_s <= most + 1e-9, "the queue is all that the average may be above the bound"
    assert strict.average_s == pytest.approx(BOUND_S, rel=0.01)
    assert lenient.queue > strict.queue, "a larger v bears a longer queue"
    assert lenient.devices > strict.devices, "and takes more devices for it"
    assert follow(10.0, 50, bound_s=100.0).queue == 0, "a bound that never binds leaves none"


def test_the_reasons_name_share_delay_and_queue() -> None:
    candidates = pool(random.Random(1), 5)
    scheduler = LyapunovSelection(delay_s=1.0, v=0.1)
    scheduler.queue = 5.0
    selected = scheduler.select(RoundState(1, candidates, random.Random(1), CAPACITY_BPS, least=2))
    assert len(selected.names) == 2, "not fewer than the round needs"
    assert all("2 of 5 devices in" in reason and "queue 5" in reason for reason in selected.why.values())
    assert sum("not among the smallest" in reason for reason in selected.why.values()) == 3
