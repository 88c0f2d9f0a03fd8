"""What every strategy of a kind promises: checked over the table, the examples and strategies written to a file here.

A new strategy is picked up by its line in the table.
"""

from __future__ import annotations

import ast
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from itertools import islice, permutations
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from pydantic import Field

from edgelam_fl.bounds import Bounds
from edgelam_fl.errors import ConfigError
from edgelam_fl.model.carry import CARRY_A, CARRY_B
from edgelam_fl.plan.making import ClientSettings
from server.checkpoint import flatten, unflatten
from strategies import registry
from strategies.aggregation.carry import carry_of
from strategies.api import (
    Aggregated,
    Aggregation,
    Candidate,
    Contribution,
    Demand,
    RoundOutcome,
    RoundState,
    Selected,
    Start,
)
from strategies.registry import BUILT_IN, Capabilities, LoadedStrategy, with_capabilities
from strategies.selection.all import SelectAll

BOUNDS = Bounds(packages=("tests", "examples", "written_aggregation", "written_selection", "written_bandwidth"))
load = partial(registry.load, bounds=BOUNDS)
load_all = partial(registry.load_all, bounds=BOUNDS)
Q, V, K = (f"base_model.model.model.layers.{layer}.self_attn.q_proj" for layer in (0, 3, 5))
HEAD = "base_model.model.classifier.weight"
SHAPES = {".lora_A.weight": (2, 6), ".lora_B.weight": (5, 2)}
EXAMPLES = {
    "aggregation": "examples.strategies.my_aggregation:OneVoteEach",
    "selection": "examples.strategies.my_selection:LargestFirst",
    "bandwidth": "examples.strategies.my_bandwidth:ByRoot",
}
# Each as an author would write it: one file, nothing but the class of its kind and what its method needs.
WRITTEN = {
    "aggregation": """
import numpy as np

from edgelam_fl.errors import ConfigError
from strategies.api import Aggregated, Aggregation


class Mine(Aggregation):
    def aggregate(self, contributions, start):
        sums, weights = {}, {}
        for one in sorted(contributions, key=lambda one: (one.source, one.weight)):
            for name, array in one.tensors.items():
                if array.shape != start.tensors[name].shape:
                    raise ConfigError(f"this aggregation needs equal ranks: {name}")
                sums[name] = sums.get(name, 0) + np.float64(one.weight) * array
                weights[name] = weights.get(name, 0) + one.weight
        return Aggregated({name: (total / weights[name]).astype(np.float32) for name, total in sums.items()})
""",
    "selection": """
from strategies.api import Selected, Selection


class Mine(Selection):
    def select(self, state):
        names = sorted(candidate.name for candidate in state.candidates)
        return Selected(names[: state.at_most()], {name: f"place {n} by name" for n, name in enumerate(names, 1)})
""",
    "bandwidth": """
from strategies.api import Bandwidth


class Mine(Bandwidth):
    def allocate(self, demands, capacity_bps):
        return {demand.name: 1 / len(demands) for demand in demands}
""",
}
NAMES = {kind: [*table, EXAMPLES[kind], f"written_{kind}:Mine"] for kind, table in BUILT_IN.items()}
OPTIMIZERS = {"fedadam", "fedyogi", "fedadagrad", "fedavgm"}  # theirs is a step of their own
A, B, C = (f"{module}.lora_B.weight" for module in (Q, V, K))


@pytest.fixture(scope="module", autouse=True)
def written_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Puts the written strategies where `load` finds an author's module: on Python's path."""
    folder = tmp_path_factory.mktemp("written")
    for kind, text in WRITTEN.items():
        (folder / f"written_{kind}.py").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder


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
    return load("aggregation", name).rule


def capabilities(name: str) -> Capabilities:
    return load("aggregation", name).capabilities


def allowed(name: str, found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What devices contribute of these tensors in the first round: no frozen factor."""
    settings = capabilities(name).client_settings(1)
    frozen = [end for end, trains in zip(SHAPES, (settings.train_a, settings.train_b), strict=True) if not trains]
    return {n: array for n, array in found.items() if not n.endswith(tuple(frozen))}


def sources(name: str) -> list[Contribution]:
    return [
        Contribution(source, weight, allowed(name, found), START.scales) for source, (weight, found) in SOURCES.items()
    ]


def arrays(result: Aggregated) -> dict[str, bytes]:
    named = {"": {**result.tensors, **result.carry}, **result.personal}
    return {f"{source}/{name}": array.tobytes() for source, t in named.items() for name, array in t.items()}


# ---------------------------------------------------------------- aggregation


