"""The estimates against what torch really keeps and what slices really hold."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from edgelam_fl.model.index import layer_number
from edgelam_fl.model.lora import LoraKind
from edgelam_fl.model.memory import DoraBytes, head_chunk, loss_piece, unit_bytes, weights_bytes
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.model.stage import LoraSettings, Span, Stage, load_stages
from edgelam_fl.model.weights import read_tensors
from edgelam_fl.plan.footprint import GROWTH_BYTES, Footprints
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.tasks.causal_lm import loss_rows, loss_sum
from server.global_adapter import first_adapter
from server.virtual.loads import Loads
from tests.support import run_config

ATTENTION, ALL = ("q_proj", "v_proj"), ("all-linear",)
PAIRS = [("fp32", ""), ("bf16", ""), ("int8", "float32"), ("int8", "bfloat16"), ("nf4", "bfloat16")]


def measured(stage: Stage, rows: int, tokens: int, hidden_size: int, itemsize: int) -> int:
    """Unique storages that one forward pass keeps, without the weights; with input, output and the output's gradient.

    Of a head, output is what it takes, and the logits of a chunk are there as well, with what the loss of one piece of them keeps and two gradients of it.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in [*stage.parameters(), *stage.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # held, so that no address comes twice
        return tensor

    x = torch.randn(rows, tokens, hidden_size).to(stage.dtype).requires_grad_()
    labels = torch.full((rows, tokens), 3)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = stage(x, [tokens] * rows, rows=loss_rows(labels) if stage.span.head else None)
        gradients = output.nbytes
        if stage.span.head:
            logits = stage.logits(output[: head_chunk(stage.outputs)])
            piece = loss_piece(stage.outputs)
            losses = loss_sum(logits[:piece], labels, loss_rows(labels)[:piece])
            gradients += 2 * logits[:piece].float().nbytes
            kept[logits.untyped_storage().data_ptr()] = logits.untyped_storage()
            assert losses.requires_grad
    kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
    kept[output.untyped_storage().data_ptr()] = output.untyped_storage()
    return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in own) + gradients


@pytest.mark.parametrize(("base", "compute"), PAIRS)
@pytest.mark.parametrize("targets", [ATTENTION, ALL])
@pytest.mark.parametrize(("layers", "rows", "tokens"), [(1, 1, 40), (3, 4, 64), (6, 2, 100)])
def test_a_unit_of_the_tiny_model(
    tiny: ModelSource, base: str, compute: str, targets: tuple[str, ...], layers: int, rows: int, tokens: int
) -> None:
    (stage,) = load_stages(tiny, [Span(0, layers)], base, LoraSettings(8, 16.0, targets), compute)
    itemsize = stage.dtype.itemsize
    estimate = unit_bytes(tiny.config, layers, rows, tokens, itemsize, all_linear=targets == ALL)
    assert estimate == pytest.approx(measured(stage, rows, tokens, tiny.hidden_size, itemsize), rel=0.25)


@pytest.mark.parametrize(("base", "compute"), PAIRS)
@pytest.mark.parametrize("targets", [ATTENTION, ALL])
def test_a_unit_with_dora(tiny: ModelSource, base: str, compute: str, targets: tuple[str, ...]) -> None:
    kind = LoraKind(dora=True)
    (stage,) = load_stages(tiny, [Span(0, 3)], base, LoraSettings(8, 16.0, targets, kind=kind), compute)
    itemsize = stage.dtype.itemsize
    dora = DoraBytes.of(tiny, targets, kind, itemsize)
    estimate = unit_bytes(tiny.config, 3, 4, 64, itemsize, all_linear=targets == ALL, dora_bytes=dora.kept)
    assert estimate == pytest.approx(measured(stage, 4, 64, tiny.hidden_size, itemsize), rel=0.25)
    assert DoraBytes.of(tiny, targets, LoraKind(), itemsize) == DoraBytes(0, 0)


@pytest.mark.real_model
@pytest.mark.parametrize(("base", "compute"), PAIRS)
@pytest.mark.parametrize("span", [Span(2, 4), Span(2, 10), Span(29, 30, head=True)])
def test_a_unit_of_the_real_model(smollm: ModelSource, base: str, compute: str, span: Span) -> None:
    (stage,) = load_stages(smollm, [span], base, LoraSettings(8, 16.0, ATTENTION), compute)
    itemsize = stage.dtype.itemsize
    estimate = unit_bytes(smollm.config, span.last - span.first, 2, 64, itemsize, head=span.head)
    assert estimate == pytest.approx(measured(stage, 2, 64, smollm.hidden_size, itemsize), rel=0.05)


def test_checkpointing_keeps_each_layers_input_and_one_layers_activations(tiny: ModelSource) -> None:
    hidden = 4 * 64 * tiny.hidden_size * 4
    ends = unit_bytes(tiny.config, 0, 4, 64, 4)
    assert ends == 3 * hidden  # input, output, the output's gradient
    layer = unit_bytes(tiny.config, 1, 4, 64, 4) - ends
    assert unit_bytes(tiny.config, 6, 4, 64, 4) == ends + 6 * layer
    assert unit_bytes(tiny.config, 6, 4, 64, 4, checkpointing=True) == ends + 6 * hidden + layer
    assert unit_bytes(tiny.config, 0, 4, 64, 4, checkpointing=True) == ends


