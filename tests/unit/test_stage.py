from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from edgelam_fl.errors import ModelError, ProtocolError
from edgelam_fl.model import adapter as adapters
from edgelam_fl.model.source import ModelSource
from edgelam_fl.model.stage import LoraSettings, Pass, Span, Stage, load_stages
from tests.fleet import same_bits

LORA = LoraSettings(8, 16.0, ("q_proj", "v_proj"))


def load(source: ModelSource, *spans: Span, base: str = "fp32", lora: LoraSettings | None = LORA) -> list[Stage]:
    return load_stages(source, list(spans), base, lora)


def start(source: ModelSource) -> adapters.Adapter:
    return adapters.initial_adapter(source, LORA.targets, LORA.rank, 1)


@pytest.mark.parametrize("span", [Span(0, 2, embed=True), Span(2, 4), Span(4, 6, head=True), Span(3, 3, embed=True)])
def test_absent_layers_pass_and_absent_ends_are_not_loaded(tiny: ModelSource, span: Span) -> None:
    (stage,) = load(tiny, span)
    layers = next(m for name, m in stage.named_modules() if name.endswith("model.layers"))
    assert [isinstance(layer, Pass) for layer in layers] == [not span.first <= n < span.last for n in range(6)]
    numbers = {name.split(".layers.")[1].split(".")[0] for name, _ in stage.named_parameters() if ".layers." in name}
    assert numbers == {str(n) for n in range(span.first, span.last)}
    rows = [p for p in stage.parameters() if p.shape[0] == tiny.index["model.embed_tokens.weight"].shape[0]]
    assert len(rows) == span.embed + span.head
    assert all(p.device.type == "cpu" for p in [*stage.parameters(), *stage.buffers()])


@pytest.mark.parametrize("span", [Span(0, 7), Span(4, 2), Span(-1, 2), Span(7, 9)])
def test_a_span_outside_the_model(tiny: ModelSource, span: Span) -> None:
    with pytest.raises(ModelError, match=f"layers {span.first} to {span.last} is outside the model's 6 layers"):
        load(tiny, span)


def test_front_and_back_of_a_device_share_the_tied_tensor(tiny: ModelSource) -> None:
    front, back = load(tiny, Span(0, 2, embed=True), Span(4, 6, head=True))
    pointers = {p.data_ptr() for s in (front, back) for n, p in s.named_parameters() if "embed" in n or "lm_head" in n}
    assert len(pointers) == 1


def test_layers_are_freed_by_number(tiny: ModelSource) -> None:
    (stage,) = load(tiny, Span(1, 5))
    free = stage.set_trainable(lambda layer: layer in (1, 4))
    assert len(free) == 2 * 2 * 2  # layers, targets, A and B
    trainable = {name for name, p in stage.named_parameters() if p.requires_grad}
    assert len(trainable) == 8
    assert all(".lora_" in name and (".layers.1." in name or ".layers.4." in name) for name in trainable)
    assert stage.set_trainable(lambda layer: False) == []
    assert not any(p.requires_grad for p in stage.parameters())


def test_an_adapter_goes_in_and_out_bit_for_bit(tiny: ModelSource) -> None:
    whole = start(tiny)
    (stage,) = load(tiny, Span(2, 4), base="bf16")
    stage.load_adapter(whole)
    assert same_bits(stage.adapter(), adapters.slice_of(whole, [Span(2, 4)]))
    stage.adapter()[next(iter(stage.adapter()))].fill(7)  # a copy, not the parameter
    assert same_bits(stage.adapter(), adapters.slice_of(whole, [Span(2, 4)]))


NAME = "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda a: a.pop(NAME), "nothing"),
        (lambda a: a.update({NAME: np.zeros((4, 64), np.float32)}), "float32 [4, 64]"),
        (lambda a: a.update({NAME: np.zeros((8, 64), np.float64)}), "float64 [8, 64]"),
        (lambda a: a.update({NAME: np.zeros((8, 64), np.float16)}), "float16 [8, 64]"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    tiny: ModelSource, change: Callable[[adapters.Adapter], Any], got: str
) -> None:
    adapter = start(tiny)
    change(adapter)
    (stage,) = load(tiny, Span(2, 4))
    with pytest.raises(ProtocolError) as caught:
        stage.load_adapter(adapter)
    assert str(caught.value) == f"adapter tensor {NAME}: expected float32 [8, 64], got {got}"


def test_a_stage_names_its_adapter_as_the_start_does(tiny: ModelSource) -> None:
    lora = LoraSettings(4, 8.0, ("all-linear",))
    stages = load(tiny, Span(0, 2, embed=True), Span(2, 4), Span(4, 6, head=True), lora=lora)
    expected = adapters.initial_adapter(tiny, lora.targets, 4, 1)
    got = {name: p.shape for stage in stages for name, p in stage.adapter_parameters.items()}
    assert got == {name: array.shape for name, array in expected.items()}


def test_a_target_that_lies_in_another_stage_leaves_this_one_without_adapter(tiny: ModelSource) -> None:
    lora = LoraSettings(4, 8.0, ("layers.3.self_attn.q_proj",))
    front, middle = load(tiny, Span(0, 2, embed=True), Span(2, 4), lora=lora)
    assert front.adapter() == {}
    assert set(middle.adapter()) == set(adapters.initial_adapter(tiny, lora.targets, 4, 1))


def test_padding_changes_no_real_position(tiny: ModelSource) -> None:
    (stage,) = load(tiny, Span(0, 6, embed=True, head=True))
    ids = torch.randint(2, 100, (2, 9), generator=torch.Generator().manual_seed(1))
    both = stage(ids, [9, 5])
    ids[1, 5:] = 0
    assert torch.equal(stage(ids, [9, 5])[1, :5], both[1, :5])
    torch.testing.assert_close(stage(ids[1:, :5], [5])[0], both[1, :5], rtol=0, atol=1e-5)
