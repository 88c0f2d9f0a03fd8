"""Frozen layers whose activations are kept: the same logits and gradients as the whole model, but for rounding."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

from edgelam_fl.model.adapter import Span
from edgelam_fl.model.lora import LoraKind
from edgelam_fl.model.source import find_model
from edgelam_fl.model.stage import LoraSettings, Stage, load_stages
from edgelam_fl.simulation.fabric import Shared
from edgelam_fl.simulation.frozen import OnFrozen, frozen_layers
from edgelam_fl.tasks.base import pad

pytestmark = pytest.mark.real_model
TOP = LoraSettings(4, 8.0, ("4.attention.self.query", "5.attention.self.value"))
ROWS = [[101, 2019, 3392, 102], [101, 2505, 1997, 1996, 2088, 2003, 102], [101, 3899, 102]]


def logits_and_gradients(stage: Stage) -> list[torch.Tensor]:
    torch.manual_seed(3)
    for parameter in stage.adapter_parameters.values():
        parameter.data.copy_(0.1 * torch.randn(parameter.shape))
    logits_BC = stage(pad(ROWS, 0), [len(row) for row in ROWS], unit_seed=5)
    (logits_BC**2).sum().backward()
    return [logits_BC.detach(), *(p.grad for p in stage.adapter_parameters.values() if p.grad is not None)]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_what_is_kept_gives_the_whole_models_logits_and_gradients(dropout: float) -> None:
    source = find_model("minilm-l6")
    whole = Span(0, source.num_layers, embed=True, head=True)
    lora = replace(TOP, dropout=dropout)
    (plain,) = load_stages(source, [whole], "fp32", lora, classes=3)
    shared = Shared(threading.Semaphore(1))
    first, second = (shared.load(source, [whole], "fp32", lora, compute="", classes=3)[0] for _ in range(2))
    assert frozen_layers(source, TOP) == 4
    assert frozen_layers(source, LoraSettings(4, 8.0, ("query",), kind=LoraKind(layers=(3, 5)))) == 3
    assert frozen_layers(source, replace(TOP, kind=LoraKind(saved=("1.output.LayerNorm",)))) == 1
    assert isinstance(first, OnFrozen)
    assert isinstance(second, OnFrozen)
    wanted = {name: p for name, p in plain.adapter_parameters.items()}
    assert first.adapter_parameters.keys() == wanted.keys()
    for stage in (first, second):
        for got, want in zip(logits_and_gradients(stage), logits_and_gradients(plain), strict=True):
            assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)
        plain.zero_grad()
    assert first.activations is second.activations
    assert len(first.activations) == len(ROWS)


@pytest.mark.parametrize(
    "lora",
    [LoraSettings(4, 8.0, ("query",)), replace(TOP, own_dropout=True)],
    ids=["lora in the lowest layer", "the model's own dropout"],
)
def test_where_the_lowest_layers_change_nothing_is_kept(lora: LoraSettings) -> None:
    source = find_model("minilm-l6")
    whole = Span(0, source.num_layers, embed=True, head=True)
    (stage,) = Shared(threading.Semaphore(1)).load(source, [whole], "fp32", lora, compute="", classes=3)
    assert not isinstance(stage, OnFrozen)
