"""An adapter that trains: frozen factors, their moments, and FedProx's pull, on a stage of three small tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from edgelam_fl.errors import ProtocolError
from edgelam_fl.split.trainee import Trainee
from edgelam_fl.wire import edgelam_pb2 as pb

A, B, HEAD = "layers.0.q_proj.lora_A.weight", "layers.0.q_proj.lora_B.weight", "classifier.weight"
NAMES, LR, MU = (A, B, HEAD), 0.1, 0.5
START = {name: np.array([1.0, -2.0], np.float32) for name in NAMES}


class Parameters:
    """The part of a stage that a trainee uses."""

    def __init__(self) -> None:
        self.adapter_parameters = {name: torch.nn.Parameter(torch.zeros(2)) for name in NAMES}

    def load_adapter(self, tensors: dict[str, np.ndarray]) -> None:
        for name, parameter in self.adapter_parameters.items():
            parameter.data.copy_(torch.from_numpy(tensors[name]))

    def set_trainable(self, trains: Callable[[int | None], bool]) -> None:
        for name, parameter in self.adapter_parameters.items():
            parameter.requires_grad_(trains(None if name == HEAD else 0))


def trainee() -> Trainee:
    stage: Any = Parameters()
    return Trainee([stage])


def plan(*, freeze_a: bool = False, freeze_b: bool = False, keep: str = "exact", clip: str = "none") -> pb.Plan:
    lora = pb.Lora(train_front=True, train_hosts=True, train_back=True, freeze_a=freeze_a, freeze_b=freeze_b)
    return pb.Plan(lora=lora, optimizer=pb.Optimizer(name="adamw", lrs=[LR] * 9, keep=keep, clip=clip, max_norm=1.0))


def test_moments_of_other_settings_are_not_kept() -> None:
    """A node stays on for a second run: its optimizer must not go on by the first run's rule."""
    found, settings = trainee(), plan(keep="always")
    learn(found, settings, START)
    assert learn(found, settings, START)[0]
    for changes in (pb.Optimizer(weight_decay=0.5), pb.Optimizer(betas=[0.5, 0.9]), pb.Optimizer(eps=0.1)):
        other = plan(keep="always")
        other.optimizer.MergeFrom(changes)
        warm, moved = learn(found, other, START)
        assert not warm
        assert np.array_equal(moved[A], learn(trainee(), other, START)[1][A])
    wrong = plan()
    wrong.optimizer.weight_decay = -1.0
    with pytest.raises(ProtocolError, match="a plan's optimizer: Invalid weight_decay value"):
        trainee().start(START, lambda layer: True, wrong)


def test_weight_decay_shrinks_what_learns_and_leaves_what_is_frozen() -> None:
    settings = plan(freeze_a=True)
    settings.optimizer.weight_decay = 0.5
    found = trainee()
    found.start(START, lambda layer: True, settings)
    found.set_gradients([torch.zeros(2) for _ in found.parameters])
    found.step(0)
    assert np.array_equal(found.adapter()[A], START[A])
    assert np.allclose(found.adapter()[B], START[B] * (1 - LR * 0.5), rtol=1e-6)


def learn(
    found: Trainee, settings: pb.Plan, start: dict[str, np.ndarray], mu: float = 0.0
) -> tuple[bool, dict[str, np.ndarray]]:
    """Trains a round of two steps whose loss has gradient 1 everywhere; returns whether it was warm, and its contribution."""
    warm = found.start(start, lambda layer: True, settings, mu)
    for step in range(2):
        found.set_gradients([torch.ones(2) for _ in found.parameters])
        found.step(step)
    return warm, found.finish(settings)


@pytest.mark.parametrize(("flags", "frozen"), [({"freeze_a": True}, A), ({"freeze_b": True}, B)])
def test_a_frozen_factor_stays_and_is_not_contributed(flags: dict[str, Any], frozen: str) -> None:
    found = trainee()
    _, contributed = learn(found, plan(**flags), START)
    assert set(contributed) == set(NAMES) - {frozen}
    after = found.adapter()
    assert np.array_equal(after[frozen], START[frozen])
    assert all((after[name] < START[name]).all() for name in contributed)