def held_bytes(stages: list[Stage]) -> int:
    storages = {
        parameter.untyped_storage().data_ptr(): parameter.nbytes
        for stage in stages
        for name, parameter in stage.named_parameters()
        if "lora_" not in name
    }
    return sum(storages.values())


@pytest.mark.parametrize(("base", "compute"), PAIRS)
@pytest.mark.parametrize(
    "spans",
    [
        [Span(0, 6, embed=True, head=True)],
        [Span(0, 2, embed=True)],
        [Span(2, 5)],
        [Span(4, 6, head=True)],
        [Span(0, 2, embed=True), Span(4, 6, head=True)],
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_what_the_stages_hold(
    tiny: ModelSource, untied: ModelSource, tied: bool, spans: list[Span], base: str, compute: str
) -> None:
    source = tiny if tied else untied
    assert weights_bytes(source, spans, base, compute) == held_bytes(load_stages(source, spans, base, None, compute))


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    from tests.support import write_tiny_llama

    return find_model(str(write_tiny_llama(tmp_path_factory.mktemp("untied"), tied=False)))


def test_the_planner_counts_all_numbers_of_an_adapter(untied: ModelSource) -> None:
    """Ranks of modules, magnitudes, norms and a head; of an adapter, 4 bytes each and 16 while it learns."""
    kind = ["lora.rank_pattern={ q_proj = 16 }", "lora.use_dora=true", "lora.modules_to_save=['norm', 'lm_head']"]
    spec = RunSpec(run_config(untied.name, *kind), untied)
    spans, inside = [Span(0, 2, embed=True), Span(4, 6, head=True)], Counter[int | None]()
    for name, array in first_adapter(spec).items():
        inside[layer_number(name)] += array.size
    footprints = Footprints(spec)
    assert footprints.adapter_weights == {layer: inside[layer] for layer in range(6)}
    assert inside[None] == 64 + untied.config["vocab_size"] * 64, "the last norm and the head"
    learning = 20 * sum(inside[place] for place in (0, 1, 4, 5, None))
    plain = Footprints(RunSpec(run_config(untied.name, "lora.use_dora=true", "lora.layers_to_transform=2"), untied))
    with_all, without = (one.of_device("a", spans, "fp32/fp32", 1) for one in (footprints, plain))
    assert with_all - without == learning
    assert footprints.growth_bytes - GROWTH_BYTES == 4 * (64 + 3 * 64) * 64, "of the largest matrix, 64 x 64"
    assert Loads(spec).adapter_bytes("a") == 4 * learning // 20


OTHERS: dict[str, dict[str, Any]] = {
    "gemma2": dict(head_dim=16, sliding_window=32),  # keeps its capped scores
    "gemma3_text": dict(head_dim=16, sliding_window=32),
    "phi3": {},
    "olmo2": {},
    "qwen3_moe": dict(head_dim=16, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=48, mlp_only_layers=[2]),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_slices_and_units_of_other_families(kind: str, tmp_path: Path) -> None:
    config = CONFIG_MAPPING[kind](
        vocab_size=50, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=None, pad_token_id=None, **OTHERS[kind],
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    source = find_model(str(tmp_path))
    for base, compute in PAIRS:
        spans = [Span(0, 1, embed=True), Span(1, 3, head=True)]
        assert weights_bytes(source, spans, base, compute) == held_bytes(
            load_stages(source, spans, base, None, compute)
        )
        (stage,) = load_stages(source, [Span(0, 2)], base, LoraSettings(8, 16.0, ("o_proj",)), compute)
        estimate = unit_bytes(source.config, 2, 2, 64, stage.dtype.itemsize)
        assert estimate == pytest.approx(measured(stage, 2, 64, 64, stage.dtype.itemsize), rel=0.25), (base, compute)


@pytest.mark.parametrize("base", ["int8", "nf4"])
def test_weights_that_lie_input_first(tmp_path: Path, base: str) -> None:
    """GPT-2: 12 x 32 x 32 weights in a layer's four matrices."""
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=50, n_positions=16, bos_token_id=1, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    source = find_model(str(tmp_path))
    names = [name for name in source.index if ".h.1." in name]
    held = sum(tensor.nbytes for _, tensor in read_tensors(source, names, base))
    assert weights_bytes(source, [Span(1, 2)], base) == held
    scales = 4 * (96 + 32 + 128 + 32) if base == "int8" else 12 * 32 * 32 // 64 * 4
    vectors = 4 * (4 * 32 + 96 + 32 + 128 + 32)  # two norms of two each, four biases
    assert held == 12 * 32 * 32 // (1 if base == "int8" else 2) + scales + vectors
