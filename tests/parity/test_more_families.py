"""Architectures with layouts of their own, in slices against the whole model of transformers and peft, to the bit.

Four layers each, so that every kind of layer is in another stage; `test_families` judges more behaviour, of plainer families.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.numpy import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GraniteConfig,
    Olmo2Config,
    Phi3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from edgelam_fl.cli.run_file import explained
from edgelam_fl.errors import ConfigError, ModelError
from edgelam_fl.model.adapter import Adapter, Span, initial_adapter, write_peft_folder
from edgelam_fl.model.families import FAMILIES
from edgelam_fl.model.index import safetensors_header
from edgelam_fl.model.layer_speed import random_layer
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.model.stage import LoraSettings, Stage, load_stages
from edgelam_fl.model.weights import read_tensors
from edgelam_fl.model.whole import load_whole, put_on
from tests.contract.test_model_folders import fp8
from tests.parity.test_families import (
    LENGTHS,
    check_generation,
    check_packing,
    padding,
    save,
    through,
    token_ids,
    whole_generation,
)
from tests.support import byte_tokenizer, run_config

LAYERS, WINDOW, RANK, ALPHA = 4, 8, 4, 8.0
SIZES: dict[str, Any] = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, bos_token_id=None, eos_token_id=None,
    pad_token_id=None,
)  # fmt: skip
KINDS = ["sliding_attention", "full_attention"] * (LAYERS // 2)
SMALL_GEMMA = dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=WINDOW, layer_types=KINDS)


@dataclass(frozen=True)
class Case:
    config: Callable[[], Any]
    targets: tuple[str, ...] = ("q_proj", "v_proj")


CASES = {
    "gemma2": Case(
        lambda: Gemma2Config(**SIZES, **SMALL_GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0)
    ),
    "gemma3_text": Case(  # a table of positions for each kind of layer
        lambda: Gemma3TextConfig(
            **SIZES, **SMALL_GEMMA, final_logit_softcapping=3.0,
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        ),
    ),
    "phi3": Case(
        lambda: Phi3Config(
            **SIZES, sliding_window=WINDOW, tie_word_embeddings=True, original_max_position_embeddings=32,
            rope_parameters={
                "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "factor": 2.0,
                "short_factor": [1.0, 1.5], "long_factor": [2.0, 8.0],
            },
        ),
        ("qkv_proj", "gate_up_proj"),
    ),
    "olmo2": Case(lambda: Olmo2Config(**SIZES), ("q_proj", "down_proj")),
    "smollm3": Case(
        lambda: SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1, 0], use_sliding_window=True, sliding_window=WINDOW)
    ),
    "qwen3_moe": Case(  # its second layer has no experts
        lambda: Qwen3MoeConfig(
            **SIZES, head_dim=8, moe_intermediate_size=24, num_experts=6, num_experts_per_tok=2, mlp_only_layers=[1],
            norm_topk_prob=True, output_router_logits=True,
        )
    ),
    "granite": Case(
        lambda: GraniteConfig(
            **SIZES, embedding_multiplier=3.0, residual_multiplier=0.4, attention_multiplier=0.3, logits_scaling=2.5
        )
    ),
}  # fmt: skip
CUTS = {
    "inside": [Span(0, 1, embed=True), Span(1, 3), Span(3, LAYERS, head=True)],
    "no layer in front": [Span(0, 0, embed=True), Span(0, 2), Span(2, LAYERS, head=True)],
    "no layer at the back": [Span(0, 2, embed=True), Span(2, LAYERS), Span(LAYERS, LAYERS, head=True)],
}


@dataclass(frozen=True)
class Built:
    name: str
    case: Case
    source: ModelSource
    adapter: Adapter

    @cached_property
    def whole(self) -> Any:
        """transformers and peft alone."""
        return self.new_whole(torch.float32)

    def new_whole(self, dtype: torch.dtype) -> Any:
        settings = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(self.case.targets), task_type="CAUSAL_LM")
        base = AutoModelForCausalLM.from_pretrained(self.source.folder, dtype=dtype)
        base.config.output_router_logits = False  # the loss of a router's balance is no part of training here
        model = get_peft_model(base, settings).eval()
        set_peft_model_state_dict(model, {name: torch.from_numpy(array) for name, array in self.adapter.items()})
        return model

    def stages(self, spans: list[Span], base: str = "fp32") -> list[Stage]:
        stages = load_stages(self.source, spans, base, LoraSettings(RANK, ALPHA, self.case.targets))
        for stage in stages:
            stage.load_adapter(self.adapter)
        return stages


@pytest.fixture(scope="module", params=CASES)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    case, folder = CASES[request.param], tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    save(AutoModelForCausalLM.from_config(case.config()), folder)
    source = find_model(str(folder))
    adapter = initial_adapter(source, case.targets, RANK, 1)
    drawn = np.random.default_rng(0)
    for name in adapter:
        if ".lora_B." in name:  # zero at first, which hides faults
            adapter[name] = drawn.normal(0, 0.3, adapter[name].shape).astype(np.float32)
    return Built(request.param, case, source, adapter)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name.replace(".default.", "."): p.grad for name, p in model.named_parameters() if p.grad is not None}


def backward_through(stages: list[Stage], loss: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Computes the gradients of all stages as a route does: each from the one behind it. Returns the output of the last."""
    inputs, outputs = [token_ids()], []
    for stage in stages:
        outputs.append(stage(inputs[-1], LENGTHS))
        inputs.append(outputs[-1].detach().requires_grad_())
    loss(inputs[-1]).backward()
    for output, behind in zip(reversed(outputs), reversed(inputs), strict=False):
        output.backward(behind.grad)
    return inputs[-1].detach()