@pytest.mark.parametrize("name", NAMES["aggregation"])
class TestAggregation:
    def test_same_input_same_bits(self, name: str) -> None:
        results = [arrays(strategy(name).aggregate(sources(name), START)) for _ in range(2)]
        assert results[0] == results[1]

    def test_the_order_of_the_replies_changes_no_bit(self, name: str) -> None:
        orders = [list(order) for order in islice(permutations(sources(name)), 0, None, 97)]
        results = [arrays(strategy(name).aggregate(order, START)) for order in orders]
        assert len(results) > 1
        assert all(result == results[0] for result in results)

    def test_every_contributed_name_comes_back_in_fp32_and_no_other(self, name: str) -> None:
        result = strategy(name).aggregate(sources(name), START)
        assert set(result.tensors) == {n for source in sources(name) for n in source.tensors}
        for n, array in result.tensors.items():
            assert (array.dtype, array.shape) == (np.float32, START.tensors[n].shape)
            assert np.isfinite(array).all()

    def test_carry_factors_are_of_modules_and_fit_them(self, name: str) -> None:
        found, given = strategy(name), sources(name)
        result = found.aggregate(given, START)
        modules = {n.removesuffix(CARRY_A) for n in result.carry if n.endswith(CARRY_A)}
        assert bool(modules) == capabilities(name).carries
        assert set(result.carry) == {module + end for module in modules for end in (CARRY_A, CARRY_B)}
        assert modules <= {Q, V}, "those that several trained"
        for module in modules:
            carry = carry_of(module, result.carry)
            assert carry is not None
            assert (carry.a_MI.shape, carry.b_OM.shape) == ((carry.rank, 6), (5, carry.rank))
            assert {carry.a_MI.dtype, carry.b_OM.dtype} == {np.dtype(np.float32)}

    def test_weights_sum_to_one(self, name: str) -> None:
        """Sources that agree on where they started leave it as it is."""
        same = allowed(name, dict(START.tensors))
        agreed = [Contribution(f"d{n}", weight, same, START.scales) for n, weight in enumerate((3, 17, 1, 1, 9))]
        result = strategy(name).aggregate(agreed, START)
        new = {**START.tensors, **result.tensors}
        for module in (Q, V, K):
            product = new[module + ".lora_B.weight"] @ new[module + ".lora_A.weight"]
            carry = carry_of(module, result.carry)
            product += 0 if carry is None else carry.b_OM @ carry.a_MI / START.scales[module]
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
        own = {n: array for n, array in sources(name)[-1].tensors.items() if n.startswith(K)}
        assert own
        if name not in OPTIMIZERS:
            assert all(np.array_equal(result.tensors[n], array) for n, array in own.items())

    def test_what_it_adds_to_gradients_is_in_fp32_and_hangs_on_no_order(self, name: str) -> None:
        added = []
        for order in (1, -1):
            found, given = strategy(name), [replace(source, lr_sum=0.5) for source in sources(name)][::order]
            found.aggregate(given, START)
            correct = with_capabilities(found).capabilities.correction
            added.append({c.source: dict(correct(c.source, [*c.tensors, "unknown"])) for c in given})
        assert added[0].keys() == added[1].keys()
        for source, of_source in added[0].items():
            assert bool(of_source) == capabilities(name).corrects_sgd
            for n, array in of_source.items():
                assert (array.dtype, array.shape) == (np.float32, START.tensors[n].shape)
                assert not n.startswith(K), "one source: it differs from nobody"
                assert np.array_equal(array, added[1][source][n])

    def test_its_input_is_left_alone(self, name: str) -> None:
        given = sources(name)
        before = [{n: a.copy() for n, a in c.tensors.items()} for c in given]
        strategy(name).aggregate(given, START)
        assert all(np.array_equal(c.tensors[n], old[n]) for c, old in zip(given, before, strict=True) for n in old)

    def test_one_factor_trains_at_least_and_ranks_are_refused_or_taken(self, name: str) -> None:
        settings = [capabilities(name).client_settings(number) for number in range(1, 5)]
        assert all(one.train_a or one.train_b for one in settings)
        given = sources(name)
        cut = {n: a[:, :1] if n.endswith("B.weight") else a[:1] for n, a in given[0].tensors.items() if n != HEAD}
        given[0] = replace(given[0], tensors=cut)
        if capabilities(name).unequal_ranks:
            result = strategy(name).aggregate(given, START)
            assert result.tensors
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

CANDIDATES = [
    Candidate("b", 10, 2.0, 5.0, 3, 9.0, 2.0, 1e6, 3e6, metric=0.5),
    Candidate("a", 200),
    Candidate("c", 1, 0.5, 0.3, 1, 4.0, 1.0, 5e6, 1e6, metric=0.25),
    Candidate("d", 50, 1.0, 1.2, 2, 40.0, 30.0, 2e6, 9e6, metric=0.75, tags=frozenset({"gpu"})),
]
TRIED = [replace(candidate, last_round=1, last_seconds=candidate.last_seconds or 7.0) for candidate in CANDIDATES]
CAPACITY_BPS = 1e7


