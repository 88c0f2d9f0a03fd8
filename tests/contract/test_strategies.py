"""What every strategy of a kind promises, over all in the table: a new one is picked up by its line there."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice, permutations

import numpy as np
import pytest

from edgelam_fl.errors import ConfigError
from strategies.base import (
    BUILT_IN,
    Aggregated,
    Aggregation,
    Candidate,
    ClientSettings,
    Contribution,
    Demand,
    RoundState,
    Start,
    asked_by,
    load,
)

Q, V, K = (f"base_model.model.model.layers.{layer}.self_attn.q_proj" for layer in (0, 3, 5))
HEAD = "base_model.model.classifier.weight"
SHAPES = {".lora_A.weight": (2, 6), ".lora_B.weight": (5, 2)}
OPTIMIZERS = {"fedadam", "fedyogi", "fedadagrad", "fedavgm"}  # theirs is a step of their own
A, B, C = (f"{module}.lora_B.weight" for module in (Q, V, K))


def tensors(seed: int, *modules: str) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    names = (
        {m + end: shape for m in modules for end, shape in SHAPES.items()} if HEAD not in modules else {HEAD: (3, 6)}
    )
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in names.items()}


START = Start({**tensors(1, Q, V, K), **tensors(2, HEAD)}, dict.fromkeys((Q, V, K), 4.0))
SOURCES = {
    **{f"device-{n}": (weight, {**tensors(n, Q, V), **tensors(n + 40, HEAD)}) for n, weight in enumerate((3, 17, 1, 8, 8, 40), 10)},
    "site edge-1": (77, tensors(30, V, K)),
}  # fmt: skip


def strategy(name: str) -> Aggregation:
    return load("aggregation", name)


def allowed(name: str, found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What devices contribute of these tensors in the first round: no frozen factor."""
    settings = strategy(name).client_settings(1)
    frozen = [end for end, trains in zip(SHAPES, (settings.train_a, settings.train_b), strict=True) if not trains]
    return {n: array for n, array in found.items() if not n.endswith(tuple(frozen))}


def sources(name: str) -> list[Contribution]:
    return [
        Contribution(source, weight, allowed(name, found), START.scales) for source, (weight, found) in SOURCES.items()
    ]


def arrays(result: Aggregated) -> dict[str, bytes]:
    named = {"": result.tensors, **result.personal}
    return {f"{source}/{name}": array.tobytes() for source, t in named.items() for name, array in t.items()}


# ---------------------------------------------------------------- aggregation