def test_logits_and_gradients(built: Built) -> None:
    cuts = {cut: built.stages(spans) for cut, spans in CUTS.items()}
    for left in (True, False):
        mask, positions = padding(left)
        expected = built.whole(input_ids=token_ids(), attention_mask=mask, position_ids=positions).logits
        for cut, stages in cuts.items():
            with torch.no_grad():
                assert torch.equal(through(stages, token_ids(), LENGTHS, pad_left=left), expected), cut
    assert expected.std() > 0.1, "the model says the same of everything"
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    built.whole.zero_grad()
    expected.backward(weights)
    wanted = gradients(built.whole)
    assert wanted.keys() == built.adapter.keys()
    stages = cuts["inside"]
    for checkpointing in (False, True):
        for stage in stages:
            stage.zero_grad()
            stage.set_checkpointing(checkpointing)
        backward_through(stages, lambda logits: (logits * weights).sum())
        got = {name: p.grad for stage in stages for name, p in stage.adapter_parameters.items()}
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[name], wanted[name]) and got[name].any() for name in wanted)


def test_twenty_steps(built: Built) -> None:
    """Adapters after AdamW on three slices, against a plain peft loop."""
    whole, stages = built.new_whole(torch.float32), built.stages(CUTS["inside"])
    mask, positions = padding(left=False)
    labels = token_ids().roll(-1, 1).masked_fill(mask == 0, -100)

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    losses = []
    optimizers = [torch.optim.AdamW(stage.trainable(), lr=0.01) for stage in stages]
    alone = torch.optim.AdamW([p for p in whole.parameters() if p.requires_grad], lr=0.01)
    for _ in range(20):
        wanted = loss(whole(input_ids=token_ids(), attention_mask=mask, position_ids=positions).logits)
        wanted.backward()
        losses.append(loss(backward_through(stages, loss)))
        assert torch.equal(losses[-1], wanted), len(losses)
        for optimizer in (alone, *optimizers):
            optimizer.step()
            optimizer.zero_grad()
    trained = {name: array for stage in stages for name, array in stage.adapter().items()}
    plain = get_peft_model_state_dict(whole)
    assert trained.keys() == plain.keys()
    assert all(np.array_equal(array, plain[name].numpy()) for name, array in trained.items())
    assert losses[-1] < 0.9 * losses[0]


@torch.no_grad()
def test_texts_that_share_a_row_do_not_see_each_other(built: Built) -> None:
    check_packing(built.stages(CUTS["inside"]), built.whole)