def state(candidates: Sequence[Candidate], round_: int = 4, wanted: int = 0, least: int = 1) -> RoundState:
    return RoundState(round_, list(candidates), random.Random(f"7/{round_}"), CAPACITY_BPS, wanted, least)


def select(name: str, candidates: Sequence[Candidate], wanted: int = 0) -> tuple[list[str], dict[str, str]]:
    selected = load("selection", name).rule.select(state(candidates, wanted=wanted))
    return list(selected.names), dict(selected.why)


def coins(name: str) -> bool:
    """Whether a selection throws a coin for each device, so that any number may come out, also none."""
    return load("selection", name).capabilities.sampling_rate > 0


def rounds(name: str, pool: Sequence[Candidate], wanted: int, count: int = 30) -> list[list[str]]:
    """Choices over rounds in which devices come, go and get lost, with one instance that may remember."""
    strategy, chosen = load("selection", name).rule, []
    known = {candidate.name: candidate for candidate in pool}
    for number in range(1, count + 1):
        here = [c for c in known.values() if (number + len(c.name) + ord(c.name[-1])) % 5]
        names = list(strategy.select(state(here, number, wanted)).names)
        chosen.append(names)
        lost = names[1:2] if number % 3 == 0 else []
        for n in set(names) - set(lost):
            known[n] = replace(known[n], last_round=number, last_seconds=3.0 + ord(n[-1]) % 7, last_loss=1 / number)
        delivered = [known[n] for n in names if n not in lost]
        with_capabilities(strategy).capabilities.observe(RoundOutcome(number, 3.0 * len(delivered), delivered, lost))
    return chosen


class LooksAtLosses(SelectAll):
    def select(self, state: RoundState) -> Selected:
        return Selected([max(state.by_name(), key=lambda candidate: candidate.last_loss or 0.0).name])


def test_a_selection_that_overrides_one_which_ignores_data_says_nothing_of_itself() -> None:
    assert with_capabilities(SelectAll()).capabilities.ignores_data
    assert not with_capabilities(LooksAtLosses()).capabilities.ignores_data


@pytest.mark.parametrize("rate", [-0.1, 1.5, "0.1", 1])
def test_a_sampling_rate_is_a_probability(rate: object) -> None:
    class Drawn(SelectAll):
        sampling_rate: Any = rate

    with pytest.raises(ConfigError, match=rf"its sampling_rate = {rate!r} must be a probability"):
        with_capabilities(Drawn())


@pytest.mark.parametrize("name", NAMES["selection"])
class TestSelection:
    @pytest.mark.parametrize("pool", [CANDIDATES, TRIED], ids=["new", "tried"])
    @pytest.mark.parametrize("wanted", [0, 1, 2, 9])
    def test_the_same_whatever_the_order(self, name: str, pool: list[Candidate], wanted: int) -> None:
        results = [select(name, order, wanted) for order in permutations(pool)]
        assert all(result == results[0] for result in results)

    @pytest.mark.parametrize("pool", [CANDIDATES, TRIED], ids=["new", "tried"])
    @pytest.mark.parametrize("wanted", [0, 1, 2, 9])
    def test_names_candidates_once_each_and_says_why_of_all(
        self, name: str, pool: list[Candidate], wanted: int
    ) -> None:
        names, why = select(name, pool, wanted)
        assert names == sorted(set(names))
        assert set(names) <= set(why) == {"a", "b", "c", "d"}
        assert all(why.values())
        # "all" says what it does; others may leave places free where a deadline or a tier demands it; coins choose any number
        assert name == "all" or coins(name) or 1 <= len(names) <= (wanted or 4)

    def test_one_device_takes_part(self, name: str) -> None:
        if not coins(name):
            assert select(name, CANDIDATES[:1])[0] == ["b"]
            assert select(name, TRIED[:1], 3)[0] == ["b"]

    def test_no_device(self, name: str) -> None:
        assert select(name, []) == ([], {})

    def test_as_many_as_a_round_needs(self, name: str) -> None:
        for pool in (CANDIDATES, TRIED):
            slow = [replace(candidate, compute_s=1e6) for candidate in pool]  # later than any deadline
            assert coins(name) or len(load("selection", name).rule.select(state(slow, wanted=3, least=3)).names) >= 3

    def test_rounds_with_devices_that_come_and_go_are_the_same_again(self, name: str) -> None:
        pool = [Candidate(f"device-{n}", 10 + n, compute_s=n, payload_bytes=1e6 * n) for n in range(1, 13)]
        chosen = rounds(name, pool, wanted=4)
        assert chosen == rounds(name, pool[::-1], wanted=4)
        assert all(chosen) or (coins(name) and any(chosen))

    def test_ten_thousand_devices(self, name: str) -> None:
        """Select and allocate; below a second each on one idle core, with room here for a busy one."""
        generator = random.Random(1)
        pool = [
            Candidate(
                f"d{n:05}", generator.randrange(500), generator.random(), None, n % 9, generator.random() * 20 if n % 9 else None,
                generator.uniform(0, 20), generator.uniform(1, 40) * 1e6, generator.random() * 1e7, metric=generator.random(),
            )
            for n in range(10_000)
        ]  # fmt: skip
        strategy = load("selection", name, {"lyapunov": {"delay_s": 1000.0}, "fedcs": {"deadline_s": 1000.0}}).rule
        with_capabilities(strategy).capabilities.observe(RoundOutcome(1, 4000.0, pool[:10]))
        began = time.process_time()
        names = strategy.select(replace(state(pool), capacity_bps=1e9)).names
        assert names
        assert time.process_time() - began < 3


