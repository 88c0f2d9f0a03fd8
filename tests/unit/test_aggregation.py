"""The aggregations' mathematics on plain arrays: identities of the low-rank rules, Flower's own numbers, attacks, memory."""

from __future__ import annotations

import inspect
import logging
import tracemalloc
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_type_hints

import numpy as np
import psutil
import pytest
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from pydantic import TypeAdapter, ValidationError

from edgelam_fl.errors import ConfigError, TooFewSources
from edgelam_fl.plan.making import ClientSettings
from server.judging import first_not_finite
from strategies.aggregation import flower as ours
from strategies.aggregation.carry import Carry, CarryRule, added, carry_of, compressed
from strategies.aggregation.error import aggregation_error
from strategies.aggregation.factors import by_module
from strategies.aggregation.fedavg import FedAvg, WeightedMean
from strategies.aggregation.fedex import FedEx, residual
from strategies.aggregation.fedprox import FedProx
from strategies.aggregation.ffa import FfaLora
from strategies.aggregation.flexlora import FlexLora
from strategies.aggregation.flora import FLoRA
from strategies.aggregation.hetlora import HetLora
from strategies.aggregation.rolora import RoLora
from strategies.api import Aggregated, Aggregation, Contribution, Start
from strategies.registry import load

Q, V = (f"base_model.model.model.layers.4.self_attn.{leaf}" for leaf in ("q_proj", "v_proj"))
A, B = ".lora_A.weight", ".lora_B.weight"
ALPHA, OUT, IN = 16.0, 24, 20
RANKS, LABELS = (4, 4, 8, 2), (30, 7, 100, 13)
Tensors = dict[str, np.ndarray]


def factors(rng: np.random.Generator, rank: int, *modules: str) -> Tensors:
    shapes = {module + end: shape for module in modules for end, shape in ((A, (rank, IN)), (B, (OUT, rank)))}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def scales(rank: int) -> dict[str, float]:
    return {Q: ALPHA / rank, V: ALPHA / rank}


def start(rank: int) -> Start:
    return Start(factors(np.random.default_rng(9), rank, Q, V), scales(rank))


def sources(*ranks: int, drop: str = "-") -> list[Contribution]:
    """One a rank; `drop`: the factor that is frozen, and the modules' start in its place."""
    found = []
    for number, (rank, labels) in enumerate(zip(ranks, LABELS, strict=False)):
        tensors = factors(np.random.default_rng(number), rank, Q, V)
        kept = {name: array for name, array in tensors.items() if not name.endswith(drop)}
        found.append(Contribution(f"d{number}", labels, kept, scales(rank)))
    return found


def product(tensors: Tensors, module: str, scale: float) -> np.ndarray:
    return scale * tensors[module + B].astype(np.float64) @ tensors[module + A]


def wanted(contributions: Sequence[Contribution], module: str, frozen: Tensors | None = None) -> np.ndarray:
    """sum_k p_k s_k B_k A_k, dense."""
    total = sum(c.weight for c in contributions)
    parts = (
        c.weight / total * product({**(frozen or {}), **c.tensors}, module, c.scales[module]) for c in contributions
    )
    return np.sum(list(parts), axis=0)


