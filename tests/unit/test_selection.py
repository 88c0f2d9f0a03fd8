"""What each way of choosing devices promises of its own; what all promise is in tests/contract."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from strategies.api import Candidate, RoundOutcome, RoundState
from strategies.registry import load
from strategies.selection.oort import Oort
from strategies.selection.tifl import TiFL


def state(candidates: Sequence[Candidate], wanted: int = 0, round_: int = 1, **other: Any) -> RoundState:
    return RoundState(round_, candidates, random.Random(f"1/{round_}"), wanted=wanted, **other)


def select(name: str, candidates: Sequence[Candidate], wanted: int, **options: Any) -> list[str]:
    return list(load("selection", name, {name: options}).rule.select(state(candidates, wanted)).names)


def devices(**of_each: Sequence[object]) -> list[Candidate]:
    count = len(next(iter(of_each.values())))
    return [Candidate(f"d{n}", **{key: values[n] for key, values in of_each.items()}) for n in range(count)]  # type: ignore[arg-type]


def test_random_draws_all_alike() -> None:
    strategy, drawn = load("selection", "random").rule, Counter[str]()
    pool = devices(examples=[1, 100, 10_000, 0])
    for round_ in range(2000):
        drawn.update(strategy.select(state(pool, 1, round_)).names)
    assert all(abs(drawn[c.name] / 2000 - 1 / 4) < 4 * math.sqrt(1 / 4 * 3 / 4 / 2000) for c in pool)


def test_round_robin_gives_each_its_turn() -> None:
    pool = {c.name: c for c in devices(examples=[1] * 5)}
    turns = []
    for round_ in range(1, 6):
        turns.append(select("round_robin", list(pool.values()), 2))
        pool |= {name: replace(pool[name], last_round=round_) for name in turns[-1]}
    assert turns == [["d0", "d1"], ["d2", "d3"], ["d0", "d4"], ["d1", "d2"], ["d0", "d3"]]


def test_best_channel_measures_first_and_then_takes_the_fastest() -> None:
    assert select("best_channel", devices(rate_bps=[3e6, None, 9e6, 1e6]), 2) == ["d1", "d2"]
    assert select("best_channel", devices(snr=[3.0, 0.1, 9.0]), 1) == ["d2"]


def test_power_of_choice_keeps_the_largest_losses_of_those_drawn() -> None:
    pool = devices(examples=[1] * 6, last_loss=[0.5, 2.0, None, 1.0, 3.0, 0.1])
    assert select("power_of_choice", pool, 3, d=6) == ["d1", "d2", "d4"]
    two = load("selection", "power_of_choice", {"power_of_choice": {"d": 2}}).rule.select(state(pool, 1))
    assert sum(reason.startswith("drawn") for reason in two.why.values()) == 2
    drawn = [pool[int(name[1])] for name, reason in two.why.items() if reason.startswith("drawn")]
    assert list(two.names) == [max(drawn, key=lambda c: math.inf if c.last_loss is None else c.last_loss).name]


def test_power_of_choice_draws_by_the_amount_of_data() -> None:
    strategy, drawn, rounds = (
        load("selection", "power_of_choice", {"power_of_choice": {"d": 1}}).rule,
        Counter[str](),
        3000,
    )
    pool = devices(examples=[1, 3, 0], last_loss=[1.0, 1.0, 9.0])
    for round_ in range(rounds):
        drawn.update(strategy.select(state(pool, 1, round_)).names)
    assert abs(drawn["d1"] / rounds - 3 / 4) < 4 * math.sqrt(3 / 4 * 1 / 4 / rounds)
    assert drawn["d2"] == 0


# ---------------------------------------------------------------- Oort


def known(**of_each: Sequence[object]) -> list[Candidate]:
    count = len(next(iter(of_each.values())))
    standard: dict[str, Any] = {"examples": [10] * count, "last_round": [1] * count, "last_seconds": [1.0] * count}
    return devices(**{**standard, "squared_loss": [1.0] * count, **of_each})


def test_oort_prefers_devices_that_still_learn() -> None:
    pool = known(squared_loss=[4.0, 0.01, 9.0, 0.0])
    assert select("oort", pool, 2, epsilon=0.0, epsilon_least=0.0, cut_off=1.0, clip=1.0) == ["d0", "d2"]


def test_oort_punishes_slow_devices_by_the_power() -> None:
    """d0 learns twice as much a round and takes 4 T: scores 1 against (1 / 4)^alpha."""
    pool = known(squared_loss=[4.0, 3.9, 0.0], last_seconds=[4.0, 1.0, 1.0])
    fixed = {"epsilon": 0.0, "epsilon_least": 0.0, "cut_off": 1.0, "clip": 1.0, "percentile": 50.0}
    assert select("oort", pool, 1, alpha=0.0, **fixed) == ["d0"]
    assert select("oort", pool, 1, alpha=2.0, **fixed) == ["d1"]
    why = load("selection", "oort", {"oort": {"alpha": 2.0, **fixed}}).rule.select(state(pool, 1)).why
    assert why["d0"].startswith(f"score {1 * (1 / 4) ** 2:.3g}: not drawn")


def test_oort_explores_less_and_less() -> None:
    pool = known(last_round=[1] * 10 + [0] * 10)
    oort = Oort(epsilon=0.9, epsilon_decay=0.5, epsilon_least=0.2)
    shares = []
    for round_ in range(2, 6):
        names = oort.select(state(pool, 10, round_)).names
        shares.append(sum(int(name[1:]) >= 10 for name in names) / 10)
        oort.observe(RoundOutcome(round_, 1.0, pool[:1]))
    assert shares == [round(10 * e) / 10 for e in (0.9, 0.45, 0.225, 0.2)]


def test_oort_leaves_out_who_took_part_too_often_while_others_are_enough() -> None:
    pool = known(squared_loss=[100.0, 1.0, 1.0])
    oort = Oort(most_rounds=2, epsilon=0.0, epsilon_least=0.0)
    for round_ in range(3):
        oort.observe(RoundOutcome(round_, 1.0, pool[:1]))
    selected = oort.select(state(pool, 2))
    assert list(selected.names) == ["d1", "d2"]
    assert selected.why["d0"] == "took part 3 times, more than 2"
    assert "d0" in oort.select(state(pool[:1], 1)).names


def test_oorts_pacer_waits_longer_when_nothing_more_is_gained() -> None:
    oort = Oort(percentile=30.0, pacer_rounds=2, pacer_step=5.0)
    for squared in (1.0, 1.0, 1.0, 1.0):  # flat: 2 rounds gained as much as the 2 before
        oort.observe(RoundOutcome(1, 1.0, known(squared_loss=[squared])))
    assert oort.percentile == 30 + 5
    for squared in (100.0, 100.0):  # 10 times as much a round
        oort.observe(RoundOutcome(1, 1.0, known(squared_loss=[squared])))
    assert oort.percentile == 30 + 5 - 5


# ---------------------------------------------------------------- FedCS


def test_fedcs_adds_what_lengthens_the_round_least_while_the_deadline_holds() -> None:
    """Capacity 1 byte a second; alone d0 takes 1 + 1, d1 0 + 3, d2 9 + 1 and d3 0 + 20 seconds."""
    pool = devices(compute_s=[1.0, 0.0, 9.0, 0.0], payload_bytes=[1.0, 3.0, 1.0, 20.0])
    fits = load("selection", "fedcs", {"fedcs": {"deadline_s": 11.0}}).rule.select(state(pool, capacity_bps=8.0))
    assert list(fits.names) == ["d0", "d1", "d2"]
    assert fits.why["d0"].startswith("added as number 1 at 2 s of ")
    # d0 and d1 together: 1 / (t - 1) + 3 / t = 1, t^2 - 5 t + 3 = 0
    assert fits.why["d1"].startswith(f"added as number 2 at {(5 + math.sqrt(25 - 12)) / 2:.3g} s")
    assert fits.why["d3"] == "does not fit into 11 s with the 3 chosen"
    two = load("selection", "fedcs", {"fedcs": {"deadline_s": 100.0}}).rule.select(state(pool, 2, capacity_bps=8.0))
    assert list(two.names) == ["d0", "d1"]


def test_fedcs_takes_the_quickest_where_nobody_is_in_time() -> None:
    pool = devices(compute_s=[9.0, 3.0, 5.0])
    selected = load("selection", "fedcs", {"fedcs": {"deadline_s": 1.0}}).rule.select(state(pool, least=2))
    assert list(selected.names) == ["d1", "d2"]
    assert selected.why["d1"] == "misses 1 s, but the round needs more devices"


def test_fedcs_in_parts_chooses_about_as_many_as_one_by_one() -> None:
    from strategies.bandwidth.links import needs_of
    from strategies.selection.fedcs import _in_parts, _one_by_one

    generator = random.Random(1)
    for _ in range(5):
        pool = [
            Candidate(f"d{n}", compute_s=generator.uniform(0, 20), payload_bytes=generator.uniform(1, 40))
            for n in range(60)
        ]
        needs = needs_of(pool, 80.0)
        exact, parts = _one_by_one(needs, 60.0, 60), _in_parts(needs, 60.0, 60)
        assert len(exact) > 5
        assert abs(len(exact) - len(parts)) <= 1
        assert sum(needs.shares(60.0)[list(parts)]) <= 1 + 1e-9


# ---------------------------------------------------------------- TiFL


def test_tifl_measures_all_and_then_takes_one_tier_a_round() -> None:
    pool = devices(last_seconds=[1.0, 9.0, None, 2.0, 8.0])
    assert select("tifl", pool, 3) == ["d2"], "those that were never measured come first"
    pool[2] = replace(pool[2], last_seconds=10.0)
    tiers = [{"d0", "d3"}, {"d1", "d2", "d4"}]
    seen = {tuple(select_round.names) for n in range(20) for select_round in [TiFL(tiers=2).select(state(pool, 0, n))]}
    assert {frozenset(names) for names in seen} == {frozenset(tier) for tier in tiers}


def test_tifl_draws_a_bad_tier_more_often() -> None:
    """Ranks: the worse tier weighs 2, the better 1."""
    pool = devices(last_seconds=[1.0, 2.0], metric=[0.9, 0.1])
    rounds = 2000
    drawn = Counter(TiFL(tiers=2).select(state(pool, 0, n)).names[0] for n in range(rounds))
    assert abs(drawn["d1"] / rounds - 2 / 3) < 4 * math.sqrt(2 / 3 * 1 / 3 / rounds)


def test_tifls_credits_give_every_tier_its_rounds() -> None:
    tifl = TiFL(tiers=2, credits=3)
    pool = devices(last_seconds=[1.0, 2.0], metric=[0.9, 0.1])
    drawn = [tifl.select(state(pool, 0, n)).names[0] for n in range(12)]
    assert Counter(drawn[:6]) == Counter(drawn[6:]) == {"d0": 3, "d1": 3}


@pytest.mark.parametrize("least", [1, 3])
def test_tifl_fills_up_a_tier_that_is_too_small_for_a_round(least: int) -> None:
    pool = devices(last_seconds=[1.0, 2.0, 3.0, 4.0])
    assert len(TiFL(tiers=4).select(state(pool, 0, least=least)).names) == least