def test_all_selects_all_in_the_order_of_their_names() -> None:
    assert select("all", CANDIDATES)[0] == ["a", "b", "c", "d"]


# ---------------------------------------------------------------- bandwidth

DEMANDS = [Demand("b", 1e6, 2.0), Demand("a", 0.0, 0.0), Demand("c", 5e9, 0.1)]
SLOW_LINK = [Demand("b", 1e6, 2.0, limit_bps=1e3), Demand("a", 2e6, 0.0), Demand("c", 5e6, 0.1)]
WIRELESS = [Demand("b", 1e6, 2.0, snr=3.0), Demand("a", 2e6, 0.0, snr=0.1), Demand("c", 5e6, 0.1, snr=1e4)]
IDLE = [Demand(name, 0.0, 1.0) for name in "bac"]


@pytest.mark.parametrize("name", NAMES["bandwidth"])
@pytest.mark.parametrize("demands", [DEMANDS, SLOW_LINK, WIRELESS, IDLE], ids=["wired", "limit", "wireless", "idle"])
class TestBandwidth:
    def test_the_same_whatever_the_order(self, name: str, demands: list[Demand]) -> None:
        results = [dict(load("bandwidth", name).rule.allocate(list(order), 1e8)) for order in permutations(demands)]
        assert all(result == results[0] for result in results)

    @pytest.mark.parametrize("capacity_bps", [0.0, 1e3, 1e8])
    @pytest.mark.parametrize("devices", [1, 2, 3])
    def test_shares_sum_to_one(self, name: str, demands: list[Demand], devices: int, capacity_bps: float) -> None:
        shares = load("bandwidth", name).rule.allocate(demands[:devices], capacity_bps)
        assert set(shares) == {demand.name for demand in demands[:devices]}
        assert sum(shares.values()) == pytest.approx(1)
        assert all(0 <= share <= 1 for share in shares.values())


@pytest.mark.parametrize("name", NAMES["bandwidth"])
class TestBandwidthSizes:
    def test_no_device_no_shares(self, name: str) -> None:
        assert dict(load("bandwidth", name).rule.allocate([], 1e8)) == {}

    def test_ten_thousand_devices(self, name: str) -> None:
        generator = random.Random(1)
        demands = [Demand(f"d{n}", generator.uniform(1, 40), generator.uniform(0, 20)) for n in range(10_000)]
        began = time.process_time()
        shares = load("bandwidth", name).rule.allocate(demands, 1e4)
        assert sum(shares.values()) == pytest.approx(1)
        assert time.process_time() - began < 3


# ---------------------------------------------------------------- by name


class NoStrategy:
    """Has the method of a strategy, but is none."""

    def __init__(self) -> None:
        raise AssertionError("a class that declares no strategy was called")

    def aggregate(self, contributions: Sequence[Contribution], start: Start) -> Aggregated: ...


class NoMethodOfItsOwn(Aggregation):
    pass


class WithOptions(Aggregation):
    def __init__(
        self, *, alpha: Annotated[float, Field(gt=0)] = 1.0, order: Literal["up", "down"] = "up", n: int = 0
    ) -> None:
        if n > alpha:
            raise ValueError(f"n = {n} must be at most alpha = {alpha}")
        self.given = (alpha, order, n)

    def aggregate(self, contributions: Sequence[Contribution], start: Start) -> Aggregated: ...


A_FUNCTION = len


class WantsArguments(Aggregation):
    def __init__(self, alpha: float) -> None: ...
    def aggregate(self, contributions: Sequence[Contribution], start: Start) -> Aggregated: ...