@pytest.mark.parametrize("name", BUILT_IN["aggregation"])
class TestAggregation:
    def test_same_input_same_bits(self, name: str) -> None:
        results = [arrays(strategy(name).aggregate(sources(name), START)) for _ in range(2)]
        assert results[0] == results[1]

    def test_the_order_of_the_replies_changes_no_bit(self, name: str) -> None:
        orders = [list(order) for order in islice(permutations(sources(name)), 0, None, 97)]
        results = [arrays(strategy(name).aggregate(order, START)) for order in orders]
        assert all(result == results[0] for result in results)

    def test_every_contributed_name_comes_back_in_fp32_and_no_other(self, name: str) -> None:
        result = strategy(name).aggregate(sources(name), START)
        assert set(result.tensors) == {n for source in sources(name) for n in source.tensors}
        for n, array in result.tensors.items():
            assert (array.dtype, array.shape) == (np.float32, START.tensors[n].shape)
            assert np.isfinite(array).all()

    def test_weights_sum_to_one(self, name: str) -> None:
        """Sources that agree on where they started leave it as it is."""
        same = allowed(name, dict(START.tensors))
        agreed = [Contribution(f"d{n}", weight, same, START.scales) for n, weight in enumerate((3, 17, 1, 1, 9))]
        new = {**START.tensors, **strategy(name).aggregate(agreed, START).tensors}
        for module in (Q, V, K):
            product = new[module + ".lora_B.weight"] @ new[module + ".lora_A.weight"]
            expected = START.tensors[module + ".lora_B.weight"] @ START.tensors[module + ".lora_A.weight"]
            np.testing.assert_allclose(product, expected, atol=1e-5)
        np.testing.assert_allclose(new[HEAD], START.tensors[HEAD], atol=1e-7)

    def test_one_device_keeps_its_bits(self, name: str) -> None:
        (one,) = [source for source in sources(name) if source.source == "device-10"]
        result = strategy(name).aggregate([one], START)
        assert set(result.tensors) == set(one.tensors)
        if name not in OPTIMIZERS:
            assert all(np.array_equal(result.tensors[n], array) for n, array in one.tensors.items())

    def test_no_source_gives_nothing(self, name: str) -> None:
        assert strategy(name).aggregate([], START) == Aggregated({})

    def test_a_lost_device_is_as_if_it_had_never_been(self, name: str) -> None:
        found = strategy(name)
        rest = [source for source in sources(name) if source.source != "device-12"]
        result = found.aggregate(rest, START)
        assert set(result.tensors) == set(found.aggregate(sources(name), START).tensors)
        assert arrays(result) == arrays(strategy(name).aggregate(rest, START))

    def test_a_module_that_only_one_source_trained_is_that_sources(self, name: str) -> None:
        result = strategy(name).aggregate(sources(name), START)
        own = sources(name)[-1].tensors
        if name not in OPTIMIZERS:
            assert all(np.array_equal(result.tensors[n], array) for n, array in own.items() if n.startswith(K))

    def test_its_input_is_left_alone(self, name: str) -> None:
        given = sources(name)
        before = [{n: a.copy() for n, a in c.tensors.items()} for c in given]
        strategy(name).aggregate(given, START)
        assert all(np.array_equal(c.tensors[n], old[n]) for c, old in zip(given, before, strict=True) for n in old)

    def test_one_factor_trains_at_least_and_ranks_are_refused_or_taken(self, name: str) -> None:
        settings = [strategy(name).client_settings(number) for number in range(1, 5)]
        assert all(one.train_a or one.train_b for one in settings)
        given = sources(name)
        cut = {n: a[:, :1] if n.endswith("B.weight") else a[:1] for n, a in given[0].tensors.items() if n != HEAD}
        given[0] = replace(given[0], tensors=cut)
        if strategy(name).unequal_ranks:
            result = strategy(name).aggregate(given, START)
            assert all(array.shape == START.tensors[n].shape for n, array in result.tensors.items())
        else:
            with pytest.raises(ConfigError, match="this aggregation needs equal ranks: base_model"):
                strategy(name).aggregate(given, START)


def test_fedavg_weighs_by_labels_within_each_modules_sources() -> None:
    one, two, edge = (Contribution(source, weight, dict(tensors(weight, *modules))) for source, weight, modules in
                      (("device-1", 3, [Q]), ("device-2", 17, [Q, V]), ("edge-1", 20, [V, K])))  # fmt: skip
    got = strategy("fedavg").aggregate([one, two, edge], START).tensors
    np.testing.assert_allclose(got[A], (3 * one.tensors[A] + 17 * two.tensors[A]) / (3 + 17), atol=1e-6)
    np.testing.assert_allclose(got[B], (17 * two.tensors[B] + 20 * edge.tensors[B]) / (17 + 20), atol=1e-6)
    assert np.array_equal(got[C], edge.tensors[C])


def test_none_leaves_each_source_its_own() -> None:
    given = sources("none")
    result = strategy("none").aggregate(given, START)
    assert {source: set(t) for source, t in result.personal.items()} == {c.source: set(c.tensors) for c in given}
    assert result.personal["device-11"][A] is given[1].tensors[A]


# ---------------------------------------------------------------- selection

CANDIDATES = [Candidate("b", 10, 2.0), Candidate("a", 200, None), Candidate("c", 1, 0.5)]


def select(name: str, candidates: Sequence[Candidate]) -> tuple[list[str], dict[str, str]]:
    selected = load("selection", name).select(RoundState(1, list(candidates), random.Random(7)))
    return list(selected.names), dict(selected.why)


