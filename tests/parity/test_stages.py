"""Adapter sets, routes inside a stage, dropout and checkpointing change no bit of what its layers compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from edgelam_fl.errors import ProtocolError
from edgelam_fl.model.adapter import Adapter, Span, initial_adapter
from edgelam_fl.model.source import ModelSource
from edgelam_fl.model.stage import AdapterSet, LoraSettings, Stage, load_stages

TARGETS = ("q_proj", "v_proj", "down_proj")
THREE = [Span(0, 2, embed=True), Span(2, 4), Span(4, 6, head=True)]
LENGTHS = [9, 5]


def load(source: ModelSource, *spans: Span, dropout: float = 0.0, base: str = "fp32") -> list[Stage]:
    stages = load_stages(source, list(spans), base, LoraSettings(4, 8.0, TARGETS, dropout))
    for stage in stages:
        stage.load_adapter(trained(source))
    return stages


def trained(source: ModelSource) -> Adapter:
    """Returns an adapter in which every factor matters: B is not zero."""
    start = initial_adapter(source, TARGETS, 4, 1)
    other = initial_adapter(source, TARGETS, 4, 2)
    lent = {name: other[name.replace("lora_B", "lora_A")] for name in start}
    return {
        name: a if "lora_A" in name else lent[name].repeat(100, 1).T[: len(a), :4] * 0.3 for name, a in start.items()
    }


def token_ids(seed: int = 1) -> torch.Tensor:
    return torch.randint(2, 100, (2, 9), generator=torch.Generator().manual_seed(seed))


def hidden(seed: int = 1) -> torch.Tensor:
    return torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def through(stages: list[Stage], inputs: torch.Tensor, **options: Any) -> torch.Tensor:
    for stage in stages:
        inputs = stage(inputs, LENGTHS, **options)
    return inputs


def gradients(stages: list[Stage], inputs: torch.Tensor, **options: Any) -> dict[str, torch.Tensor]:
    """Returns the gradient of every adapter parameter, by name, and of the inputs if they are hidden states."""
    through(stages, inputs, **options).square().sum().backward()
    found = {name: p.grad for stage in stages for name, p in stage.adapter_parameters.items()}
    assert found
    assert all(grad is not None for grad in found.values())
    return {**found, **({"inputs": inputs.grad} if inputs.grad is not None else {})}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# ---------------------------------------------------------------- adapter sets


class Device:
    """One device's set on a shared stage, its batches and its optimizer."""

    def __init__(self, stage: Stage, number: int) -> None:
        self.stage, self.number = stage, number
        self.set: AdapterSet = stage.new_adapter_set()
        stage.use(self.set)
        stage.set_trainable(lambda layer: True)
        self.optimizer = torch.optim.AdamW(stage.trainable(), lr=1e-2)

    def forward(self, step: int) -> torch.Tensor:
        self.stage.use(self.set)
        return self.stage(hidden(10 * self.number + step), LENGTHS, unit_seed=self.number * 100 + step).square().sum()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


@pytest.mark.parametrize("recompute", [False, True])
def test_sets_in_turn_equal_sets_apart(tiny: ModelSource, recompute: bool) -> None:
    """Forward A, forward B, step A, backward B: neither notices the other."""
    apart = []
    for number in (1, 2):
        (stage,) = load(tiny, Span(1, 4), dropout=0.1)
        device = Device(stage, number)
        for step in range(3):
            device.forward(step).backward()
            device.step()
        apart.append({name: p.detach() for name, p in device.set.items()})

    (stage,) = load(tiny, Span(1, 4), dropout=0.1)
    stage.set_checkpointing(recompute)
    own = {name: p.detach().clone() for name, p in stage.adapter_parameters.items()}
    original = stage.adapter_parameters
    a, b = Device(stage, 1), Device(stage, 2)
    for step in range(3):
        loss_a, loss_b = a.forward(step), b.forward(step)
        loss_a.backward()
        a.step()
        stage.use(original)
        loss_b.backward()
        assert stage.adapter_parameters is original
        b.step()
    for device, expected in zip((a, b), apart, strict=True):
        assert same({name: p.detach() for name, p in device.set.items()}, expected)
    assert same({name: p.detach() for name, p in original.items()}, own)
    assert not torch.equal(a.set[next(iter(own))], b.set[next(iter(own))])


def test_a_set_has_its_own_values_and_its_own_freedom(tiny: ModelSource) -> None:
    (stage,) = load(tiny, Span(1, 4))
    first, second = stage.adapter_parameters, stage.new_adapter_set()
    assert list(first) == list(second)
    stage.set_trainable(lambda layer: layer == 2)
    stage.use(second)
    assert not [p for p in second.values() if p.requires_grad and p in set(first.values())]
    assert [id(p) for p in stage.set_trainable(lambda layer: layer == 3)] == [id(p) for p in stage.trainable()]
    assert {name.split(".layers.")[1][0] for name, p in second.items() if p.requires_grad} == {"3"}
    assert {name.split(".layers.")[1][0] for name, p in first.items() if p.requires_grad} == {"2"}
    stage.load_adapter({name: array + 1 for name, array in stage.adapter().items()})
    for name in first:
        assert torch.equal(second[name], first[name] + 1)