class Mine(Aggregation):
    def aggregate(self, contributions: Sequence[Contribution], start: Start) -> Aggregated:
        return Aggregated({})


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("aggregation", "fedavgg", "is not known; did you mean 'fedavg'?; your own is named package.module:Class"),
        ("aggregation", "xyz", "is not known; known: fedadagrad, fedadam, "),
        ("selection", "al", "is not known; did you mean 'all'?"),
        ("bandwidth", "unifrom", "did you mean 'uniform'?"),
        ("aggregation", "tests.no_such_module:Class", "cannot be loaded: No module named 'tests.no_such_module'"),
        (
            "aggregation",
            "no_such_package:Class",
            "is not imported: on this machine strategies may come from the built-in",
        ),
        ("aggregation", "tests.contract.test_strategies:Absent", "cannot be loaded: module"),
        ("aggregation", "tests.contract.test_strategies:", "cannot be loaded"),
        ("aggregation", ":Class", "is not imported"),
        ("aggregation", ".relative:Class", "is not imported"),
        ("aggregation", "tests.contract.test_strategies:WantsArguments", "cannot be loaded"),
        (
            "aggregation",
            "tests.contract.test_strategies:A_FUNCTION",
            "cannot be loaded: it is a builtin_function_or_method",
        ),
        ("aggregation", f"{__name__}:NoStrategy", "must inherit from strategies.api.Aggregation and have a method"),
        ("aggregation", f"{__name__}:NoMethodOfItsOwn", "is not a strategy for aggregation: its class must inherit"),
        ("selection", f"{__name__}:Mine", "must inherit from strategies.api.Selection and have a method select()"),
        ("bandwidth", "strategies.selection.all:SelectAll", "must inherit from strategies.api.Bandwidth"),
    ],
)
def test_a_name_that_cannot_be_used_says_why(kind: str, name: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(kind, name)
    assert str(caught.value).startswith(f"strategy.{kind} = {name!r} ")
    assert words in str(caught.value)


def test_ones_own_class_is_loaded_by_its_path() -> None:
    assert type(strategy(f"{__name__}:Mine")).__name__ == "Mine"


@pytest.mark.parametrize("kind", BUILT_IN)
def test_a_built_in_is_one_file_and_one_line(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUILT_IN[kind], "mine", f"written_{kind}:Mine")
    assert type(load(kind, "mine").rule).__module__ == f"written_{kind}"
    assert (
        options_error(kind, "mine", {"mine": {"n": 1}}) == "unknown option strategy.options.mine.n: it has no options"
    )
    with pytest.raises(ConfigError, match="did you mean 'mine'"):
        load(kind, "minne")


# ---------------------------------------------------------------- capabilities


def test_a_strategy_need_say_nothing_beyond_its_method() -> None:
    for kind in BUILT_IN:
        assert load(kind, f"written_{kind}:Mine").capabilities == Capabilities()
    assert Capabilities().client_settings(1) == ClientSettings()
    assert dict(Capabilities().correction("d1", [A])) == {}


def test_capabilities_are_what_the_class_and_its_options_say() -> None:
    assert capabilities("ffa").client_settings(1) == ClientSettings(train_a=False)
    assert capabilities("fedsa").personal
    assert capabilities("flora").carries
    assert capabilities("flora").restarts_factors
    assert load("aggregation", "krum", {"krum": {"malicious": 2}}).capabilities.least_sources == 2 * 2 + 3
    assert load("aggregation", "fedex", {"fedex": {"residual": "svd:7"}}).capabilities.most_carry_rank == 7
    oort = load("selection", "oort")
    oort.capabilities.observe(RoundOutcome(1, 1.0, CANDIDATES[:1]))
    assert oort.rule._rounds == {"b": 1}


class MisspeltType(Mine):
    personal = "yes"  # type: ignore[assignment]


class NegativeSources(Mine):
    least_sources = -1


class NoMethod(Mine):
    client_settings = ClientSettings()  # type: ignore[assignment]


class CorrectsWithNothing(Mine):
    corrects_sgd = True


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("MisspeltType", "its personal = 'yes' must be True or False"),
        ("NegativeSources", "its least_sources = -1 must be a number of 0 or more"),
        ("NoMethod", "its client_settings = ClientSettings(train_a=True, train_b=True, prox_mu=0.0) must be a method"),
        ("CorrectsWithNothing", "corrects_sgd = True needs a method correction(source, names)"),
    ],
)
def test_a_capability_that_cannot_be_used(name: str, problem: str) -> None:
    path = f"{__name__}:{name}"
    with pytest.raises(ConfigError) as caught:
        load("aggregation", path)
    assert str(caught.value) == f"strategy.aggregation = {path!r} cannot be loaded: {problem}"


def test_only_the_registry_asks_a_strategy_for_what_it_can_do() -> None:
    names, root = {field.name for field in fields(Capabilities)}, Path(__file__).parents[2]
    folders = ("edgelam_fl", "server", "strategies", "benchmarks")
    files = [file for folder in folders for file in root.glob(f"{folder}/**/*.py")]
    assert {file.relative_to(root).parts[0] for file in files} == set(folders)
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("getattr", "hasattr")
            ):
                asked = node.args[1]
                assert not (isinstance(asked, ast.Constant) and asked.value in names), f"{file}, line {node.lineno}"


