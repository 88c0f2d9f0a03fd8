"""What every strategy of a kind promises, over all in the table: a new one is picked up by its line there."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import permutations

import numpy as np
import pytest

from edgelam_fl.errors import ConfigError
from strategies.base import BUILT_IN, Aggregated, Candidate, Contribution, Demand, RoundState, load

A, B, C = (f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_A.weight" for layer in (0, 3, 5))


def contribution(source: str, weight: float, *names: str) -> Contribution:
    generator = np.random.default_rng(len(source) + round(weight))
    return Contribution(source, weight, {n: generator.normal(size=(2, 4)).astype(np.float32) for n in names})


THREE = [contribution("device-1", 3, A), contribution("device-2", 17, A, B), contribution("edge-1", 20, B, C)]


def arrays(result: Aggregated) -> dict[str, bytes]:
    named = {"": result.tensors, **result.personal}
    return {f"{source}/{name}": array.tobytes() for source, t in named.items() for name, array in t.items()}


# ---------------------------------------------------------------- aggregation


@pytest.mark.parametrize("name", BUILT_IN["aggregation"])
class TestAggregation:
    def test_same_input_same_bits(self, name: str) -> None:
        assert arrays(load("aggregation", name).aggregate(THREE)) == arrays(load("aggregation", name).aggregate(THREE))

    def test_the_order_of_the_replies_changes_no_bit(self, name: str) -> None:
        results = [arrays(load("aggregation", name).aggregate(list(order))) for order in permutations(THREE)]
        assert all(result == results[0] for result in results)

    def test_every_contributed_name_comes_back_in_fp32_and_no_other(self, name: str) -> None:
        result = load("aggregation", name).aggregate(THREE)
        assert set(result.tensors) == {A, B, C}
        assert {(a.dtype, a.shape) for a in result.tensors.values()} == {(np.dtype(np.float32), (2, 4))}

    def test_weights_sum_to_one(self, name: str) -> None:
        """Sources that agree are left as they are."""
        same = np.full((2, 4), 1.5, np.float32)
        sources = [Contribution(f"d{n}", weight, {A: same}) for n, weight in enumerate((3, 17, 1))]
        assert np.array_equal(load("aggregation", name).aggregate(sources).tensors[A], same)

    def test_one_source_keeps_its_bits(self, name: str) -> None:
        result = load("aggregation", name).aggregate(THREE[:1])
        assert np.array_equal(result.tensors[A], THREE[0].tensors[A])

    def test_no_source_gives_nothing(self, name: str) -> None:
        assert load("aggregation", name).aggregate([]) == Aggregated({})

    def test_its_input_is_left_alone(self, name: str) -> None:
        before = [{n: a.copy() for n, a in c.tensors.items()} for c in THREE]
        load("aggregation", name).aggregate(THREE)
        assert all(np.array_equal(c.tensors[n], old[n]) for c, old in zip(THREE, before, strict=True) for n in old)


def test_fedavg_weighs_by_labels_within_each_modules_sources() -> None:
    one, two, edge = THREE
    got = load("aggregation", "fedavg").aggregate(THREE).tensors
    np.testing.assert_allclose(got[A], (3 * one.tensors[A] + 17 * two.tensors[A]) / (3 + 17), atol=1e-6)
    np.testing.assert_allclose(got[B], (17 * two.tensors[B] + 20 * edge.tensors[B]) / (17 + 20), atol=1e-6)
    assert np.array_equal(got[C], edge.tensors[C])


def test_fedavg_refuses_unequal_ranks() -> None:
    other = Contribution("device-9", 1, {A: np.zeros((3, 4), np.float32)})
    with pytest.raises(ConfigError, match=r"fedavg needs equal ranks; .*'device-1': \(2, 4\).*'device-9': \(3, 4\)"):
        load("aggregation", "fedavg").aggregate([THREE[0], other])


def test_none_leaves_each_source_its_own() -> None:
    result = load("aggregation", "none").aggregate(THREE)
    assert {source: set(tensors) for source, tensors in result.personal.items()} == {
        "device-1": {A},
        "device-2": {A, B},
        "edge-1": {B, C},
    }
    assert result.personal["device-2"][A] is THREE[1].tensors[A]


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
    def aggregate(self, contributions: Sequence[Contribution]) -> Aggregated: ...


class Mine:
    def aggregate(self, contributions: Sequence[Contribution]) -> Aggregated:
        return Aggregated({})


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("aggregation", "fedavgg", "is not known; did you mean 'fedavg'?; your own is named package.module:Class"),
        ("aggregation", "xyz", "is not known; known: fedavg, none;"),
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
    assert type(load("aggregation", f"{__name__}:Mine")).__name__ == "Mine"
