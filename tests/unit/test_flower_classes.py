"""Classes of Flower's kind as aggregations, by their path: Flower's own numbers, memory, and what is refused by name."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower

from edgelam_fl.bounds import Bounds
from edgelam_fl.errors import ConfigError, TooFewSources
from edgelam_fl.plan.making import ClientSettings
from server.checkpoint import flatten, unflatten
from strategies.api import Contribution, Start
from strategies.registry import LoadedStrategy, load

FLOWERS = "flwr.serverapp.strategy"
SHAPES = {
    "q.lora_A.weight": (4, 20),
    "q.lora_B.weight": (24, 4),
    "v.lora_A.weight": (4, 20),
    "v.lora_B.weight": (24, 4),
}


OWN = Bounds(packages=(__name__.partition(".")[0],))


@pytest.fixture(autouse=True)
def no_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps Flower's strategies from collecting garbage dozens of times, each of which takes a second late in a run of all tests."""
    monkeypatch.setattr(gc, "collect", lambda *_: 0)


class HalfWay(flower.FedAvg):
    """One of a user's own: half of the way to the mean, and it counts its rounds in memory."""

    def __init__(self, *, share: float = 0.5) -> None:
        super().__init__()
        self.share, self.rounds = share, 0

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        self.rounds += 1
        arrays, metrics = super().aggregate_train(server_round, replies)
        halved = {name: Array(self.share * array.numpy()) for name, array in arrays.items()}
        return ArrayRecord(halved), metrics


class Reply:
    def __init__(self, contribution: Contribution) -> None:
        arrays = ArrayRecord({name: Array(array) for name, array in contribution.tensors.items()})
        weight = MetricRecord({"num-examples": contribution.weight})
        self.content = RecordDict({"arrays": arrays, "metrics": weight})

    def has_error(self) -> bool:
        return False