# ---------------------------------------------------------------- memory


def through_a_checkpoint(memory: Any) -> Any:
    """Returns what a checkpoint makes of a strategy's state."""
    plain, found = flatten(memory, "the state")
    return unflatten(json.loads(json.dumps(plain)), found.__getitem__)


def aggregate_rounds(
    name: str, loaded: LoadedStrategy, start: Start, numbers: Iterable[int]
) -> tuple[Start, list[Any]]:
    """Plays rounds in which sources train what the rule lets them; returns the next start, and all that the rule said."""
    said: list[Any] = []
    for number in numbers:
        settings = loaded.capabilities.client_settings(number)
        frozen = [end for end, on in zip(SHAPES, (settings.train_a, settings.train_b), strict=True) if not on]
        given = []
        for index, (source, (weight, held)) in enumerate(sorted(SOURCES.items())):
            generator = np.random.default_rng([number, index])
            trained = {
                n: start.tensors[n] + generator.normal(size=array.shape).astype(np.float32)
                for n, array in held.items()
                if not n.endswith(tuple(frozen))
            }
            given.append(Contribution(source, weight, trained, start.scales, lr_sum=0.5))
            said.append({n: a.tobytes() for n, a in loaded.capabilities.correction(source, held).items()})
        result = loaded.rule.aggregate(given, replace(start, round=number))
        said.append(arrays(result))
        start = replace(start, tensors={**start.tensors, **result.tensors, **result.carry})
    return start, said


def select_rounds(loaded: LoadedStrategy, numbers: Iterable[int]) -> list[Any]:
    """Plays rounds with devices whose losses, times and metrics change; returns all choices."""
    said: list[Any] = []
    last = dict.fromkeys((f"device-{n}" for n in range(12)), 0)
    for number in numbers:
        draw = random.Random(number)
        pool = [
            Candidate(
                name, examples=10 + len(name), last_loss=draw.random(), squared_loss=draw.random(), last_round=(number + n) % 3,
                last_seconds=draw.uniform(1, 90), compute_s=draw.random(), payload_bytes=1e6 * (1 + n), metric=draw.random(),
            )
            for n, name in enumerate(last)
        ]  # fmt: skip
        chosen = loaded.rule.select(state(pool, number, wanted=4))
        said.append((list(chosen.names), dict(chosen.why)))
        delivered = [candidate for candidate in pool if candidate.name in chosen.names]
        loaded.capabilities.observe(RoundOutcome(number, draw.uniform(10, 90), delivered))
    return said


@pytest.mark.parametrize("name", NAMES["aggregation"])
def test_an_aggregation_goes_on_from_its_state_to_the_last_bit(name: str) -> None:
    first, second = (load("aggregation", name) for _ in range(2))
    start, _ = aggregate_rounds(name, first, START, range(1, 3))
    second.capabilities.restore(through_a_checkpoint(first.capabilities.state()))
    of_both = [aggregate_rounds(name, one, start, range(3, 5))[1] for one in (first, second)]
    assert of_both[0] == of_both[1]


@pytest.mark.parametrize("name", NAMES["selection"])
def test_a_selection_goes_on_from_its_state(name: str) -> None:
    first, second = (load("selection", name) for _ in range(2))
    select_rounds(first, range(1, 8))
    second.capabilities.restore(through_a_checkpoint(first.capabilities.state()))
    assert select_rounds(second, range(8, 14)) == select_rounds(first, range(8, 14))


def test_oort_goes_on_with_the_rounds_that_its_pacer_looks_at() -> None:
    first, second = (load("selection", "oort", {"oort": {"pacer_rounds": 4}}) for _ in range(2))
    select_rounds(first, range(1, 12))
    second.capabilities.restore(through_a_checkpoint(first.capabilities.state()))
    assert select_rounds(second, range(12, 22)) == select_rounds(first, range(12, 22))
    assert first.capabilities.state() == second.capabilities.state()


def test_memory_matters() -> None:
    """The rounds of the tests above are such that a strategy which forgets goes on in another way."""
    for name in ("fedadam", "fedyogi", "fedadagrad", "fedavgm", "scaffold"):
        whole, other = (load("aggregation", name) for _ in range(2))
        start, _ = aggregate_rounds(name, whole, START, range(1, 3))
        of_both = [aggregate_rounds(name, one, start, range(3, 5))[1] for one in (whole, other)]
        assert of_both[0] != of_both[1], name
    for name in ("oort", "tifl", "lyapunov"):
        whole, other = (load("selection", name, {"tifl": {"credits": 1}}) for _ in range(2))
        select_rounds(whole, range(1, 8))
        assert select_rounds(whole, range(8, 14)) != select_rounds(other, range(8, 14)), name