@torch.no_grad()
def test_generation_with_caches(built: Built) -> None:
    """Windows overflow in the prompt of one row and in the answer of another; some layers have no positions."""
    expected = whole_generation(built.whole, 8)
    for cut in ("inside", "no layer in front"):
        check_generation(built.stages(CUTS[cut]), expected, cut)


@torch.no_grad()
def test_bases(built: Built) -> None:
    """bf16 is transformers' own in bf16; quantized slices are the quantized whole, and near the model."""
    mask, positions = padding(left=False)
    asked = {"input_ids": token_ids(), "attention_mask": mask, "position_ids": positions}
    expected = built.new_whole(torch.bfloat16)(**asked).logits
    assert torch.equal(through(built.stages(CUTS["inside"], "bf16"), token_ids(), LENGTHS), expected)
    plain = built.whole(**asked).logits
    for base, most in (("int8", 0.15), ("nf4", 1.0)):
        one, three = ([Span(0, LAYERS, embed=True, head=True)], CUTS["inside"])
        whole, slices = (through(built.stages(spans, base), token_ids(), LENGTHS) for spans in (one, three))
        assert torch.equal(whole, slices), base
        assert 0 < (whole - plain).norm() / plain.norm() < most, base


@pytest.mark.parametrize("built", ["phi3", "qwen3_moe"], indirect=True)
@torch.no_grad()
def test_exports_load_in_plain_transformers_and_peft(built: Built, tmp_path: Path) -> None:
    mask, positions = padding(left=False)
    asked = {"input_ids": token_ids(), "attention_mask": mask, "position_ids": positions}
    expected = built.whole(**asked).logits
    write_peft_folder(
        built.adapter, tmp_path / "a", reference="x", rank=RANK, alpha=ALPHA, targets=built.case.targets
    )  # fmt: skip
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(built.source.folder), tmp_path / "a").eval()
    assert torch.equal(plain(**asked).logits, expected)
    put_on(load_whole(built.source, "fp32"), tmp_path / "a").merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (merged(**asked).logits - expected).abs().max() < 1e-4


# ---------------------------------------------------------------- config.json as the hub has it