def off(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


# ---------------------------------------------------------------- identities


def test_flexlora_at_full_rank_is_the_mean_of_the_products() -> None:
    given, from_ = sources(*RANKS), start(sum(RANKS))
    new = FlexLora().aggregate(given, from_).tensors
    for module in (Q, V):
        assert off(product(dict(new), module, ALPHA / sum(RANKS)), wanted(given, module)) < 1e-5
    assert aggregation_error(given, new, from_) == pytest.approx(0, abs=1e-5)


def test_flexlora_below_full_rank_is_the_best_at_that_rank() -> None:
    """Eckart and Young: what is cut off are the smallest singular values. A node's cut of it is the best at its rank."""
    given, rank = sources(*RANKS), 8
    new = dict(FlexLora().aggregate(given, start(rank)).tensors)
    expected = wanted(given, Q)
    values = np.linalg.svd(expected, compute_uv=False)
    assert off(product(new, Q, ALPHA / rank), expected) == pytest.approx(
        np.hypot.reduce(values[rank:]) / np.hypot.reduce(values), rel=1e-5
    )
    cut = {Q + A: new[Q + A][:3], Q + B: new[Q + B][:, :3]}
    assert off(product(cut, Q, ALPHA / rank), expected) == pytest.approx(
        np.hypot.reduce(values[3:]) / np.hypot.reduce(values), rel=1e-5
    )


def test_flexlora_of_few_sources_keeps_rows_that_can_learn() -> None:
    given, from_ = sources(2, 2), start(8)
    new = dict(FlexLora().aggregate(given, from_).tensors)
    assert off(product(new, Q, ALPHA / 8), wanted(given, Q)) < 1e-5
    assert np.array_equal(new[Q + A][4:], from_.tensors[Q + A][4:])
    assert not new[Q + B][:, 4:].any()


@pytest.mark.parametrize(("rule", "number", "frozen"), [(FfaLora(), 3, A), (RoLora(), 1, A), (RoLora(), 2, B)])
def test_with_one_factor_frozen_the_mean_is_exact(rule: Aggregation, number: int, frozen: str) -> None:
    settings = rule.client_settings(number)
    assert (settings.train_a, settings.train_b) == (frozen != A, frozen != B)
    given, from_ = sources(4, 4, 4, 4, drop=frozen), start(4)
    new = rule.aggregate(given, from_).tensors
    assert set(new) == {name for name in from_.tensors if not name.endswith(frozen)}
    assert aggregation_error(given, new, from_) == pytest.approx(0, abs=1e-6)
    kept = {name: array for name, array in from_.tensors.items() if name.endswith(frozen)}
    assert off(product({**kept, **new}, V, ALPHA / 4), wanted(given, V, kept)) < 1e-6


def test_fedit_is_not_exact_and_says_by_how_much(capsys: pytest.CaptureFixture[str]) -> None:
    given, from_ = sources(4, 4, 4, 4), start(4)
    new = FedAvg().aggregate(given, from_).tensors
    error = aggregation_error(given, new, from_)
    assert error is not None
    off_, whole = ([np.linalg.norm(x) for x in column] for column in zip(*(
        (product(dict(new), module, ALPHA / 4) - wanted(given, module), wanted(given, module)) for module in (Q, V)
    ), strict=True))  # fmt: skip
    assert error == pytest.approx(np.linalg.norm(off_) / np.linalg.norm(whole), rel=1e-6)
    with capsys.disabled():
        print(f"FedIT's error on unrelated factors: {error:.3f}")
    assert error > 0.1


def test_hetlora_pads_weighs_by_size_and_cuts() -> None:
    given, from_ = sources(*RANKS), start(8)
    new = HetLora().aggregate(given, from_).tensors
    sizes = [float(np.linalg.norm(product(dict(c.tensors), Q, c.scales[Q]))) for c in given]
    a = sum(
        size * np.pad(c.tensors[Q + A], ((0, 8 - rank), (0, 0)))
        for size, c, rank in zip(sizes, given, RANKS, strict=True)
    )
    b = sum(
        size * c.scales[Q] / (ALPHA / 8) * np.pad(c.tensors[Q + B], ((0, 0), (0, 8 - rank)))
        for size, c, rank in zip(sizes, given, RANKS, strict=True)
    )  # fmt: skip
    np.testing.assert_allclose(new[Q + A], a / sum(sizes), atol=1e-6)
    np.testing.assert_allclose(new[Q + B], b / sum(sizes), atol=1e-6)


@pytest.mark.parametrize("size", [1e18, 1e-24], ids=["huge", "tiny"])
def test_hetlora_weighs_by_size_however_large_or_small_updates_are(size: float) -> None:
    """s ||B A|| overflows or vanishes in fp32 at these sizes; a source's weight is its share of all sizes."""
    one, other = sources(4, 4)
    big = [
        Contribution(
            c.source, c.weight, {n: a * np.float32(size if n.endswith(B) else 1) for n, a in c.tensors.items()}
        )
        for c in (one, other)
    ]
    new = HetLora().aggregate(big, start(4)).tensors
    norms = [np.linalg.norm(c.tensors[Q + B].astype(float) @ c.tensors[Q + A].astype(float)) for c in (one, other)]
    share = norms[0] / sum(norms)
    expected = share * one.tensors[Q + A] + (1 - share) * other.tensors[Q + A]
    np.testing.assert_allclose(new[Q + A], expected, rtol=1e-5)


@pytest.mark.parametrize("rule", [FLoRA(), FedEx()], ids=["flora", "fedex"])
def test_what_carries_cannot_hold_is_seen_as_not_finite(rule: CarryRule) -> None:
    """Factors at fp32's end: the carry would be infinite, and the server keeps the old adapter."""
    huge = [
        Contribution(
            c.source,
            c.weight,
            {n: np.where(a > 0, 3e38, -3e38).astype(np.float32) for n, a in c.tensors.items()},
            scales(4),
        )
        for c in sources(4, 4)
    ]
    with np.errstate(all="ignore"):
        new = rule.aggregate(huge, start(4))
    assert first_not_finite([new.tensors, new.carry])


def test_hetlora_weighs_by_labels_where_nothing_was_learned() -> None:
    given = [
        Contribution(c.source, c.weight, {n: a * (not n.endswith(B)) for n, a in c.tensors.items()}, c.scales)
        for c in sources(4, 4)
    ]
    new = HetLora().aggregate(given, start(4)).tensors
    np.testing.assert_allclose(new[V + A], FedAvg().aggregate(given, start(4)).tensors[V + A], atol=1e-6)


def test_the_error_of_nothing_learned_is_none() -> None:
    zero = {Q + A: np.ones((4, IN), np.float32), Q + B: np.zeros((OUT, 4), np.float32)}
    assert aggregation_error([Contribution("d", 1, zero, scales(4))], zero, start(4)) is None
    head = {"base_model.model.classifier.weight": np.ones((3, 4), np.float32)}
    assert aggregation_error([Contribution("d", 1, head)], head, Start(head)) is None


# ---------------------------------------------------------------- carry factors


def test_flora_fedex_and_flexlora_are_one_sum() -> None:
    """FLoRA = FedEx = FlexLoRA at full rank = sum_k p_k s_k B_k A_k; of FedEx's unequal ranks, padded to the largest."""
    given, full = sources(*RANKS), sum(RANKS)
    flora, fedex = (rule.aggregate(given, start(8)) for rule in (FLoRA(), FedEx()))
    flex = dict(FlexLora().aggregate(given, start(full)).tensors)
    for module in (Q, V):
        expected = wanted(given, module)
        assert not flora.tensors[module + B].any(), "it starts anew"
        assert off(product(flex, module, ALPHA / full), expected) < 1e-5
        for result in (flora, fedex):
            assert off(product(dict(result.tensors), module, ALPHA / 8) + dense(module, result.carry), expected) < 1e-5
    for result in (flora, fedex):
        assert aggregation_error(given, {**result.tensors, **result.carry}, start(8)) == pytest.approx(0, abs=1e-5)
        assert result.facts["carry_error"] == 0
    assert carry_rank(flora) == full
    assert flora.facts["carry_bytes"] == 2 * full * (IN + OUT) * 4


@pytest.mark.parametrize("rule", [FLoRA(), FedEx()], ids=["flora", "fedex"])
def test_a_carry_goes_on_from_round_to_round(rule: CarryRule) -> None:
    """Each round adds; the full rank of a module, IN = 20, is never passed, and nothing is lost by that."""
    current, expected = dict(start(8).tensors), np.zeros((OUT, IN))
    for number in range(4):
        seen = Start(current, scales(8), seed=3, round=number)
        result = rule.aggregate(sources(8, 4, 4), seen)
        # What nodes trained replaces s B A of the round's start; the carry beside it stays.
        expected = dense(Q, current) + wanted(sources(8, 4, 4), Q)
        assert aggregation_error(sources(8, 4, 4), {**result.tensors, **result.carry}, seen) == pytest.approx(
            0, abs=1e-5
        )
        current |= {**result.tensors, **result.carry}
        assert off(product(current, Q, ALPHA / 8) + dense(Q, current), expected) < 1e-5
        assert carry_rank(result) <= IN
    assert carry_rank(result) == IN


def test_a_capped_carry_says_what_it_lost() -> None:
    given, seen = sources(*RANKS), start(8)
    result = FLoRA(residual="svd:5").aggregate(given, seen)
    values = {module: np.linalg.svd(wanted(given, module), compute_uv=False) for module in (Q, V)}
    lost, whole = (float(np.linalg.norm([v for of in values.values() for v in of[n:]])) for n in (5, 0))
    assert result.facts["carry_error"] == pytest.approx(lost / whole, rel=1e-5)
    assert aggregation_error(given, {**result.tensors, **result.carry}, seen) == pytest.approx(lost / whole, rel=1e-5)
    assert (carry_rank(result), result.facts["carry_bytes"]) == (5, 2 * 5 * (IN + OUT) * 4)


def test_flora_starts_a_anew_by_seed_round_and_module() -> None:
    def a(seed: int, round_: int, module: str = Q, rank: int = 8) -> np.ndarray:
        return (
            FLoRA().aggregate(sources(4, 8), Start(start(rank).tensors, scales(rank), seed, round_)).tensors[module + A]
        )

    assert np.array_equal(a(1, 2), a(1, 2))
    assert np.array_equal(a(1, 2, rank=9)[:8], a(1, 2)), "the first rows are a smaller rank's"
    assert all(not np.array_equal(a(1, 2), other) for other in (a(2, 2), a(1, 3), a(1, 2, V)))
    assert np.abs(a(1, 2)).max() <= IN**-0.5


@pytest.mark.parametrize("rule", [FLoRA(), FedEx()], ids=["flora", "fedex"])
def test_a_source_alone_of_less_rank_keeps_its_product(rule: CarryRule) -> None:
    (given,) = sources(3)
    result = rule.aggregate([given], start(8))
    assert off(product(dict(result.tensors), Q, ALPHA / 8), wanted([given], Q)) < 1e-6
    assert np.array_equal(result.tensors[Q + A][3:], start(8).tensors[Q + A][3:]), "rows that can learn"
    assert not result.carry


@pytest.mark.parametrize("residual", ["svd", "svd:0", "svd:-1", "svd:1.5", "exactly"])
def test_a_residual_that_cannot_be(residual: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"strategy.options.fedex: residual = '{residual}' must be 'exact', or 'svd:RANK'"
    ):
        load("aggregation", "fedex", {"fedex": {"residual": residual}})


def dense(module: str, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    carry = carry_of(module, tensors)
    return np.zeros((OUT, IN)) if carry is None else carry.b_OM.astype(np.float64) @ carry.a_MI


def carry_rank(result: Aggregated) -> int:
    carry = carry_of(Q, result.carry)
    assert carry is not None
    assert carry.rank == result.facts["carry_rank"]
    return carry.rank


def test_fedexs_residual_has_rank_k_less_1_times_r() -> None:
    given, from_ = sources(4, 4, 4, 4), start(4)
    mean = FedAvg().aggregate(given, from_).tensors
    carry = residual(by_module(given, from_)[Q], mean[Q + A], mean[Q + B], ALPHA / 4)
    cut = compressed(carry, (len(given) - 1) * 4)
    assert cut.lost == pytest.approx(0, abs=1e-6 * cut.whole)
    assert off(cut.carry.b_OM @ cut.carry.a_MI, carry.b_OM @ carry.a_MI) < 1e-6
    less = compressed(carry, (len(given) - 1) * 4 - 1)
    assert less.lost > 1e-3 * less.whole
    assert carry_rank(FedEx().aggregate(given, from_)) == (len(given) - 1) * 4, "and no rank is spent on rounding"


def test_a_carry_over_its_cap_is_cut_to_the_nearest_and_says_how_near() -> None:
    rng = np.random.default_rng(8)
    one, other = (Carry(rng.normal(size=(rank, IN)), rng.normal(size=(OUT, rank))) for rank in (5, 6))
    both = added(one, other)
    dense = one.b_OM @ one.a_MI + other.b_OM @ other.a_MI
    assert off(both.b_OM @ both.a_MI, dense) < 1e-12
    cut = compressed(both, 7)
    values = np.linalg.svd(dense, compute_uv=False)
    assert (cut.lost, cut.whole) == pytest.approx((np.linalg.norm(values[7:]), np.linalg.norm(values)))
    assert off(cut.carry.b_OM @ cut.carry.a_MI, dense) == pytest.approx(cut.lost / cut.whole)
    assert compressed(both, 11).carry is both


# ---------------------------------------------------------------- Flower's own numbers


class Reply:
    def __init__(self, tensors: Tensors, weight: float) -> None:
        arrays = ArrayRecord({name: Array(array) for name, array in tensors.items()})
        self.content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": weight})})

    def has_error(self) -> bool:
        return False


def rounds(number: int = 3) -> Iterator[list[Contribution]]:
    rng = np.random.default_rng(5)
    for _ in range(number):
        yield [Contribution(f"d{n}", 5 * n + 3, factors(rng, 4, Q, V), scales(4)) for n in range(6)]


def as_flower(flowers: Any, number: int, given: Sequence[Contribution]) -> Tensors:
    record, _ = flowers.aggregate_train(number, [Reply(dict(c.tensors), c.weight) for c in given])
    return {name: array.numpy() for name, array in record.items()}


OPTIMIZERS: list[tuple[Aggregation, Any]] = [
    (FedAvg(), flower.FedAvg()),
    (ours.FedAdam(eta=0.1), flower.FedAdam()),
    (ours.FedYogi(eta=0.3, beta_2=0.5), flower.FedYogi(eta=0.3, beta_2=0.5)),
    (ours.FedAdagrad(eta=0.1, tau=0.2), flower.FedAdagrad(tau=0.2)),
    (ours.FedAvgM(learning_rate=0.5, momentum=0.8), flower.FedAvgM(server_learning_rate=0.5, server_momentum=0.8)),
    (ours.FedAvgM(momentum=0.0), flower.FedAvg()),
]


@pytest.mark.parametrize(("rule", "flowers"), OPTIMIZERS, ids=lambda x: type(x).__name__)
def test_optimizers_are_flowers_over_rounds(rule: Aggregation, flowers: Any) -> None:
    current = dict(start(4).tensors)
    for number, given in enumerate(rounds(), 1):
        arrays = ArrayRecord({name: Array(array) for name, array in current.items()})
        flowers.current_arrays = arrays if isinstance(flowers, flower.FedAvgM) else dict(current)
        expected = as_flower(flowers, number, given)
        current = dict(rule.aggregate(given, Start(current, scales(4))).tensors)
        for name, array in expected.items():
            np.testing.assert_allclose(current[name], array, atol=1e-7, rtol=1e-6)


ROBUST: list[tuple[Aggregation, Any]] = [
    (ours.FedMedian(), flower.FedMedian()),
    (ours.FedTrimmedAvg(beta=0.3), flower.FedTrimmedAvg(beta=0.3)),
    (ours.Krum(malicious=1), flower.Krum(num_malicious_nodes=1)),
    (ours.MultiKrum(malicious=1, selected=2), flower.MultiKrum(num_malicious_nodes=1, num_nodes_to_select=2)),
]


@pytest.mark.parametrize(("rule", "flowers"), ROBUST, ids=lambda x: type(x).__name__)
def test_robust_rules_are_flowers(rule: Aggregation, flowers: Any) -> None:
    for given in rounds():
        new = rule.aggregate(given, start(4)).tensors
        for name, array in as_flower(flowers, 1, given).items():
            np.testing.assert_allclose(new[name], array, atol=1e-7, rtol=1e-6)


def test_an_optimizers_state_is_a_modules() -> None:
    """A round in which nobody trained V is none for V, and the log stays quiet."""
    rule, whole = ours.FedAdam(), ours.FedAdam()
    first, second, third = rounds()
    without = [
        Contribution(c.source, c.weight, {n: a for n, a in c.tensors.items() if n.startswith(Q)}) for c in second
    ]
    for given in (first, without, third):
        got = rule.aggregate(given, start(4)).tensors
    for given in (first, third):
        expected = whole.aggregate(given, start(4)).tensors
    assert np.array_equal(got[V + B], expected[V + B])
    assert not np.array_equal(got[Q + B], expected[Q + B])


def test_flowers_log_is_quiet_and_put_back(caplog: pytest.LogCaptureFixture) -> None:
    level = logging.getLogger("flwr").level
    ours.FedMedian().aggregate(next(rounds()), start(4))
    assert not caplog.records
    assert logging.getLogger("flwr").level == level


def test_krum_chooses_once_for_all_that_the_same_sources_trained() -> None:
    given = next(rounds())
    new = ours.Krum().aggregate(given, start(4)).tensors
    chosen = [c.source for c in given if np.array_equal(c.tensors[Q + A], new[Q + A])]
    (one,) = [c for c in given if c.source in chosen]
    assert all(np.array_equal(new[name], array) for name, array in one.tensors.items())


@pytest.mark.parametrize(
    ("rule", "least"),
    [
        (ours.FedMedian(), 3),
        (ours.FedTrimmedAvg(beta=0.25), 4),
        (ours.Krum(malicious=2), 7),
        (ours.MultiKrum(malicious=1, selected=5), 6),
    ],
)
def test_fewer_sources_than_the_rule_needs(rule: Aggregation, least: int) -> None:
    given = [Contribution(f"d{n}", 1, factors(np.random.default_rng(n), 4, Q)) for n in range(least)]
    assert rule.least_sources == least
    assert set(rule.aggregate(given, start(4)).tensors) == {Q + A, Q + B}
    with pytest.raises(
        TooFewSources, match=f"needs at least {least} sources, and .*q_proj.lora_A.weight has {least - 1}: d0, d1"
    ):
        rule.aggregate(given[1:] if least == 2 else given[:-1], start(4))


# ---------------------------------------------------------------- attacks

TARGET = np.linspace(-1, 1, OUT * 4, dtype=np.float32).reshape(OUT, 4)


def learn(rule: Aggregation, attack: str, rounds: int = 40) -> float:
    """How far 20 devices end from a quadratic's minimum, 4 of them malicious; each sees it with a little noise."""
    rng = np.random.default_rng(3)
    a = rng.normal(size=(4, IN)).astype(np.float32)
    b = np.zeros_like(TARGET)
    for _ in range(rounds):
        given = []
        for device in range(20):
            step = 0.3 * (TARGET + rng.normal(size=b.shape) * 0.1 - b)
            if device % 5 == 0:
                step = -4 * step if attack == "sign flip" else step + 10 * rng.normal(size=b.shape)
            given.append(Contribution(f"d{device:02}", 1, {Q + B: (b + step).astype(np.float32)}))
        b = rule.aggregate(given, Start({Q + A: a, Q + B: b})).tensors[Q + B]
    return off(b, TARGET)


@pytest.mark.parametrize("attack", ["sign flip", "noise x 10"])
def test_robust_rules_stand_what_the_mean_does_not(attack: str) -> None:
    mean = learn(FedAvg(), attack)
    assert mean > 0.5
    rules = [
        ours.FedTrimmedAvg(beta=0.25),
        ours.FedMedian(),
        ours.Krum(malicious=4),
        ours.MultiKrum(malicious=4, selected=8),
    ]
    assert {type(rule).__name__: learn(rule, attack) < min(0.25, mean / 4) for rule in rules} == {
        type(rule).__name__: True for rule in rules
    }


# ---------------------------------------------------------------- as updates arrive


def smollm2() -> dict[str, tuple[int, ...]]:
    """SmolLM2-135M, rank 8 on q and v: 30 layers of 8 (576 + 576) + 8 (576 + 192) numbers."""
    return {
        f"base_model.model.model.layers.{layer}.self_attn.{leaf}{end}": shape
        for layer in range(30)
        for leaf, out in (("q_proj", 576), ("v_proj", 192))
        for end, shape in ((A, (8, 576)), (B, (out, 8)))
    }


def test_a_thousand_updates_as_they_arrive_take_less_than_four() -> None:
    names = smollm2()
    numbers = sum(int(np.prod(shape)) for shape in names.values())
    assert numbers == 30 * 8 * (576 + 576 + 576 + 192) == 460_800
    base = {name: np.random.default_rng(1).normal(size=shape).astype(np.float32) for name, shape in names.items()}

    def arrived(number: int) -> Contribution:
        return Contribution(f"d{number}", number + 1, {n: array + np.float32(number) for n, array in base.items()})

    WeightedMean().add(arrived(0))  # what the first use loads is not counted
    mean, process, resident = WeightedMean(), psutil.Process(), [0]
    before = process.memory_info().rss
    tracemalloc.start()
    for number in range(1000):
        mean.add(arrived(number))
        resident.append(process.memory_info().rss - before)
    result = mean.result()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * numbers * 4
    print(f"resident: {max(resident) / numbers / 4:.2f} updates, allocated: {peak / numbers / 4:.2f}")
    assert max(resident) < 4 * numbers * 4
    expected = sum((n + 1) * n for n in range(1000)) / sum(range(1, 1001))
    name = next(iter(names))
    np.testing.assert_allclose(result[name], base[name] + expected, rtol=1e-5)


def test_the_mean_is_that_of_all_at_once() -> None:
    given = next(rounds())
    mean = WeightedMean()
    for contribution in reversed(given):
        mean.add(contribution)
    expected = FedAvg().aggregate(given, start(4)).tensors
    for name, array in mean.result().items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-6)


# ---------------------------------------------------------------- options


def test_fedprox_asks_for_its_pull() -> None:
    assert FedProx(mu=0.5).client_settings(1) == ClientSettings(prox_mu=0.5)
    assert ours.Krum(freeze_a=True).client_settings(1) == ClientSettings(train_a=False)


@pytest.mark.parametrize(
    ("rule", "option", "value"),
    [
        (FedProx, "mu", -1.0),
        (ours.FedAdam, "eta", 0.0),
        (ours.FedYogi, "beta_1", 1.0),
        (ours.FedYogi, "beta_2", -0.1),
        (ours.FedAdagrad, "tau", 0.0),
        (ours.FedAvgM, "momentum", 1.0),
        (ours.FedAvgM, "learning_rate", -1.0),
        (ours.FedTrimmedAvg, "beta", 0.5),
        (ours.FedTrimmedAvg, "beta", 0.0),
        (ours.Krum, "malicious", -1),
        (ours.MultiKrum, "selected", 0),
    ],
)
def test_options_have_rules(rule: type, option: str, value: float) -> None:
    """The annotations of the arguments: what comes from a run file is held against them."""
    allowed = TypeAdapter(get_type_hints(rule.__init__, include_extras=True)[option])  # type: ignore[misc]
    default = inspect.signature(rule).parameters[option].default
    assert allowed.validate_python(default, strict=True) == default
    with pytest.raises(ValidationError):
        allowed.validate_python(value, strict=True)