@pytest.mark.parametrize("name", NAMES["bandwidth"])
def test_a_bandwidth_goes_on_from_its_state(name: str) -> None:
    first, second = (load("bandwidth", name) for _ in range(2))
    for number in range(1, 4):
        first.rule.allocate(DEMANDS, CAPACITY_BPS)
        first.capabilities.observe(RoundOutcome(number, 30.0, []))
    second.capabilities.restore(through_a_checkpoint(first.capabilities.state()))
    assert second.rule.allocate(DEMANDS, CAPACITY_BPS) == first.rule.allocate(DEMANDS, CAPACITY_BPS)


# ---------------------------------------------------------------- options


OWN = f"{__name__}:WithOptions"


def options_error(kind: str, name: str, options: dict[str, dict[str, object]]) -> str:
    with pytest.raises(ConfigError) as caught:
        load_all({kind: name}, options)
    return str(caught.value)


def test_options_reach_the_class_of_their_name() -> None:
    assert load("selection", "lyapunov", {"lyapunov": {"delay_s": 12, "v": 0.5}}).rule.delay_s == 12.0
    assert load("aggregation", OWN, {"WithOptions": {"order": "down", "alpha": 3}}).rule.given == (3.0, "down", 0)
    assert load("selection", "lyapunov", {"oort": {"alpha": 3.0}}).rule.delay_s == 30.0, "another's"


def test_two_kinds_that_share_a_name_take_their_own_options() -> None:
    options = {"lyapunov": {"delay_s": 12.0}}
    loaded = load_all({"selection": "lyapunov", "bandwidth": "lyapunov"}, options)
    assert loaded["selection"].rule.delay_s == 12.0
    assert options_error("bandwidth", "lyapunov", {"lyapunov": {"dealy_s": 1.0}}) == (
        "unknown option strategy.options.lyapunov.dealy_s: it has no options"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lyapunov": {"dely_s": 1}}, "unknown option strategy.options.lyapunov.dely_s: did you mean 'delay_s'?"),
        ({"lyapunov": {"q": 1}}, "unknown option strategy.options.lyapunov.q: known: delay_s, v"),
        ({"lyapunov": {"v": -1.0}}, "strategy.options.lyapunov.v = -1.0 must be greater than or equal to 0"),
        ({"lyapunov": {"delay_s": 0}}, "strategy.options.lyapunov.delay_s = 0 must be greater than 0"),
        ({"lyapunov": {"v": "big"}}, "strategy.options.lyapunov.v = 'big' must be a valid number"),
        ({"lyapunov": {"v": float("inf")}}, "strategy.options.lyapunov.v = inf must be a finite number"),
        ({"oort": {"alpha": True}}, "strategy.options.oort.alpha = True must be a valid number"),
        ({"tifl": {"tiers": 2.5}}, "strategy.options.tifl.tiers = 2.5 must be a valid integer"),
        ({"all": {"n": 1}}, "unknown option strategy.options.all.n: it has no options"),
        ({"ort": {}}, "strategy.options.ort belongs to no strategy: did you mean 'oort'?"),
    ],
)
def test_options_that_cannot_be_used(options: dict[str, dict[str, object]], message: str) -> None:
    """Also of strategies that are not in use."""
    assert options_error("selection", "lyapunov", options).startswith(message)
    assert options_error("selection", "all", options).startswith(message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, "strategy.options.WithOptions.alpha = 0.0 must be greater than 0"),
        ({"order": "left"}, "strategy.options.WithOptions.order = 'left' must be 'up' or 'down'"),
        ({"n": 2}, "strategy.options.WithOptions: n = 2 must be at most alpha = 1.0"),
        ({"alhpa": 2}, "unknown option strategy.options.WithOptions.alhpa: did you mean 'alpha'?"),
    ],
)
def test_ones_own_options_are_checked_too(options: dict[str, object], message: str) -> None:
    assert options_error("aggregation", OWN, {"WithOptions": options}) == message


def test_the_examples_do_what_they_say() -> None:
    given = sources(EXAMPLES["aggregation"])
    mean = strategy(EXAMPLES["aggregation"]).aggregate(given, START).tensors[A]
    np.testing.assert_allclose(mean, np.mean([c.tensors[A] for c in given if A in c.tensors], axis=0), atol=1e-6)
    assert select(EXAMPLES["selection"], CANDIDATES, 2)[0] == ["a", "d"], "those with 200 and 50 examples"
    demands = [Demand("a", 1e6, 0.0), Demand("b", 9e6, 0.0)]
    shares = load("bandwidth", EXAMPLES["bandwidth"]).rule.allocate(demands, 1e8)
    assert shares == pytest.approx({"a": 1 / (1 + 3), "b": 3 / (1 + 3)})


@pytest.mark.parametrize("kind", BUILT_IN)
def test_every_built_in_is_made_without_options(kind: str) -> None:
    for name in BUILT_IN[kind]:
        load(kind, name)


