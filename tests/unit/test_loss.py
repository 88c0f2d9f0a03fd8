"""The loss at labelled positions, in chunks and pieces of them, against torch's cross entropy over all positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from edgelam_fl.model.memory import head_chunk, loss_piece
from edgelam_fl.split.loss import judged
from edgelam_fl.tasks.causal_lm import CausalLm
from edgelam_fl.tasks.masking import IGNORED
from edgelam_fl.wire import edgelam_pb2 as pb

B, T, D, CLASSES = 5, 40, 8, 11
DIVISOR = 5


class Head:
    """A stage's head that counts the positions of each call; says that it has so many logits that chunks are the least, and pieces two positions."""

    outputs = 2**18

    def __init__(self, *, learns: bool = False) -> None:
        matrix = torch.randn(CLASSES, D, generator=torch.Generator().manual_seed(1))
        self.matrix = torch.nn.Parameter(matrix, requires_grad=learns)
        self.sizes: list[int] = []

    def head_parameters(self) -> list[torch.nn.Parameter]:
        return [self.matrix] if self.matrix.requires_grad else []

    def logits(self, states_ND: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(states_ND))
        return functional.linear(states_ND, self.matrix)


class Passes:
    """A stage whose states are logits already."""

    outputs = Head.outputs

    def head_parameters(self) -> list[torch.nn.Parameter]:
        return []

    def logits(self, states_ND: torch.Tensor) -> torch.Tensor:
        return states_ND.clone()


@pytest.fixture
def states_BTD() -> torch.Tensor:
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(2)).requires_grad_()


def labels_of(share: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, CLASSES, (B, T), generator=generator)
    return labels.masked_fill(torch.rand(B, T, generator=generator) >= share, IGNORED)


def judge(
    states_BTD: torch.Tensor,
    labels: torch.Tensor,
    divisor: int | None = DIVISOR,
    *,
    learns: bool = False,
    **settings: Any,
) -> Any:
    task, head = CausalLm(Path("none"), pb.TaskSettings(template="plain", **settings)), Head(learns=learns)
    rows_N = task.loss_rows(labels)
    assert rows_N is not None
    picked_ND = states_BTD.flatten(0, 1)[rows_N]
    return judged(task, head, picked_ND, labels, divisor), head, picked_ND  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_chunks_give_the_loss_and_the_gradient_of_all_positions(
    states_BTD: torch.Tensor, share: float, smoothing: float
) -> None:
    labels = labels_of(share)
    found, head, _ = judge(states_BTD, labels, label_smoothing=smoothing)
    found.output.backward(found.grad)
    got, states_BTD.grad = states_BTD.grad, None
    expected = functional.cross_entropy(
        functional.linear(states_BTD, head.matrix)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum",
        ignore_index=IGNORED, label_smoothing=smoothing,
    )  # fmt: skip
    (expected / DIVISOR).backward()
    assert found.loss == pytest.approx(float(expected.detach()), rel=1e-6)
    torch.testing.assert_close(got, states_BTD.grad)
    assert sum(head.sizes) == int((labels[:, 1:] != IGNORED).sum())
    assert 1 < loss_piece(Head.outputs) < max(head.sizes) == head_chunk(Head.outputs) < sum(head.sizes)


@pytest.mark.parametrize("before_learns", [True, False])
def test_a_head_that_learns_gets_its_gradient_over_all_chunks(states_BTD: torch.Tensor, before_learns: bool) -> None:
    labels, states_BTD = labels_of(1.0), states_BTD.detach().requires_grad_(before_learns)
    found, head, _ = judge(states_BTD, labels, learns=True)
    expected = functional.cross_entropy(
        functional.linear(states_BTD, head.matrix)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    (gradient,) = torch.autograd.grad(expected / DIVISOR, head.matrix)
    ((parameter, got),) = found.of_head
    assert parameter is head.matrix
    torch.testing.assert_close(got, gradient)
    assert (found.grad is not None) == before_learns
    assert not judge(states_BTD, labels, None, learns=True)[0].of_head, "what is only measured"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradients_of_a_chunks_logits_have_the_bits_of_torchs_own(dtype: torch.dtype) -> None:
    """The gradient of each position's logits depends on no other position, so pieces change none."""
    generator = torch.Generator().manual_seed(4)
    logits_ND = torch.randn(9, D, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, D, (1, 10), generator=generator)
    task = CausalLm(Path("none"), pb.TaskSettings(template="plain"))
    found = judged(task, Passes(), logits_ND, labels, DIVISOR)  # type: ignore[arg-type]
    expected = functional.cross_entropy(logits_ND.float(), labels[0, 1:], reduction="sum") / DIVISOR
    assert found.grad is not None
    assert torch.equal(found.grad, *torch.autograd.grad(expected, logits_ND))
    assert torch.equal(logits_ND, torch.randn(9, D, generator=torch.Generator().manual_seed(4)).to(dtype))


def test_positions_without_labels_get_no_gradient(states_BTD: torch.Tensor) -> None:
    labels = labels_of(0.3)
    found, _, _ = judge(states_BTD, labels)
    found.output.backward(found.grad)
    assert states_BTD.grad is not None
    assert torch.equal(states_BTD.grad.any(-1)[:, :-1], labels[:, 1:] != IGNORED)


def test_a_micro_batch_without_labels_has_a_loss_of_zero(states_BTD: torch.Tensor) -> None:
    found, _, picked_ND = judge(states_BTD, torch.full((B, T), IGNORED))
    assert (found.loss, len(picked_ND), found.grad.shape) == (0.0, 0, (0, D))


def test_what_is_only_measured_has_no_gradient_and_no_smoothing(states_BTD: torch.Tensor) -> None:
    labels = labels_of(0.3)
    measured, _, _ = judge(states_BTD, labels, None, label_smoothing=0.2)
    assert measured.grad is None
    assert measured.loss == judge(states_BTD, labels, None)[0].loss
    assert judge(states_BTD.detach(), labels)[0].grad is None, "nothing learns"
