"""SCAFFOLD's two halves together, the aggregation and a trainee, against the paper's rule in numpy; what nodes refuse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from edgelam_fl.errors import ProtocolError, Refused
from edgelam_fl.model import adapter as adapters
from edgelam_fl.split.corrections import read_corrections
from edgelam_fl.wire import edgelam_pb2 as pb
from strategies.aggregation.fedavg import FedAvg
from strategies.aggregation.scaffold import Scaffold
from strategies.api import Aggregation, Contribution, Start
from tests.unit.test_trainee import NAMES, START, trainee

CURVES = {"a": np.array([1.0, 0.2]), "b": np.array([0.3, 2.0]), "c": np.array([0.5, 0.5])}
CENTRES = {"a": np.array([3.0, -1.0]), "b": np.array([-2.0, 4.0]), "c": np.array([0.0, 9.0])}
ALIKE = dict.fromkeys(CURVES, 7.0)
LRS = (0.2, 0.1, 0.05)  # a schedule: K eta_l is their sum


def gradient(device: str, w: Any) -> Any:
    """Of the loss 1/2 sum curve (w - centre)^2."""
    return CURVES[device] * (w - CENTRES[device])


def contribution(
    rule: Scaffold, device: str, x: Mapping[str, np.ndarray], weight: float, lrs: Sequence[float]
) -> Contribution:
    """A device's round, by what trains on every node."""
    lora = pb.Lora(train_front=True, train_hosts=True, train_back=True)
    plan = pb.Plan(lora=lora, optimizer=pb.Optimizer(name="sgd", lrs=lrs, keep="exact", clip="none"))
    found = trainee()
    found.start(x, lambda layer: True, plan, correction=rule.correction(device, NAMES))
    for step in range(len(lrs)):
        w = [p.detach().double().numpy() for p in found.parameters]
        found.set_gradients([torch.from_numpy(gradient(device, each).astype(np.float32)) for each in w])
        found.step(step)
    return Contribution(device, weight, found.finish(plan), lr_sum=found.lr_sum)


def rounds(
    rule: Scaffold, chosen: Sequence[str], weights: Mapping[str, float] = ALIKE, lrs: Sequence[float] = LRS
) -> dict[str, np.ndarray]:
    """The global adapter after rounds of the `chosen` devices."""
    x = dict(START)
    for devices in chosen:
        given = [contribution(rule, device, x, weights[device], lrs) for device in devices]
        x = dict(rule.aggregate(given, Start(x)).tensors)
    return x


def papers(chosen: Sequence[str], eta_g: float = 1.0, known: str = "") -> np.ndarray:
    """Algorithm 1, option II. `known`: the N devices, where not all are in the first round."""
    x, c, own = START[NAMES[0]].astype(float), np.zeros(2), {d: np.zeros(2) for d in known or chosen[0]}
    for devices in chosen:
        ys = dict.fromkeys(devices, x)
        for lr in LRS:
            ys = {d: y - lr * (gradient(d, y) - own[d] + c) for d, y in ys.items()}
        new = {d: own[d] - c + (x - y) / sum(LRS) for d, y in ys.items()}
        x = x + eta_g * np.mean([y - x for y in ys.values()], axis=0)
        c = c + len(devices) / len(own) * np.mean([new[d] - own[d] for d in devices], axis=0)
        own |= new
    return x


@pytest.mark.parametrize("chosen", [("ab", "ab"), ("ab", "ab", "b", "a", "ab"), ("abc", "ac", "b", "abc")])
@pytest.mark.parametrize("eta_g", [1.0, 0.5])
def test_it_is_the_papers_rule(chosen: Sequence[str], eta_g: float) -> None:
    got = rounds(Scaffold(eta_g=eta_g), chosen)
    expected = papers(chosen, eta_g)
    for name in NAMES:
        np.testing.assert_allclose(got[name], expected, rtol=0, atol=1e-6)