def tensors(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def rounds(number: int = 3, sources: int = 7) -> Iterator[list[Contribution]]:
    rng = np.random.default_rng(5)
    for _ in range(number):
        yield [Contribution(f"d{n}", 5 * n + 3, tensors(rng)) for n in range(sources)]


def start(number: int = 0) -> Start:
    return Start(tensors(np.random.default_rng(9)), round=number)


def after(loaded: LoadedStrategy, given: Sequence[Sequence[Contribution]], begin: Start) -> list[Start]:
    """Returns what each round ends with, the next round's start."""
    found = []
    for contributions in given:
        begin = Start(loaded.rule.aggregate(contributions, begin).tensors, round=begin.round + 1)
        found.append(begin)
    return found


# ---------------------------------------------------------------- Flower's own numbers

CLASSES: list[tuple[str, dict[str, Any]]] = [
    ("FedAvg", {}),
    ("FedAdam", {}),
    ("FedYogi", {"eta": 0.3, "beta_2": 0.5}),
    ("FedAdagrad", {"tau": 0.2}),
    ("FedAvgM", {"server_learning_rate": 0.5, "server_momentum": 0.8}),
    ("FedMedian", {}),
    ("FedTrimmedAvg", {"beta": 0.3}),
    ("Krum", {"num_malicious_nodes": 1}),
    ("MultiKrum", {"num_malicious_nodes": 1, "num_nodes_to_select": 2}),
    ("Bulyan", {"num_malicious_nodes": 1}),
    ("FedProx", {"proximal_mu": 0.1}),
]


@pytest.mark.parametrize(("name", "options"), CLASSES, ids=[name for name, _ in CLASSES])
def test_a_class_of_flowers_is_used_by_its_path_with_flowers_options(name: str, options: dict[str, Any]) -> None:
    loaded, theirs = load("aggregation", f"{FLOWERS}:{name}", {name: options}), getattr(flower, name)(**options)
    begin = start()
    for number, given in enumerate(rounds(), 1):
        arrays = ArrayRecord({name: Array(array) for name, array in begin.tensors.items()})
        theirs.current_arrays = arrays if isinstance(theirs, flower.FedAvgM) else dict(begin.tensors)
        expected, _ = theirs.aggregate_train(number, [Reply(one) for one in given])
        (begin,) = after(loaded, [given], begin)
        assert begin.tensors.keys() == SHAPES.keys()
        for tensor, array in expected.items():
            np.testing.assert_allclose(begin.tensors[tensor], array.numpy(), atol=2e-6, rtol=2e-5)
            assert begin.tensors[tensor].dtype == np.float32


def test_the_list_above_is_all_of_flowers_that_is_not_refused() -> None:
    refused = set()
    for name in set(flower.__all__) - {"Strategy", "Result"} - {name for name, _ in CLASSES}:
        with pytest.raises(ConfigError, match=f"{name} cannot aggregate adapters: "):
            load("aggregation", f"{FLOWERS}:{name}", {name: needed(name)})
        refused.add(name)
    assert {"QFedAvg", "FedXgbBagging", "FedXgbCyclic"} < refused


def needed(name: str) -> dict[str, Any]:
    return {"client_learning_rate": 0.1} if name == "QFedAvg" else {}


def test_fedprox_pulls_devices_as_the_built_in_one_does() -> None:
    loaded = load("aggregation", f"{FLOWERS}:FedProx", {"FedProx": {"proximal_mu": 0.25}})
    assert loaded.capabilities.client_settings(1) == ClientSettings(prox_mu=0.25)
    assert load("aggregation", f"{FLOWERS}:FedAvg").capabilities.client_settings(1) == ClientSettings()


def test_a_class_of_ones_own_that_inherits_from_flowers_is_one_too() -> None:
    loaded = load("aggregation", f"{__name__}:HalfWay", {"HalfWay": {"share": 0.25}}, OWN)
    (given,) = rounds(1)
    (got,) = after(loaded, [given], start())
    (whole,) = after(load("aggregation", "fedavg"), [given], start())
    for name, array in whole.tensors.items():
        np.testing.assert_allclose(got.tensors[name], 0.25 * array, atol=1e-6)
    assert loaded.capabilities.state()["\n".join(sorted(SHAPES))]["memory"] == {"rounds": 1}


# ---------------------------------------------------------------- memory, and few sources


@pytest.mark.parametrize("name", ["FedAdam", "FedYogi", "FedAdagrad", "FedAvgM"])
def test_it_goes_on_from_its_state(name: str) -> None:
    options = {"FedAvgM": {"server_momentum": 0.9}}
    whole, other = (load("aggregation", f"{FLOWERS}:{name}", options if name in options else {}) for _ in range(2))
    first, second, third = rounds()
    *_, middle = after(whole, [first, second], start())
    plain, found = flatten(whole.capabilities.state(), "the state")
    other.capabilities.restore(unflatten(json.loads(json.dumps(plain)), found.__getitem__))
    (expected,), (got,) = after(whole, [third], middle), after(other, [third], middle)
    assert all(np.array_equal(got.tensors[name], expected.tensors[name]) for name in SHAPES)


def test_a_tensor_that_nobody_trained_keeps_its_memory() -> None:
    rule, whole = (load("aggregation", f"{FLOWERS}:FedAdam") for _ in range(2))
    first, second, third = rounds()
    without = [
        Contribution(c.source, c.weight, {name: c.tensors[name] for name in SHAPES if name.startswith("q")})
        for c in second
    ]
    for given in (first, without, third):
        got = rule.rule.aggregate(given, start()).tensors
    for given in (first, third):
        expected = whole.rule.aggregate(given, start()).tensors
    assert np.array_equal(got["v.lora_B.weight"], expected["v.lora_B.weight"])
    assert not np.array_equal(got["q.lora_B.weight"], expected["q.lora_B.weight"])


def test_a_robust_class_says_how_many_sources_it_needs_and_keeps_what_one_trained() -> None:
    loaded = load("aggregation", f"{FLOWERS}:Bulyan", {"Bulyan": {"num_malicious_nodes": 1}})
    assert loaded.capabilities.least_sources == 7
    (given,) = rounds(1)
    with pytest.raises(TooFewSources, match=r"\(Bulyan\) needs at least 7 sources, and q\.lora_A\.weight has 6"):
        loaded.rule.aggregate(given[:6], start())
    alone = loaded.rule.aggregate(given[:1], start()).tensors
    assert all(np.array_equal(alone[name], given[0].tensors[name]) for name in SHAPES)


# ---------------------------------------------------------------- what cannot be used


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        (f"{FLOWERS}:FedAdamm", {}, "cannot be loaded: Flower has no strategy 'FedAdamm'; did you mean 'FedAdam'?"),
        (f"{FLOWERS}.FedAdam", {}, f"is not known; did you mean '{FLOWERS}:FedAdam'?"),
        ("flwr.serverapp.app:ServerApp", {}, "is not imported"),
        (f"{FLOWERS}:FedAdam", {"etaa": 1}, "unknown option strategy.options.FedAdam.etaa: did you mean 'eta'?"),
        (f"{FLOWERS}:FedAdam", {"eta": "x"}, "strategy.options.FedAdam.eta = 'x' must be a valid number"),
        (f"{FLOWERS}:FedAdam", {"min_train_nodes": 3}, "min_train_nodes has no effect here: federation.min_nodes says"),
        (f"{FLOWERS}:FedAdam", {"eta_l": 0.1}, "eta_l has no effect here: optimizer.lr is"),
        (f"{FLOWERS}:Strategy", {}, "cannot be loaded: "),
    ],
)  # fmt: skip
def test_a_mistake_is_named(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load("aggregation", name, {name.rpartition(":")[2]: options})
    assert says in str(raised.value)


def test_ones_own_class_needs_the_operators_word() -> None:
    with pytest.raises(ConfigError, match="is not imported"):
        load("aggregation", f"{__name__}:HalfWay")
