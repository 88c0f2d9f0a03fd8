"""Labels are read from the gradient that comes back, whatever divisor the device uses; positions without label are seen as such."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from benchmarks.leakage.looking import back_of
from edgelam_fl.model.source import ModelSource
from edgelam_fl.privacy.attacks import labels
from edgelam_fl.privacy.attacks.labels import NONE

TOKENS, WORDS, DIVISOR = 9, 258, 37


@pytest.mark.parametrize("layers", [0, 2])
def test_labels_are_solved_from_the_gradient(tiny: ModelSource, layers: int) -> None:
    generator = torch.Generator().manual_seed(layers)
    back = back_of(tiny, "fp32", layers)
    states_TD = torch.randn(TOKENS, back.head_VD.shape[1], generator=generator).requires_grad_(True)
    target_T = torch.randint(WORDS, (TOKENS,), generator=generator)
    target_T[[0, 1, 5, TOKENS - 1]] = NONE
    logits_TV = back.features(states_TD[None])[0] @ back.head_VD.T
    (cross_entropy(logits_TV, target_T, ignore_index=NONE, reduction="sum") / DIVISOR).backward()
    assert states_TD.grad is not None
    read_T = labels.read(states_TD, states_TD.grad, back, candidates=16)
    assert read_T.tolist() == target_T.tolist()


def test_no_gradient_gives_no_label(tiny: ModelSource) -> None:
    back = back_of(tiny, "fp32", 1)
    states_TD = torch.randn(TOKENS, back.head_VD.shape[1], generator=torch.Generator().manual_seed(1))
    assert labels.read(states_TD, torch.zeros_like(states_TD), back).tolist() == [NONE] * TOKENS