# ---------------------------------------------------------------- what is imported


@pytest.mark.parametrize(
    "name",
    [
        "subprocess:Popen", "os:system", "builtins:eval", "posix:system", "selectors:DefaultSelector", "code:interact",
        "edgelam_fl.federation.child:Child", "server.app:main", "strategies.mine:Mine", "__main__:Mine", "..x:Mine",
        "a/../b:Mine", "antigravity:x",
    ],
)  # fmt: skip
def test_s4_a_run_file_imports_and_calls_nothing_that_is_not_allowed(name: str, tmp_path: Path) -> None:
    """The options are those of the attack: a shell command that leaves a file."""
    mark = tmp_path / "MARK"
    options = {name.rpartition(":")[2]: {"args": f"id > {mark}", "shell": True}}
    before = set(sys.modules)
    for bounds in (Bounds(), Bounds(packages=("my_pkg",)), Bounds(folder=tmp_path)):
        with pytest.raises(ConfigError, match="is not imported: on this machine strategies may come from the built-in"):
            registry.load_all({"selection": name}, options, bounds)
    assert set(sys.modules) == before
    assert not mark.exists()


def test_s4_a_class_of_an_allowed_module_is_not_called_before_it_declares_a_strategy() -> None:
    with pytest.raises(ConfigError, match=r"must inherit from strategies\.api"):
        load("aggregation", f"{__name__}:NoStrategy")


def test_s4_a_run_for_another_machine_imports_nothing_here() -> None:
    """As `edgelam run --server`: the server's operator decides, and what is built in is checked here all the same."""
    names = {"selection": "subprocess:Popen", "bandwidth": "uniform"}
    loaded = registry.load_all(names, {"Popen": {"args": "id"}}, elsewhere=True)
    assert list(loaded) == ["bandwidth"]
    with pytest.raises(ConfigError, match="belongs to no strategy"):
        registry.load_all(names, {"Other": {"args": "id"}}, elsewhere=True)


IN_A_FOLDER = """
from strategies.api import Selection
class Mine(Selection):
    def __init__(self, *, d: int = 1): self.d = d
    def select(self, state): return None
"""


LOADS = [
    ("Bounds(folder=Path.cwd())", "my_pkg.mod:Mine", "3"),
    ("Bounds(packages=('my_pkg',))", "my_pkg.mod:Mine", "3"),
    ("Bounds(packages=('my_pkg.mod',))", "my_pkg.mod:Mine", "3"),
    ("bounds_of(Bounds(folder=Path.cwd(), packages=('x',)).environment())", "my_pkg.mod:Mine", "3"),
    ("Bounds(packages=('my_pk',))", "my_pkg.mod:Mine", "refused"),
    ("Bounds(packages=('my_pkg.mo',))", "my_pkg.mod:Mine", "refused"),
    ("Bounds(folder=Path.cwd() / 'my_pkg')", "my_pkg.mod:Mine", "refused"),
    ("bounds_of({})", "my_pkg.mod:Mine", "refused"),
    ("Bounds(folder=Path.cwd())", "json:Mine", "refused"),  # an installed module of the same name comes first
    ("Bounds(folder=Path.cwd())", "time:Mine", "refused"),  # one that is built into Python, without a file
]
# Forks for each load: its imports must change neither this process's nor those of the next load.
LOADER = """
import os, sys
sys.path = [ROOT] + [entry for entry in sys.path if entry]
from pathlib import Path
from edgelam_fl.bounds import Bounds, bounds_of
from edgelam_fl.errors import ConfigError
from strategies.registry import load
for bounds, name in LOADS:
    if os.fork() == 0:
        try:
            print(load("selection", name, {"Mine": {"d": 3}}, eval(bounds)).rule.d, flush=True)
        except ConfigError as error:
            assert "is not imported" in str(error), error
            print("refused", flush=True)
        break
    assert os.wait()[1] == 0
"""


@pytest.fixture(scope="module")
def loaded_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Loads strategies in a folder with modules, each load in a process of its own; returns what came of each."""
    folder = tmp_path_factory.mktemp("loads")
    (folder / "my_pkg").mkdir()
    for file in ("my_pkg/mod.py", "json.py"):
        (folder / file).write_text(IN_A_FOLDER)
    root, given = str(Path(__file__).parents[2]), [(bounds, name) for bounds, name, _ in LOADS]
    code = LOADER.replace("ROOT", repr(root)).replace("LOADS", repr(given))
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("number", range(len(LOADS)), ids=[f"{name} in {bounds}" for bounds, name, _ in LOADS])
def test_s4_only_allowed_modules_are_found(loaded_elsewhere: list[str], number: int) -> None:
    assert len(loaded_elsewhere) == len(LOADS)
    assert loaded_elsewhere[number] == LOADS[number][2]