HUB: dict[str, dict[str, Any]] = {  # in the words of the versions of transformers that these models came with
    "gemma2": dict(
        hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh", cache_implementation="hybrid",
        query_pre_attn_scalar=8, sliding_window=WINDOW, attn_logit_softcapping=5.0, final_logit_softcapping=3.0,
        rope_theta=10000.0, head_dim=8,
    ),
    "gemma3_text": dict(
        attn_logit_softcapping=None, cache_implementation="hybrid", eos_token_id=[1, 90], final_logit_softcapping=None,
        hidden_activation="gelu_pytorch_tanh", head_dim=8, query_pre_attn_scalar=8, rope_local_base_freq=10000,
        rope_scaling=None, rope_theta=1000000, sliding_window=WINDOW, sliding_window_pattern=2,
    ),
    "phi3": dict(
        auto_map={
            "AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
        },
        embd_pdrop=0.0, resid_pdrop=0.0, original_max_position_embeddings=32, rope_theta=10000.0,
        rope_scaling={"long_factor": [2.0, 4.0, 8.0, 9.0], "short_factor": [1.0, 1.1, 1.5, 2.0], "type": "longrope"},
        sliding_window=262144, tie_word_embeddings=False, attention_bias=False,
    ),
    "olmo2": dict(attention_bias=False, rope_scaling=None, rope_theta=500000, tie_word_embeddings=False),
    "smollm3": dict(
        layer_types=["full_attention"] * LAYERS, max_window_layers=28, mlp_bias=False, no_rope_layer_interval=4,
        no_rope_layers=[1, 1, 1, 0], pretraining_tp=2, rope_scaling=None, rope_theta=5000000.0, sliding_window=None,
        use_sliding_window=False,
    ),
    "qwen3_moe": dict(
        decoder_sparse_step=1, max_window_layers=48, mlp_only_layers=[], moe_intermediate_size=24, norm_topk_prob=True,
        num_experts=6, num_experts_per_tok=2, output_router_logits=False, rope_scaling=None, rope_theta=1000000.0,
        router_aux_loss_coef=0.001, sliding_window=None, use_sliding_window=False, head_dim=8,
    ),
    "granite": dict(
        attention_multiplier=0.125, embedding_multiplier=12.0, logits_scaling=8.0, residual_multiplier=0.22,
        rope_scaling=None, rope_theta=5000000.0, tie_word_embeddings=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", HUB)
@torch.no_grad()
def test_config_json_in_older_words(kind: str, tmp_path: Path) -> None:
    name = type(CASES[kind].config()).__name__.replace("TextConfig", "Config").replace("Config", "ForCausalLM")
    said = {**SIZES, **HUB[kind], "model_type": kind, "architectures": [name], "torch_dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(said), encoding="utf-8")
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    made.save_pretrained(tmp_path / "new")
    (tmp_path / "new" / "model.safetensors").rename(tmp_path / "model.safetensors")
    source = find_model(str(tmp_path))
    assert source.tied_head == made.config.tie_word_embeddings
    expected = AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids=token_ids()).logits
    got = through(load_stages(source, CUTS["inside"], "fp32", None), token_ids(), [LENGTHS[0]] * len(LENGTHS))
    assert torch.equal(got, expected)


# ---------------------------------------------------------------- experts


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """As on the hub, and as save_pretrained writes it: each expert's matrices by themselves."""
    folder = tmp_path_factory.mktemp("experts")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CASES["qwen3_moe"].config()).save_pretrained(folder)
    return find_model(str(folder))


def test_the_index_has_transformers_own_names(experts: ModelSource) -> None:
    stored = safetensors_header(experts.folder / "model.safetensors")
    assert "model.layers.0.mlp.experts.5.gate_proj.weight" in stored
    expected = AutoModelForCausalLM.from_pretrained(experts.folder).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in expected.items()} == {
        name: entry.shape for name, entry in experts.index.items()
    }
    for name, tensor in read_tensors(experts, list(experts.index), "fp32"):
        assert torch.equal(tensor, expected[name]), name
    # Of six experts, two are asked; the other layer has a plain feed-forward part.
    assert experts.used_matrices(0)[-4:] == [(48, 32), (48, 32), (32, 24), (32, 24)]
    assert len(experts.used_matrices(0)) == 8
    assert len(experts.used_matrices(1)) == 7