def test_the_first_round_is_fedavgs_to_the_bit() -> None:
    given = [contribution(Scaffold(), device, START, weight, LRS) for device, weight in (("a", 3), ("b", 17))]
    results = [rule.aggregate(given, Start(START)).tensors for rule in as_rules(Scaffold(), FedAvg())]
    assert all(np.array_equal(results[0][name], results[1][name]) for name in NAMES)
    assert not Scaffold().correction("a", NAMES)


def as_rules(*rules: Aggregation) -> Sequence[Aggregation]:
    return rules


def test_unlike_weights_end_where_the_weighted_loss_is_least() -> None:
    """FedAvg of several local steps ends elsewhere: it has a bias that no round takes away."""
    weights, long = {"a": 3.0, "b": 17.0}, (0.2,) * 5
    total = sum(weights[d] * CURVES[d] for d in weights)
    least = sum(weights[d] * CURVES[d] * CENTRES[d] for d in weights) / total
    got = rounds(Scaffold(), ["ab"] * 60, weights, long)
    np.testing.assert_allclose(got[NAMES[0]], least, atol=1e-4)
    uncorrected = dict(START)
    for _ in range(60):
        given = [contribution(Scaffold(), device, uncorrected, weights[device], long) for device in "ab"]
        uncorrected = dict(FedAvg().aggregate(given, Start(uncorrected)).tensors)
    assert np.abs(uncorrected[NAMES[0]] - least).max() > 0.1


def test_corrections_cancel_and_a_source_alone_has_none() -> None:
    rule, weights = Scaffold(), {"a": 3.0, "b": 17.0}
    rounds(rule, ["ab"], weights)
    a, b = (rule.correction(device, NAMES) for device in "ab")
    for name in NAMES:
        np.testing.assert_allclose(3 * a[name] + 17 * b[name], 0, atol=1e-5)
        assert a[name].dtype == np.float32
        assert np.abs(a[name]).min() > 0.1
    assert set(rule.correction("a", NAMES[:1])) == set(NAMES[:1])
    assert set(rule.correction("new", [*NAMES, "another"])) == set(NAMES), "c - 0"
    alone = Scaffold()
    rounds(alone, ["a", "a"])
    assert not alone.correction("a", NAMES)


def test_a_lost_devices_control_stays() -> None:
    """c_b is of round 1 until b is back: its correction moves with c alone."""
    rule = Scaffold()
    x = rounds(rule, ["ab"])
    before, common = rule.correction("b", NAMES), rule.correction("new", NAMES)
    rule.aggregate([contribution(rule, "a", x, 7.0, LRS)], Start(x))
    moved = {name: rule.correction("new", NAMES)[name] - common[name] for name in NAMES}
    for name in NAMES:
        np.testing.assert_allclose(rule.correction("b", NAMES)[name], before[name] + moved[name], atol=1e-6)
        assert moved[name].any()


# ---------------------------------------------------------------- what a node refuses


def test_a_correction_of_another_shape_or_type() -> None:
    plan = pb.Plan(optimizer=pb.Optimizer(name="sgd", lrs=[0.1], clip="none"))
    for wrong in (np.zeros(3, np.float32), np.zeros(2)):
        with pytest.raises(
            ProtocolError, match=r"the correction of .*lora_A.weight is float.*; allowed: float32 \[2\]"
        ):
            trainee().start(START, lambda layer: True, plan, correction={NAMES[0]: wrong})


def test_corrections_must_be_those_of_the_plan() -> None:
    tensors = {"m": np.ones(2, np.float32)}
    plan = pb.Plan(node="a", corrections=[pb.Correction(scope="ends", source="a", digest=adapters.digest(tensors))])
    found = read_corrections(plan, [adapters.to_bytes(tensors)])
    assert {key: adapters.digest(value) for key, value in found.items()} == {("ends", "a"): adapters.digest(tensors)}
    with pytest.raises(Refused, match="node a got 0 corrections; its plan names 1"):
        read_corrections(plan, [])
    with pytest.raises(Refused, match=r"node a got correction .* of 'a', its plan names"):
        read_corrections(plan, [adapters.to_bytes({"m": np.zeros(2, np.float32)})])
