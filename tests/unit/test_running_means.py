"""The sums of a large round: for rules that need only the mean, in any order of arrival, without broken sites."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from edgelam_fl.model.adapter import to_bytes, views
from server.judging import QUIET, UpdateJudge, square_sum
from server.replies import FIRST_REPLIES, KEPT_NODES, RunningMeans, sums_on_arrival
from strategies.aggregation.fedavg import FedAvg, WeightedMean
from strategies.api import Aggregated, Contribution, Start
from strategies.registry import BUILT_IN, load, with_capabilities

A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")
MEANS = {"fedavg", "ffa", "rolora", "fedprox", "fedadam", "fedyogi", "fedadagrad", "fedavgm"}


class Otherwise(FedAvg):
    def aggregate(self, contributions: Sequence[Contribution], start: Start) -> Aggregated:
        return super().aggregate(contributions[:1], start)


class AndSaysSo(Otherwise):
    needs_only_mean = True


@pytest.mark.parametrize("name", BUILT_IN["aggregation"])
def test_rules_that_ask_for_the_mean_alone(name: str) -> None:
    assert sums_on_arrival(load("aggregation", name).capabilities, KEPT_NODES + 1) == (name in MEANS)
    assert not sums_on_arrival(load("aggregation", name).capabilities, KEPT_NODES)


def test_a_rule_that_is_derived_from_such_a_one_and_aggregates_otherwise_gets_all() -> None:
    assert not sums_on_arrival(with_capabilities(Otherwise()).capabilities, KEPT_NODES + 1)
    assert sums_on_arrival(with_capabilities(AndSaysSo()).capabilities, KEPT_NODES + 1)
    assert not sums_on_arrival(with_capabilities(object()).capabilities, KEPT_NODES + 1)


def contribution(number: int, *names: str) -> tuple[str, Contribution]:
    generator = np.random.default_rng(number)
    tensors = {name: generator.normal(size=(4, 6)).astype(np.float32) for name in names}
    return f"site-{number % 3}", Contribution(f"d{number}", 10 * number + 1, tensors, {A.split(".lora")[0]: 2.0})


def averaged(given: Sequence[tuple[str, Contribution]], broken: Sequence[str] = ()) -> list[Contribution]:
    means = running(factor=0)
    for one in given:
        means.add([one])
    return means.contributions(broken)


def running(factor: float) -> RunningMeans:
    start = {name: np.zeros((4, 6), np.float32) for name in (A, B)}
    return RunningMeans(UpdateJudge(start, {}, frozenset(), factor))


def test_s11_an_update_far_larger_than_the_others_is_left_out_wherever_it_arrives() -> None:
    """The first few wait for each other, so that a large one among them is seen; each later one is seen at once."""
    honest = [contribution(n, A) for n in range(20)]
    expected = averaged(honest)
    for place in (0, FIRST_REPLIES - 1, 15, 20):
        site, one = contribution(77, A)
        huge = replace(one, source="liar", tensors={name: 1000 * array for name, array in one.tensors.items()})
        means = running(factor=12)
        for part in [*honest[:place], (site, huge), *honest[place:]]:
            means.add([part])
        (mean,) = means.contributions(())
        np.testing.assert_allclose(mean.tensors[A], expected[0].tensors[A], rtol=1e-6)
        assert set(means.left_out) == {"liar"}
        assert "times the median of" in means.left_out["liar"]


def test_the_sums_are_the_mean_of_those_whose_site_is_whole() -> None:
    """Tensors with different total weights are in different contributions."""
    given = [contribution(n, *((A, B) if n % 2 else (A,))) for n in range(12)]
    whole = [one for site, one in given if site != "site-1"]
    mean = averaged(given, ["site-1"])
    weights = {name: sum(c.weight for c in whole if name in c.tensors) for name in (A, B)}
    assert {name: c.weight for c in mean for name in c.tensors} == weights
    expected = FedAvg().aggregate(whole, Start({})).tensors
    new = FedAvg().aggregate(mean, Start({})).tensors
    assert set(new) == {A, B}
    for name, array in expected.items():
        np.testing.assert_allclose(new[name], array, rtol=1e-6)
    assert all(c.scales == given[0][1].scales for c in mean)
    assert averaged(given, ["site-0", "site-1", "site-2"]) == []


def test_the_order_of_arrival_changes_no_more_than_a_last_bit() -> None:
    given = [contribution(n, A) for n in range(50)]
    (one,), (other,) = averaged(given), averaged(given[::-1])
    np.testing.assert_array_max_ulp(one.tensors[A], other.tensors[A], maxulp=1)


def test_one_source_keeps_its_bits() -> None:
    given = contribution(7, A, B)
    (mean,) = averaged([given])
    assert all(np.array_equal(mean.tensors[name], array) for name, array in given[1].tensors.items())


@QUIET
@pytest.mark.parametrize("size", [1, 7, 5000])
def test_sums_of_squares_hold_over_all_sizes_of_numbers(size: int) -> None:
    """Also of those whose squares vanish or overflow in fp32; an array that is not finite has no finite sum."""
    values = np.random.default_rng(size).normal(size=(1, size)).astype(np.float32)
    for scale in (1e-30, 1e-18, 1.0, 1e4):
        scaled = values * np.float32(scale)
        assert square_sum(scaled) == pytest.approx(float(np.sum(scaled.astype(np.float64) ** 2)), rel=1e-5)
    assert square_sum(np.zeros(size, np.float32)) == 0
    for bad in (np.nan, np.inf, -np.inf):
        assert not np.isfinite(square_sum(np.append(values, np.float32(bad))))


def test_tensors_whose_numbers_lie_together_are_summed_and_measured_as_others() -> None:
    """To the bit, also if some contributions came in another way or with other tensors."""
    random = np.random.default_rng(0)
    start = {A: np.zeros((2, 9000), np.float32), B: np.zeros((3, 2), np.float32)}
    updates = [
        {name: random.normal(size=array.shape).astype(np.float32) for name, array in start.items()} for _ in range(4)
    ]
    updates[2].pop(B)
    apart = [Contribution(f"d{n}", n + 1, tensors, {}) for n, tensors in enumerate(updates)]
    joined = [replace(one, tensors=views(to_bytes(dict(one.tensors)))) for one in apart]
    for order in ((0, 1, 2, 3), (2, 0, 1, 3)):
        plain, mixed = WeightedMean(), WeightedMean()
        for n in order:
            plain.add(apart[n])
            mixed.add(apart[n] if n == 1 else joined[n])
        assert {n: a.tobytes() for n, a in plain.result().items()} == {
            n: a.tobytes() for n, a in mixed.result().items()
        }
    judge = UpdateJudge(start, {}, frozenset(), 0.0)
    assert [judge.measure([one]).added for one in joined] == pytest.approx(
        [judge.measure([one]).added for one in apart], rel=1e-5
    )