@torch.no_grad()
def test_a_file_in_which_experts_are_joined(experts: ModelSource, tmp_path: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(experts.folder)
    whole.config.output_router_logits = False
    whole.save_pretrained(tmp_path, save_original_format=False)
    joined = find_model(str(tmp_path))
    assert joined.index.keys() == experts.index.keys()
    assert "model.layers.0.mlp.experts.gate_up_proj" in safetensors_header(tmp_path / "model.safetensors")
    for length in (LENGTHS[0], 1):
        expected = whole(input_ids=token_ids()[:1, :length]).logits
        got = through(load_stages(joined, CUTS["inside"], "fp32", None), token_ids()[:1, :length], [length])
        assert torch.equal(got, expected)


def test_experts_in_fp8(experts: ModelSource, tmp_path: Path) -> None:
    """Each expert's matrices have scales of their own, as in the fp8 checkpoints of the hub."""
    shutil.copytree(experts.folder, tmp_path / "fp8")
    fp8(tmp_path / "fp8", block=None)
    names = [name for name in experts.index if ".mlp.experts." in name]
    packed = dict(read_tensors(find_model(str(tmp_path / "fp8")), names, "fp32"))
    for name, tensor in read_tensors(experts, names, "fp32"):
        assert 0 < (packed[name] - tensor).norm() < 0.05 * tensor.norm(), name


def test_an_expert_that_is_not_there(experts: ModelSource, tmp_path: Path) -> None:
    tensors = load_file(experts.folder / "model.safetensors")
    del tensors["model.layers.2.mlp.experts.3.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((experts.folder / "config.json").read_bytes())
    with pytest.raises(ModelError, match=r"no tensor model\.layers\.2\.mlp\.experts\.3\.up_proj\.weight"):
        find_model(str(tmp_path))


@pytest.mark.parametrize("target", ["all-linear", "gate_proj", "gate_up_proj", "mlp.down_proj", "gate"])
def test_adapters_on_experts_are_refused(experts: ModelSource, target: str) -> None:
    with pytest.raises(ConfigError) as caught:
        initial_adapter(experts, (target,), RANK, 1)
    assert str(caught.value) == (
        f"lora.targets: {target!r} would adapt the experts of {experts.name}, which peft does in two tensors per layer and "
        "not by module. Allowed: k_proj, o_proj, q_proj, v_proj"
    )


def test_the_speed_of_a_layer_with_experts_can_be_measured(experts: ModelSource) -> None:
    for base, compute in (("fp32", "float32"), ("int8", "bfloat16")):
        stage = random_layer(experts, base, compute)
        assert stage(torch.randn(1, 16, 32).to(stage.dtype), [16]).isfinite().all()


# ---------------------------------------------------------------- what is refused


def test_targets_that_fused_matrices_do_not_have(tmp_path: Path) -> None:
    tokenizer, config = byte_tokenizer(), CASES["phi3"].config()
    tokenizer.save_pretrained(tmp_path)
    config.vocab_size = len(tokenizer)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError) as caught:
        initial_adapter(find_model(str(tmp_path)), ("q_proj", "v_proj"), RANK, 1)
    assert str(caught.value) == (
        f"lora.targets: no module of {tmp_path} is called 'q_proj'; did you mean 'qkv_proj'? "
        "Known: down_proj, gate_up_proj, o_proj, qkv_proj"
    )


def test_explain_refuses_targets_that_the_model_does_not_have(tiny: ModelSource) -> None:
    with pytest.raises(ConfigError, match=r"no module of .* is called 'qkv_proj'"):
        explained(run_config(tiny.name, "lora.targets=['qkv_proj']"))


@pytest.mark.parametrize(
    "kind", ["gemma3n", "phi", "qwen2_moe", "olmo", "olmo3", "granitemoe", "llama4", "mixtral", "phimoe", "cohere"]
)
def test_near_misses_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}), encoding="utf-8")
    save_file({"model.norm.weight": np.ones(4, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError) as caught:
        find_model(str(tmp_path))
    known = ", ".join(FAMILIES)
    assert str(caught.value) == (
        f"model.name: {tmp_path} is of the architecture {kind!r}, which cannot be cut; known: {known}"
    )


@torch.no_grad()
def test_gemma_3_with_images_is_refused_and_its_text_model_can_be_saved(tmp_path: Path) -> None:
    vision = dict(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    torch.manual_seed(0)
    text_config = CASES["gemma3_text"].config().to_dict() | {"final_logit_softcapping": None}
    both = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text_config, vision_config=vision))
    both.save_pretrained(tmp_path / "both")
    with pytest.raises(ModelError, match=r"'gemma3', which cannot be cut; .*it is Gemma 3 with images") as caught:
        find_model(str(tmp_path / "both"))
    assert "Gemma3ForCausalLM.from_pretrained(MODEL, key_mapping={'^language_model.': ''})" in str(caught.value)
    assert ".save_pretrained(FOLDER, save_original_format=False)" in str(caught.value)
    text = Gemma3ForCausalLM.from_pretrained(tmp_path / "both", key_mapping={"^language_model.": ""})
    text.save_pretrained(tmp_path / "text", save_original_format=False)
    stages = load_stages(find_model(str(tmp_path / "text")), CUTS["inside"], "fp32", None)
    expected = both.eval()(input_ids=token_ids()).logits
    assert torch.equal(through(stages, token_ids(), [token_ids().shape[1]] * len(token_ids())), expected)


def test_the_head_is_tied_where_config_json_does_not_say() -> None:
    """Files of older versions leave out what was the class's default."""
    assert {kind: CONFIG_MAPPING[kind]().tie_word_embeddings for kind in CASES} == {
        kind: FAMILIES[kind].tied for kind in CASES
    }