# ---------------------------------------------------------------- routes inside a stage


@pytest.mark.parametrize(
    ("span", "layers"),
    [
        (Span(1, 5), (2, 4)),
        (Span(1, 5), (1, 3)),
        (Span(1, 5), (3, 3)),
        (Span(0, 4, embed=True), (0, 1)),
        (Span(0, 4, embed=True), (0, 0)),
        (Span(2, 6, head=True), (5, 6)),
        (Span(2, 6, head=True), (6, 6)),
    ],
)
def test_a_route_inside_a_stage_equals_a_smaller_stage(tiny: ModelSource, span: Span, layers: tuple[int, int]) -> None:
    (large,) = load(tiny, span)
    (small,) = load(tiny, Span(*layers, embed=span.embed, head=span.head))
    whole_before = through([large], token_ids() if span.embed else hidden())
    inputs = [token_ids(), token_ids()] if span.embed else [hidden(), hidden()]
    outputs = [large(inputs[0], LENGTHS, layers=layers), small(inputs[1], LENGTHS)]
    assert torch.equal(*outputs)
    if layers[0] < layers[1]:
        for output in outputs:
            output.square().sum().backward()
        grads = {name: p.grad for name, p in large.adapter_parameters.items() if p.grad is not None}
        assert same(grads, {name: p.grad for name, p in small.adapter_parameters.items()})
        assert span.embed or torch.equal(inputs[0].grad, inputs[1].grad)
    assert torch.equal(through([large], token_ids() if span.embed else hidden()), whole_before)


@pytest.mark.parametrize(
    ("span", "layers"),
    [(Span(2, 4), (1, 4)), (Span(2, 4), (2, 5)), (Span(2, 4), (4, 3)), (Span(0, 4, embed=True), (1, 4)), (Span(3, 6, head=True), (3, 5))],
)  # fmt: skip
def test_a_route_that_the_stage_cannot_serve(tiny: ModelSource, span: Span, layers: tuple[int, int]) -> None:
    (stage,) = load(tiny, span)
    with pytest.raises(ProtocolError, match=f"layers {layers[0]} to {layers[1]} "):
        stage(token_ids() if span.embed else hidden(), LENGTHS, layers=layers)


# ---------------------------------------------------------------- dropout


def test_dropout_is_the_same_for_the_whole_and_for_slices(tiny: ModelSource) -> None:
    whole = load(tiny, Span(0, 6, embed=True, head=True), dropout=0.2)
    slices = load(tiny, *THREE, dropout=0.2)
    plain = through(whole, token_ids())
    dropped = through(whole, token_ids(), unit_seed=7)
    assert torch.equal(through(slices, token_ids(), unit_seed=7), dropped)
    assert torch.equal(through(slices, token_ids()), plain)
    assert torch.equal(plain, through(load(tiny, *THREE), token_ids()))
    assert not torch.equal(dropped, plain)
    assert not torch.equal(through(slices, token_ids(), unit_seed=8), dropped)
    assert same(gradients(slices, token_ids(), unit_seed=7), gradients(whole, token_ids(), unit_seed=7))


# ---------------------------------------------------------------- checkpointing


def saved_bytes(work: Callable[[], object]) -> int:
    """Counts the bytes that autograd keeps for the backward pass, each storage once."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        work()
    return sum(kept.values())


@pytest.mark.parametrize(("base", "dropout"), [("fp32", 0.0), ("fp32", 0.2), ("bf16", 0.2), ("int8", 0.0)])
def test_checkpointing_changes_memory_and_no_bit(tiny: ModelSource, base: str, dropout: float) -> None:
    (plain,) = load(tiny, Span(1, 5), dropout=dropout, base=base)
    (checkpointed,) = load(tiny, Span(1, 5), dropout=dropout, base=base)
    checkpointed.set_checkpointing(True)

    def inputs() -> torch.Tensor:
        return hidden().detach().to(plain.dtype).requires_grad_()

    assert same(gradients([checkpointed], inputs(), unit_seed=3), gradients([plain], inputs(), unit_seed=3))
    projections = [module for name, module in checkpointed.named_modules() if "_proj" in name]
    assert projections
    assert not any(module.training for module in projections)
    kept = [saved_bytes(lambda stage=stage: stage(inputs(), LENGTHS)) for stage in (plain, checkpointed)]  # type: ignore[misc]
    assert kept[1] < kept[0] / 2
    checkpointed.set_checkpointing(False)
    assert saved_bytes(lambda: checkpointed(inputs(), LENGTHS)) == kept[0]


def test_generation_on_a_checkpointed_stage_keeps_its_cache(tiny: ModelSource) -> None:
    (stage,) = load(tiny, Span(1, 5))
    expected = stage(hidden(), LENGTHS)
    stage.set_checkpointing(True)
    cache = stage.new_cache()
    first = stage(hidden()[:, :4], [4, 4], cache=cache)
    second = stage(hidden()[:, 4:], [5, 1], cache=cache)
    torch.testing.assert_close(torch.cat([first, second], 1)[0], expected[0], rtol=0, atol=1e-5)