@pytest.mark.parametrize("name", BUILT_IN["selection"])
class TestSelection:
    def test_the_same_whatever_the_order(self, name: str) -> None:
        results = [select(name, order) for order in permutations(CANDIDATES)]
        assert all(result == results[0] for result in results)

    def test_names_candidates_once_each_and_says_why(self, name: str) -> None:
        names, why = select(name, CANDIDATES)
        assert len(set(names)) == len(names)
        assert set(names) <= set(why) == {"a", "b", "c"}

    def test_one_device_takes_part(self, name: str) -> None:
        assert select(name, CANDIDATES[:1])[0] == ["b"]

    def test_no_device(self, name: str) -> None:
        assert select(name, []) == ([], {})


def test_all_selects_all_in_the_order_of_their_names() -> None:
    assert select("all", CANDIDATES)[0] == ["a", "b", "c"]


# ---------------------------------------------------------------- bandwidth

DEMANDS = [Demand("b", 1e6, 2.0), Demand("a", 0.0, 0.0), Demand("c", 5e9, 0.1)]


@pytest.mark.parametrize("name", BUILT_IN["bandwidth"])
class TestBandwidth:
    def test_the_same_whatever_the_order(self, name: str) -> None:
        results = [dict(load("bandwidth", name).allocate(list(order), 1e8)) for order in permutations(DEMANDS)]
        assert all(result == results[0] for result in results)

    @pytest.mark.parametrize("devices", [1, 2, 3])
    def test_shares_sum_to_one(self, name: str, devices: int) -> None:
        shares = load("bandwidth", name).allocate(DEMANDS[:devices], 1e8)
        assert set(shares) == {demand.name for demand in DEMANDS[:devices]}
        assert sum(shares.values()) == pytest.approx(1)
        assert all(0 <= share <= 1 for share in shares.values())

    def test_no_device_no_shares(self, name: str) -> None:
        assert dict(load("bandwidth", name).allocate([], 1e8)) == {}


# ---------------------------------------------------------------- by name


class NoStrategy:
    pass


class WantsArguments:
    def __init__(self, alpha: float) -> None: ...
    def aggregate(self, contributions: Sequence[Contribution], start: Start) -> Aggregated: ...


class Mine:
    def aggregate(self, contributions: Sequence[Contribution], start: Start) -> Aggregated:
        return Aggregated({})


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("aggregation", "fedavgg", "is not known; did you mean 'fedavg'?; your own is named package.module:Class"),
        ("aggregation", "xyz", "is not known; known: fedadagrad, fedadam, "),
        ("selection", "al", "is not known; did you mean 'all'?"),
        ("bandwidth", "unifrom", "did you mean 'uniform'?"),
        ("aggregation", "no_such_package:Class", "cannot be loaded: No module named 'no_such_package'"),
        ("aggregation", "tests.contract.test_strategies:Absent", "cannot be loaded: module"),
        ("aggregation", "tests.contract.test_strategies:", "cannot be loaded"),
        ("aggregation", ":Class", "cannot be loaded"),
        ("aggregation", ".relative:Class", "cannot be loaded"),
        ("aggregation", "tests.contract.test_strategies:WantsArguments", "cannot be loaded"),
        ("aggregation", f"{__name__}:NoStrategy", "has no method aggregate(); it is no aggregation strategy"),
        ("selection", f"{__name__}:Mine", "has no method select(); it is no selection strategy"),
        ("bandwidth", "strategies.selection.all:SelectAll", "has no method allocate(); it is no bandwidth strategy"),
    ],
)
def test_a_name_that_cannot_be_used_says_why(kind: str, name: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(kind, name)
    assert str(caught.value).startswith(f"strategy.{kind} = {name!r} ")
    assert words in str(caught.value)


def test_ones_own_class_is_loaded_by_its_path() -> None:
    mine = load("aggregation", f"{__name__}:Mine")
    assert type(mine).__name__ == "Mine"
    assert asked_by(mine, 1) == ClientSettings(), "it need not say what it asks of nodes"
    assert asked_by(strategy("ffa"), 1) == ClientSettings(train_a=False)