def test_what_is_not_frozen_learns_as_if_alone() -> None:
    """Adam goes number by number: a frozen neighbour changes nothing."""
    whole, half = learn(trainee(), plan(), START)[1], learn(trainee(), plan(freeze_a=True), START)[1]
    assert np.array_equal(whole[B], half[B])


@pytest.mark.parametrize(
    ("keep", "second", "warm"),
    [
        ("exact", {"freeze_a": True}, True),  # the same flags, the very adapter
        ("exact", {"freeze_b": True}, False),
        ("exact", {}, False),
        ("always", {"freeze_b": True}, True),
    ],
)
def test_moments_go_on_with_the_same_flags(keep: str, second: dict[str, Any], warm: bool) -> None:
    found = trainee()
    learn(found, plan(freeze_a=True, keep=keep), START)
    assert learn(found, plan(keep=keep, **second), found.adapter())[0] == warm


def test_a_frozen_factors_moments_stay_untouched() -> None:
    """RoLoRA with keep = "always": the round that trained A leaves B's moments as the round before left them."""
    found = trainee()
    moments: list = []
    for frozen in ("freeze_a", "freeze_b", "freeze_a"):
        learn(found, plan(keep="always", **dict[str, Any]({frozen: True})), found.adapter() if moments else START)
        assert found.optimizer is not None
        state = {k: v.clone() for k, v in found.optimizer.state[found.named[B]].items()}
        moments.append(state)
    assert all(torch.equal(moments[0][key], moments[1][key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    assert (moments[1]["step"], moments[2]["step"]) == (2, 4)


# ---------------------------------------------------------------- FedProx


def gradients(found: Trainee) -> list[list[float]]:
    return [parameter.grad.tolist() for parameter in found.parameters if parameter.grad is not None]


def test_the_pull_is_mu_times_the_way_from_the_start() -> None:
    found = trainee()
    found.start(START, lambda layer: True, plan(), MU)
    found.optimizer = torch.optim.SGD(found.parameters, lr=LR)
    w = np.array([1.0, -2.0])
    for step in range(4):
        found.set_gradients([torch.tensor([2.0, 3.0]) for _ in found.parameters])
        found.step(step)
        w = w - LR * (np.array([2.0, 3.0]) + MU * (w - START[A]))
        assert all(np.allclose(found.adapter()[name], w, atol=1e-6) for name in NAMES)


def test_a_pull_goes_through_the_optimizer_and_decay_does_not() -> None:
    """As torch's AdamW on the loss with FedProx's term: the pull is a part of the gradient, the decay is beside it."""
    settings = plan()
    settings.optimizer.weight_decay = 0.5
    found = trainee()
    found.start(START, lambda layer: True, settings, MU)
    w = torch.nn.Parameter(torch.from_numpy(START[A].copy()))
    by_torch = torch.optim.AdamW([w], lr=LR, weight_decay=0.5)
    for step in range(3):
        found.set_gradients([torch.ones(2) for _ in found.parameters])
        found.step(step)
        w.grad = torch.ones(2).add_(w.detach() - torch.from_numpy(START[A]), alpha=MU)
        by_torch.step()
    assert np.array_equal(found.adapter()[A], w.detach().numpy())


def test_the_norm_and_the_step_see_one_pull() -> None:
    """With clip = "global" the norm is computed before the step; clearing a gradient clears its pull too."""
    found = trainee()
    found.start(START, lambda layer: True, plan(), MU)
    found.named[A].data.add_(1.0)
    expected = [[1 + MU * 1.0] * 2, [1.0] * 2, [1.0] * 2]
    for _ in range(2):
        found.set_gradients([torch.ones(2) for _ in found.parameters])
        for _ in range(2):
            assert found.squared_norm().squared_norm == pytest.approx(sum(x * x for row in expected for x in row))
            assert gradients(found) == expected
        found.clear()


def test_a_strong_pull_holds_a_device_back() -> None:
    pulled = learn(trainee(), plan(), START, 1e3)[1][A]
    assert np.abs(pulled - START[A]).max() < np.abs(learn(trainee(), plan(), START)[1][A] - START[A]).min()
