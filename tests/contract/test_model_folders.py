"""Model folders as people have them: each feature is read as transformers reads it, or refused by name where the model is looked up."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    BitsAndBytesConfig,
    FineGrainedFP8Config,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    Phi3Config,
)

from edgelam_fl.cli.run_file import explained, write_run_file
from edgelam_fl.config import read_run_file
from edgelam_fl.doctor.checks import check_model
from edgelam_fl.errors import ModelError, ModelNotFound
from edgelam_fl.model.adapter import Span
from edgelam_fl.model.folder import INDEX, WEIGHTS
from edgelam_fl.model.identity import of_folder
from edgelam_fl.model.limits import check_limits, check_tokens, last_token, positions_of
from edgelam_fl.model.source import find_model
from edgelam_fl.model.stage import load_stages
from edgelam_fl.model.weights import read_tensors
from edgelam_fl.model.whole import load_whole
from server.checks import check_config
from tests.support import run_config, write_tiny_llama

Change = Callable[[Path], None]
IDS = torch.arange(2, 40)[None]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("plain"), layers=2, tied=False)


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(plain, tmp_path / "model")


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        find_model(str(folder))
    return str(caught.value)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def ours(folder: Path) -> torch.Tensor:
    return logits(load_whole(find_model(str(folder)), "fp32"))


def transformers_own(folder: Path) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())


# ---------------------------------------------------------------- which files are the model


def shard(folder: Path, parts: int = 2) -> list[Path]:
    """Cuts model.safetensors into files with an index, as save_pretrained does with large models."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = [f"model-{number + 1:05}-of-{parts:05}.safetensors" for number in range(parts)]
    weight_map = {tensor: names[number % parts] for number, tensor in enumerate(sorted(tensors))}
    for name in names:
        own = {tensor: tensors[tensor] for tensor, file in weight_map.items() if file == name}
        save_file(own, folder / name, metadata={"format": "pt"})
    write_index(folder, {"metadata": {"total_size": 1}, "weight_map": weight_map})
    return [folder / name for name in names]


def write_index(folder: Path, index: Any) -> None:
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")


def edit_map(folder: Path, **changed: Any) -> None:
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    index["weight_map"] |= changed
    write_index(folder, index)


def with_noise(folder: Path, name: str, prefix: str = "") -> None:
    """Writes a file with random weights of the same names."""
    noise = {prefix + tensor: torch.randn_like(values) for tensor, values in load_file(folder / WEIGHTS).items()}
    save_file(noise, folder / name, metadata={"format": "pt"})


def sharded_with_a_backup(folder: Path) -> None:
    with_noise(folder, "pretrained_backup.safetensors")
    shard(folder)


def one_file_with_strays(folder: Path) -> None:
    for name in ("consolidated.safetensors", "optimizer.safetensors", "model.fp16.safetensors", "z.safetensors"):
        with_noise(folder, name)
    with_noise(folder, "adapter_model.safetensors", "base_model.")
    (folder / "pytorch_model.bin").write_bytes(b"not looked at")
    (folder / "optimizer.pt").write_bytes(b"not looked at")
    (folder / "training_args.bin").write_bytes(b"not looked at")
    shutil.copytree(folder, folder / "checkpoint-20")


def two_sets(folder: Path) -> None:
    """transformers takes the single file."""
    with_noise(folder, "whole.safetensors")
    shard(folder)
    (folder / "whole.safetensors").rename(folder / WEIGHTS)


def a_file_that_config_names(folder: Path) -> None:
    with_noise(folder, "other.safetensors")
    edit_config(folder, transformers_weights="other.safetensors")


def index_that_leaves_a_tensor_out(folder: Path) -> None:
    """transformers takes whatever is in the files that are named."""
    shard(folder)
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    del index["weight_map"]["lm_head.weight"]
    write_index(folder, index)


def edit_config(folder: Path, **changed: Any) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | changed
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


READ_LAYOUTS: list[Change] = [
    sharded_with_a_backup, one_file_with_strays, two_sets, a_file_that_config_names, index_that_leaves_a_tensor_out,
]  # fmt: skip


@pytest.mark.parametrize("change", READ_LAYOUTS, ids=lambda change: change.__name__)
def test_a_layout_that_is_read(folder: Path, change: Change) -> None:
    change(folder)
    assert torch.equal(ours(folder), transformers_own(folder))


def lost_shard(folder: Path) -> None:
    shard(folder, 4)[1].unlink()


def tensor_in_another_file(folder: Path) -> None:
    shard(folder)
    edit_map(folder, **{"lm_head.weight": "model-00002-of-00002.safetensors"})


def tensor_in_two_files(folder: Path) -> None:
    one, other = shard(folder)
    tensor = {"lm_head.weight": torch.zeros(258, 64)}
    save_file(load_file(one) | tensor, one)
    save_file(load_file(other) | tensor, other)


def tensor_in_no_file(folder: Path) -> None:
    shard(folder)
    edit_map(folder, **{"model.layers.9.mlp.up_proj.weight": "model-00002-of-00002.safetensors"})


def file_outside(folder: Path) -> None:
    shard(folder)
    edit_map(folder, **{"lm_head.weight": "../model-00001-of-00002.safetensors"})


def index_without_map(folder: Path) -> None:
    shard(folder)
    write_index(folder, {"metadata": {}})


def index_cut_short(folder: Path) -> None:
    shard(folder)
    (folder / INDEX).write_text('{"metadata": {"total_size": 1}, "weight_map": {"lm_head', encoding="utf-8")


def index_that_is_a_list(folder: Path) -> None:
    shard(folder)
    write_index(folder, ["model-00001-of-00002.safetensors"])


def shards_without_index(folder: Path) -> None:
    shard(folder)
    (folder / INDEX).unlink()


def download_cut_short(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def lfs_pointer(folder: Path) -> None:
    (folder / WEIGHTS).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", encoding="utf-8"
    )


def only_pickles(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def only_an_adapter(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.safetensors")
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}', encoding="utf-8")


def link_to_a_file_that_is_gone(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("../blobs/0123")


def root_of_a_hubs_cache(folder: Path) -> None:
    shutil.copytree(folder, folder / "snapshots" / "0123")
    for file in folder.glob("*.*"):
        file.unlink()


def only_another_name(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "consolidated.safetensors")


def config_cut_short(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "lla', encoding="utf-8")


REFUSED_LAYOUTS: list[tuple[Change, tuple[str, ...]]] = [
    (lost_shard, ("model-00002-of-00004.safetensors", "3 of 4 files are here")),
    (tensor_in_another_file, ("lm_head.weight", "model-00001-of-00002", "model-00002-of-00002", "Fetch the folder")),
    (tensor_in_two_files, ("lm_head.weight", "two sets")),
    (tensor_in_no_file, ("model.layers.9.mlp.up_proj.weight", "model-00002-of-00002.safetensors")),
    (file_outside, (INDEX, "'../model-00001-of-00002.safetensors'")),
    (index_without_map, (INDEX, "weight_map")),
    (index_cut_short, (INDEX, "cannot be read as JSON")),
    (index_that_is_a_list, (INDEX, "one JSON object")),
    (shards_without_index, ("model-00001-of-00002.safetensors", f"Fetch {INDEX}")),
    (download_cut_short, (WEIGHTS, "not a whole safetensors file", "Fetch it again")),
    (lfs_pointer, (WEIGHTS, "git lfs pull")),
    (only_pickles, ("pytorch_model.bin", "save_pretrained")),
    (only_an_adapter, ("adapter_config.json", "org/base", "merge_and_unload")),
    (link_to_a_file_that_is_gone, ("a link to a file that is gone", "../blobs/0123")),
    (root_of_a_hubs_cache, ("must hold config.json", "a folder below snapshots")),
    (only_another_name, ("consolidated.safetensors", f"rename it to {WEIGHTS}")),
    (config_cut_short, ("config.json", "cannot be read as JSON")),
]


@pytest.mark.parametrize(("change", "words"), REFUSED_LAYOUTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_layout_that_is_refused(folder: Path, change: Change, words: tuple[str, ...]) -> None:
    change(folder)
    text = refusal(folder)
    assert all(word in text for word in words), text


# ---------------------------------------------------------------- quantized weights


def fp8(folder: Path, *, block: tuple[int, int] | None = (32, 32), scales: torch.dtype = torch.float32) -> None:
    """Quantizes the layers' matrices as transformers' finegrained fp8 does."""
    stored = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        if "proj" not in name:
            stored[name] = tensor
            continue
        rows, columns = block or tensor.shape
        tiles = tensor.view(tensor.shape[0] // rows, rows, tensor.shape[1] // columns, columns)
        scale = (
            (tiles.abs().amax(dim=(1, 3)) / 448).log2().ceil().exp2()
        )  # powers of two, which every type of scale holds
        stored[name] = (tiles / scale[:, None, :, None]).to(torch.float8_e4m3fn).view(tensor.shape)
        raw = (scale.log2() + 127).to(torch.uint8) if scales == torch.uint8 else scale.to(scales)
        stored[f"{name}_scale_inv"] = raw if block else raw.view(())
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    quantized_by(folder, "fp8", activation_scheme="dynamic", weight_block_size=block and list(block))


def quantized_by(folder: Path, method: str, **settings: Any) -> None:
    edit_config(folder, quantization_config={"quant_method": method, **settings})


def fp8_in_blocks(folder: Path) -> None:
    fp8(folder)


def fp8_in_shards(folder: Path) -> None:
    """Scales and their weights are in different files."""
    fp8(folder)
    shard(folder)


def fp8_with_bf16_scales(folder: Path) -> None:
    fp8(folder, scales=torch.bfloat16)


def fp8_with_scales_of_one_byte(folder: Path) -> None:
    fp8(folder, scales=torch.float8_e8m0fnu)


def fp8_with_scales_of_activations(folder: Path) -> None:
    """Activations are not quantized here, so their scales are of no use."""
    fp8(folder)
    changed(folder, {"model.layers.0.mlp.up_proj.activation_scale": torch.tensor(0.5)})


def fp8_per_tensor(folder: Path) -> None:
    fp8(folder, block=None)


def bits(folder: Path, **settings: Any) -> None:
    """Quantizes as `from_pretrained(quantization_config=...).save_pretrained(...)` does."""
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**settings))
    model.save_pretrained(folder)


def four_bits(folder: Path) -> None:
    bits(folder, load_in_4bit=True, bnb_4bit_quant_type="nf4")


def four_bits_nested(folder: Path) -> None:
    bits(folder, load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True)


def eight_bits(folder: Path) -> None:
    bits(folder, load_in_8bit=True)


def dequantized(folder: Path) -> torch.Tensor:
    """transformers' own weights of a quantized folder, unpacked."""
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    if settings["quant_method"] == "fp8":
        options = FineGrainedFP8Config(**{**settings, "dequantize": True})
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=options)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).dequantize()
    return logits(model.eval())


PACKED: list[Change] = [
    fp8_in_blocks, fp8_in_shards, fp8_with_bf16_scales, fp8_with_scales_of_one_byte, fp8_with_scales_of_activations, fp8_per_tensor, four_bits, four_bits_nested,
    eight_bits,
]  # fmt: skip


@pytest.mark.parametrize("change", PACKED, ids=lambda change: change.__name__)
def test_quantized_weights_that_are_read(folder: Path, change: Change) -> None:
    before = transformers_own(folder)
    change(folder)
    got = ours(folder)
    torch.testing.assert_close(got, dequantized(folder), rtol=0, atol=1e-6)
    assert 0 < (got - before).abs().max() < 0.2 * before.abs().max()


def test_a_last_block_may_be_a_part_of_one(folder: Path) -> None:
    """As DeepSeek writes them: 64 rows in blocks of 48 have two scales, the second of 16 rows."""
    tensors = load_file(folder / WEIGHTS)
    name = "model.layers.1.self_attn.q_proj.weight"
    scale = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    values = torch.randint(-8, 8, (64, 64)).float()
    tensors |= {name: values.to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    quantized_by(folder, "fp8", weight_block_size=[48, 48])
    rows = torch.tensor([0] * 48 + [1] * 16)
    ((_, got),) = read_tensors(find_model(str(folder)), [name], "fp32")
    assert torch.equal(got, values * scale[rows][:, rows])


def test_caches_of_packed_numbers_are_not_used_for_unpacked_ones(folder: Path) -> None:
    """Nodes and servers keep weights by this digest; older versions kept the packed numbers under the plain one."""
    fp8(folder)
    assert find_model(str(folder)).weights_digest != of_folder(folder, [folder / WEIGHTS]).weights_digest


def renamed(folder: Path, old: str, new: str) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({name.replace(old, new): each for name, each in tensors.items()}, folder / WEIGHTS)


def changed(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(load_file(folder / WEIGHTS) | tensors, folder / WEIGHTS)


def without(folder: Path, *names: str) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({name: each for name, each in tensors.items() if name not in names}, folder / WEIGHTS)


REFUSED_METHODS = (
    "gptq", "awq", "compressed-tensors", "hqq", "torchao", "mxfp4", "nvfp4", "quanto", "aqlm", "eetq", "fbgemm_fp8", "modelopt", "",
)  # fmt: skip


@pytest.mark.parametrize("method", REFUSED_METHODS)
def test_a_quantization_that_is_refused(folder: Path, method: str) -> None:
    quantized_by(folder, method)
    text = refusal(folder)
    assert "quantization_config" in text
    assert repr(method or "(not said)") in text
    assert "unquantized" in text


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json", "hf_quant_config.json"])
def test_a_file_of_a_tool_that_quantizes_is_refused(folder: Path, name: str) -> None:
    (folder / name).write_text("{}", encoding="utf-8")
    assert f"({name})" in refusal(folder)


def fp8_without_its_config(folder: Path) -> None:
    fp8(folder)
    edit_config(folder, quantization_config=None)


def fp8_with_a_lost_scale(folder: Path) -> None:
    fp8(folder)
    without(folder, "model.layers.0.mlp.up_proj.weight_scale_inv")


def fp8_with_scales_of_another_grid(folder: Path) -> None:
    fp8(folder)
    changed(folder, {"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(3, 5)})


def four_bits_with_lost_codes(folder: Path) -> None:
    four_bits(folder)
    without(folder, "model.layers.0.mlp.up_proj.weight.quant_map")


def eight_bits_in_a_gpus_layout(folder: Path) -> None:
    eight_bits(folder)
    changed(folder, {"model.layers.0.mlp.up_proj.weight_format": torch.tensor(2, dtype=torch.uint8)})


def four_bits_stored_as_floats(folder: Path) -> None:
    bits(folder, load_in_4bit=True, bnb_4bit_quant_storage=torch.bfloat16)


def gptq_without_its_config(folder: Path) -> None:
    renamed(folder, "up_proj.weight", "up_proj.qweight")


def mlx(folder: Path) -> None:
    edit_config(folder, quantization={"bits": 4, "group_size": 64})


def whole_numbers(folder: Path) -> None:
    changed(folder, {"model.layers.0.mlp.up_proj.weight": torch.ones(128, 64, dtype=torch.int8)})


def adapter_among_the_weights(folder: Path) -> None:
    changed(folder, {"model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(4, 64)})


def head_of_a_classifier(folder: Path) -> None:
    renamed(folder, "lm_head", "score")


def prefix_of_a_wrapper(folder: Path) -> None:
    renamed(folder, "model.", "module.model.")


def no_head(folder: Path) -> None:
    without(folder, "lm_head.weight")


def no_norm(folder: Path) -> None:
    without(folder, "model.norm.weight")


def bias_that_config_denies(folder: Path) -> None:
    changed(folder, {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)})


def more_layers_than_config(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=1)


def fewer_layers_than_config(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=3)


def table_larger_than_config(folder: Path) -> None:
    edit_config(folder, vocab_size=200)


def unknown_activation(folder: Path) -> None:
    edit_config(folder, hidden_act="swishy")


def padding_outside_the_table(folder: Path) -> None:
    edit_config(folder, pad_token_id=5000)


def own_code(folder: Path) -> None:
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM"})


def own_code_of_a_like_name(folder: Path) -> None:
    edit_config(folder, auto_map={"AutoModelForCausalLM": "org/repo--modeling_llama.LlamaBidirectionalForCausalLM"})


def unknown_architecture(folder: Path) -> None:
    edit_config(folder, model_type="mamba")


def rope_that_depends_on_history(folder: Path) -> None:
    edit_config(folder, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})


def rope_in_the_old_spelling(folder: Path) -> None:
    edit_config(folder, rope_scaling={"type": "dynamic", "factor": 2.0})


def rope_that_nobody_knows(folder: Path) -> None:
    edit_config(folder, rope_parameters={"rope_type": "ntk-by-parts", "factor": 2.0, "rope_theta": 1e4})


def rope_per_kind_of_layer(folder: Path) -> None:
    inner = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    edit_config(folder, rope_parameters={"full_attention": inner, "sliding_attention": {"rope_type": "default"}})


def rope_beside_an_object(folder: Path) -> None:
    edit_config(folder, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "note": {}})


def rope_without_its_factor(folder: Path) -> None:
    edit_config(folder, rope_parameters={"rope_type": "llama3", "rope_theta": 1e4})


def attention_to_later_tokens(folder: Path) -> None:
    edit_config(folder, use_bidirectional_attention=True)


def attention_in_both_directions(folder: Path) -> None:
    edit_config(folder, is_causal=False)


def positions_in_pairs(folder: Path) -> None:
    """As nanotron can train them; transformers passes the key over."""
    edit_config(folder, rope_interleaved=True)


def multipliers_of_another_family(folder: Path) -> None:
    edit_config(folder, embedding_multiplier=12.0)


def positions_in_a_part_of_the_head(folder: Path) -> None:
    edit_config(folder, partial_rotary_factor=0.5)


def positions_in_a_part_of_the_head_as_transformers_5_saves_it(folder: Path) -> None:
    edit_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5})


def a_window_that_is_not_computed(folder: Path) -> None:
    edit_config(folder, sliding_window=8)


def scale_of_another_familys_attention(folder: Path) -> None:
    edit_config(folder, attention_multiplier=0.1)


def layers_without_positions(folder: Path) -> None:
    edit_config(folder, no_rope_layers=[1, 0])


def number_of_layers_as_text(folder: Path) -> None:
    edit_config(folder, num_hidden_layers="2")


def size_that_is_not_said(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["hidden_size"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


REFUSED_MODELS: list[tuple[Change, tuple[str, ...]]] = [
    (fp8_without_its_config, ("no module takes", "weight_scale_inv", "quantization_config")),
    (fp8_with_a_lost_scale, ("model.layers.0.mlp.up_proj.weight", "F8_E4M3")),
    (fp8_with_scales_of_another_grid, ("up_proj.weight_scale_inv", "[3, 5]", "[32, 32]")),
    (four_bits_with_lost_codes, ("up_proj.weight.quant_map", "missing")),
    (eight_bits_in_a_gpus_layout, ("up_proj.weight_format", "layout")),
    (four_bits_stored_as_floats, ("bnb_4bit_quant_storage", "BF16", "'uint8'")),
    (gptq_without_its_config, ("model.layers.0.mlp.up_proj.qweight", "quantized", "unquantized")),
    (mlx, ("MLX", "unquantized")),
    (whole_numbers, ("model.layers.0.mlp.up_proj.weight", "I8", "F32")),
    (adapter_among_the_weights, ("lora_A.weight", "merge_and_unload")),
    (head_of_a_classifier, ("score.weight", "trained head", "AutoModel")),
    (prefix_of_a_wrapper, ("module.model.embed_tokens.weight", "missing are")),
    (no_head, ("missing are lm_head.weight",)),
    (no_norm, ("missing are model.norm.weight",)),
    (bias_that_config_denies, ("no module takes model.layers.0.self_attn.q_proj.bias",)),
    (more_layers_than_config, ("layers up to 1", "config.json 1 layers")),
    (fewer_layers_than_config, ("missing are", "model.layers.2.")),
    (table_larger_than_config, ("model.embed_tokens.weight is [258, 64] and should be [200, 64]",)),
    (unknown_activation, ("config.json", "swishy")),
    (padding_outside_the_table, ("config.json", "cannot be used")),
    (own_code, ("auto_map", "modeling_tiny.TinyForCausalLM")),
    (own_code_of_a_like_name, ("auto_map", "LlamaBidirectionalForCausalLM")),
    (unknown_architecture, ("mamba", "cannot be cut")),
    (rope_that_depends_on_history, ("'dynamic'", "computed before")),
    (rope_in_the_old_spelling, ("'dynamic'",)),
    (rope_that_nobody_knows, ("'ntk-by-parts'", "yarn")),
    (rope_per_kind_of_layer, ("'dynamic'",)),
    (rope_beside_an_object, ("'dynamic'",)),
    (attention_to_later_tokens, ("use_bidirectional_attention = True", "False alone")),
    (attention_in_both_directions, ("is_causal = False", "True alone")),
    (positions_in_pairs, ("rope_interleaved = True", "'llama'")),
    (multipliers_of_another_family, ("embedding_multiplier = 12.0", "'llama'")),
    (positions_in_a_part_of_the_head, ("partial_rotary_factor = 0.5",)),
    (
        positions_in_a_part_of_the_head_as_transformers_5_saves_it,
        ("rope_parameters.partial_rotary_factor = 0.5", "'llama'"),
    ),
    (a_window_that_is_not_computed, ("sliding_window = 8", "'llama'")),
    (scale_of_another_familys_attention, ("attention_multiplier = 0.1",)),
    (layers_without_positions, ("no_rope_layers = [1, 0]",)),
    (number_of_layers_as_text, ("num_hidden_layers", "'2'")),
    (size_that_is_not_said, ("hidden_size", "says nothing")),
    (rope_without_its_factor, ("config.json", "KeyError")),
]


@pytest.mark.parametrize(("change", "words"), REFUSED_MODELS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_model_that_is_refused(folder: Path, change: Change, words: tuple[str, ...]) -> None:
    change(folder)
    text = refusal(folder)
    assert str(folder) in text
    assert all(word in text for word in words), text


# ---------------------------------------------------------------- configs and tensors that are read


def rope(folder: Path, kind: str, **settings: Any) -> None:
    edit_config(folder, rope_parameters={"rope_type": kind, "rope_theta": 1e4, **settings}, max_position_embeddings=16)


def rope_default(folder: Path) -> None:
    rope(folder, "default")


def rope_linear(folder: Path) -> None:
    rope(folder, "linear", factor=4.0)


def rope_linear_in_the_old_spelling(folder: Path) -> None:
    edit_config(folder, rope_parameters=None, rope_scaling={"type": "linear", "factor": 4.0}, rope_theta=5e3)


def rope_llama3(folder: Path) -> None:
    given = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    rope(folder, "llama3", **given)


def rope_yarn(folder: Path) -> None:
    rope(folder, "yarn", factor=4.0, original_max_position_embeddings=16)


def rope_longrope(folder: Path) -> None:
    half = 8
    short, long = [1.0 + n / 9 for n in range(half)], [2.0 + n for n in range(half)]
    rope(folder, "longrope", factor=4.0, short_factor=short, long_factor=long, original_max_position_embeddings=64)


def rope_proportional(folder: Path) -> None:
    rope(folder, "proportional", partial_rotary_factor=0.5)


def tied_and_stored_once(folder: Path) -> None:
    without(folder, "lm_head.weight")
    edit_config(folder, tie_word_embeddings=True)


def tied_and_stored_as_the_head(folder: Path) -> None:
    without(folder, "model.embed_tokens.weight")
    edit_config(folder, tie_word_embeddings=True)


def tied_and_stored_twice(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    changed(folder, {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    edit_config(folder, tie_word_embeddings=True)


def tied_with_a_head_of_its_own(folder: Path) -> None:
    """transformers 5 believes the files."""
    edit_config(folder, tie_word_embeddings=True)


def tied_or_not_is_not_said(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def padded_table(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    changed(folder, {name: torch.cat([tensors[name], torch.zeros(62, 64)]) for name in names})
    edit_config(folder, vocab_size=320)


def tables_that_are_computed(folder: Path) -> None:
    """Old Llama files have one per layer."""
    changed(folder, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.randn(8)})


def half_and_double_precision(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    up, down = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
    changed(folder, {up: tensors[up].half(), down: tensors[down].double()})


def without_its_prefix(folder: Path) -> None:
    without(folder, "lm_head.weight")
    renamed(folder, "model.", "")
    edit_config(folder, tie_word_embeddings=True)


def code_that_transformers_has_too(folder: Path) -> None:
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"})


def keys_that_change_nothing(folder: Path) -> None:
    edit_config(
        folder,
        use_cache=False,
        torch_dtype="bfloat16",
        pretraining_tp=2,
        attention_dropout=0.3,
        unsloth_fixed=True,
        rope_interleaved=False,
        embedding_multiplier=1.0,
    )


READ_MODELS: list[Change] = [
    rope_default, rope_linear, rope_linear_in_the_old_spelling, rope_llama3, rope_yarn, rope_longrope, rope_proportional, tied_and_stored_once,
    tied_and_stored_as_the_head, tied_and_stored_twice, tied_with_a_head_of_its_own, tied_or_not_is_not_said, padded_table,
    tables_that_are_computed, half_and_double_precision, without_its_prefix, code_that_transformers_has_too,
    keys_that_change_nothing,
]  # fmt: skip


@pytest.mark.parametrize("change", READ_MODELS, ids=lambda change: change.__name__)
def test_a_model_that_is_read(folder: Path, change: Change) -> None:
    change(folder)
    assert torch.equal(ours(folder), transformers_own(folder))


@pytest.mark.parametrize("base", ["bf16", "int8", "nf4"])
@torch.no_grad()
def test_unpacked_weights_are_packed_again_as_the_base_says(folder: Path, tmp_path: Path, base: str) -> None:
    fp8(folder)
    load_whole(find_model(str(folder)), "fp32").save_pretrained(tmp_path / "unpacked")
    unpacked = logits(load_whole(find_model(str(tmp_path / "unpacked")), base))
    spans = [Span(0, 1, embed=True), Span(1, 1), Span(1, 2, head=True)]
    hidden = IDS
    for stage in load_stages(find_model(str(folder)), spans, base, None):
        hidden = stage(hidden, [IDS.shape[1]])
    assert torch.equal(hidden, unpacked)


@pytest.mark.parametrize(
    "change", [fp8_in_blocks, four_bits, tied_with_a_head_of_its_own], ids=lambda each: each.__name__
)
def test_a_model_that_is_saved_again_says_what_it_is(folder: Path, tmp_path: Path, change: Change) -> None:
    """As in `edgelam export --to merged`: the config that was read speaks of other files."""
    change(folder)
    whole = load_whole(find_model(str(folder)), "fp32")
    whole.save_pretrained(tmp_path / "saved")
    assert torch.equal(transformers_own(tmp_path / "saved"), logits(whole))
    written = json.loads((tmp_path / "saved" / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in written
    assert not written["tie_word_embeddings"]


# ---------------------------------------------------------------- other architectures


def sizes(**more: Any) -> dict[str, Any]:
    return dict(
        vocab_size=258, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, eos_token_id=1, bos_token_id=None, pad_token_id=None, **more,
    )  # fmt: skip


def gpt2(folder: Path) -> None:
    """As old files have it: masks are stored, and names lack the prefix."""
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=258, n_positions=64, n_embd=16, n_layer=2, n_head=2)).save_pretrained(folder)
    renamed(folder, "transformer.", "")
    masks = {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    changed(folder, masks)


def test_an_old_gpt2_is_read(tmp_path: Path) -> None:
    gpt2(tmp_path)
    assert torch.equal(ours(tmp_path), transformers_own(tmp_path))


def bert(folder: Path, kind: type[Any] = BertForPreTraining, **settings: Any) -> None:
    torch.manual_seed(0)
    config = BertConfig(**{**sizes(max_position_embeddings=64), "num_key_value_heads": None}, **settings)
    kind(config).save_pretrained(folder)


@torch.no_grad()
def test_a_bert_with_the_heads_of_its_pretraining_is_read(tmp_path: Path) -> None:
    bert(tmp_path)
    changed(tmp_path, {"bert.embeddings.position_ids": torch.arange(64)[None]})
    source = find_model(str(tmp_path))
    assert not [name for name in source.index if not name.startswith("bert.") or "position_ids" in name]
    (stage,) = load_stages(source, [Span(0, 2, embed=True, head=True)], "fp32", None, classes=3)
    own = BertModel.from_pretrained(tmp_path).eval()
    encoder: Any = stage.model.get_submodule("bert")
    assert torch.equal(encoder(input_ids=IDS).pooler_output, own(input_ids=IDS).pooler_output)


def trained_for_classes(folder: Path) -> None:
    bert(folder, BertForSequenceClassification, num_labels=3)


def trained_for_answers(folder: Path) -> None:
    bert(folder, BertForQuestionAnswering)


def without_its_pooler(folder: Path) -> None:
    bert(folder, BertForMaskedLM)


def with_relative_positions(folder: Path) -> None:
    bert(folder)
    edit_config(folder, position_embedding_type="relative_key")


def with_attention_to_an_encoder(folder: Path) -> None:
    bert(folder)
    edit_config(folder, is_decoder=True, add_cross_attention=True)


def with_fewer_positions(folder: Path) -> None:
    bert(folder)
    edit_config(folder, max_position_embeddings=32)


REFUSED_BERTS: list[tuple[Change, tuple[str, ...]]] = [
    (trained_for_classes, ("classifier.weight", "trained head would be lost", "AutoModel")),
    (trained_for_answers, ("qa_outputs.weight", "trained head would be lost")),
    (
        without_its_pooler,
        (
            "AutoModel.from_pretrained(FOLDER)",
            "missing are bert.pooler.dense",
        ),
    ),
    (with_relative_positions, ("position_embedding_type = 'relative_key'", "'absolute'")),
    (with_attention_to_an_encoder, ("add_cross_attention",)),
    (with_fewer_positions, ("position_embeddings.weight is [64, 16] and should be [32, 16]",)),
]


@pytest.mark.parametrize(("change", "words"), REFUSED_BERTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_bert_that_is_refused(tmp_path: Path, change: Change, words: tuple[str, ...]) -> None:
    change(tmp_path)
    text = refusal(tmp_path)
    assert all(word in text for word in words), text


# ---------------------------------------------------------------- limits of a model, held against a run file


@dataclass(frozen=True)
class Sized:
    """A model of few positions."""

    config: Any
    overrides: tuple[str, ...] = ()


LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 64,
}  # fmt: skip
BERT = ("task.kind=classification", 'task.classes=["a", "b"]', 'lora.targets=["query"]')
LIMITED: dict[str, tuple[Sized, str]] = {
    "learned, GPT-2": (
        Sized(GPT2Config(vocab_size=258, n_positions=64, n_embd=16, n_layer=2, n_head=2, eos_token_id=1, bos_token_id=1)),
        "has 64 rows",
    ),
    "learned, BERT": (
        Sized(BertConfig(**{**sizes(max_position_embeddings=64), "num_key_value_heads": None}), BERT),
        "has 64 rows",
    ),
    "rotary": (Sized(LlamaConfig(**sizes(max_position_embeddings=64))), "made for 64 positions"),
    "longrope": (
        Sized(LlamaConfig(**sizes(max_position_embeddings=256, rope_parameters=LONGROPE))),
        "original_max_position_embeddings = 64",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", LIMITED)
def test_texts_longer_than_the_models_positions_are_refused(kind: str, plain: Path, tmp_path: Path) -> None:
    sized, words = LIMITED[kind]
    shutil.copytree(plain, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    is_bert = isinstance(sized.config, BertConfig)
    model = BertModel(sized.config) if is_bert else AutoModelForCausalLM.from_config(sized.config)
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    source = find_model(str(tmp_path))
    check_limits(run_config(str(tmp_path), "task.max_tokens=64"), source)
    config = run_config(str(tmp_path), *sized.overrides, "task.max_tokens=65")
    for refused in (lambda: check_config(config), lambda: explained(config)):
        with pytest.raises(ModelError) as caught:
            refused()
        text = str(caught.value)
        assert "task.max_tokens = 65" in text
        assert words in text
        assert "at most 64" in text
    run_file = tmp_path / "new.toml"
    write_run_file(run_file, [], str(tmp_path))
    assert read_run_file(run_file).task.max_tokens == 64


def one_token_more(folder: Path) -> None:
    """As after add_tokens without resize_token_embeddings."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 258, "content": "<|new|>"})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")


def end_outside_the_table(folder: Path) -> None:
    edit_config(folder, eos_token_id=[1, 700])


def end_of_generation_outside_the_table(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": 701}', encoding="utf-8")


def tokenizer_cut_short(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0", "mod', encoding="utf-8")


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def tokenizer_that_runs_code(folder: Path) -> None:
    (folder / "tokenization_own.py").write_text("raise SystemExit('run')", encoding="utf-8")
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings |= {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def tokenizer_of_a_newer_version(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["type"] = "BPE2"
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")


def tokenizer_of_something_else(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": [], "added_tokens": {}}', encoding="utf-8")


OUTSIDE: list[tuple[Change, tuple[str, ...]]] = [
    (one_token_more, ("'<|new|>' the id 258", "258 rows", "resize_token_embeddings")),
    (end_outside_the_table, ("eos_token_id = 700", "config.json", "258 rows")),
    (end_of_generation_outside_the_table, ("eos_token_id = 701", "generation_config.json")),
    (no_tokenizer, ("tokenizer", "cannot be loaded", "tokenizer.json")),
    (tokenizer_that_runs_code, ("code of its own, which is not run", "auto_map in tokenizer_config.json")),
    (tokenizer_cut_short, ("tokenizer", "cannot be loaded")),
    (tokenizer_of_a_newer_version, ("cannot be loaded", "untagged enum")),
    (tokenizer_of_something_else, ("tokenizer", "cannot be loaded")),
]


@pytest.mark.parametrize(("change", "words"), OUTSIDE, ids=lambda value: getattr(value, "__name__", ""))
def test_tokens_without_a_row_in_the_table_are_refused(folder: Path, change: Change, words: tuple[str, ...]) -> None:
    change(folder)
    with pytest.raises(ModelError) as caught:
        check_limits(run_config(str(folder)), find_model(str(folder)))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_token_of_images_needs_no_row(folder: Path) -> None:
    """As in Gemma 3's text models, whose tokenizer they share with those that see."""
    one_token_more(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")) | {"image_token": "<|new|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    check_limits(run_config(str(folder)), find_model(str(folder)))


def test_a_token_of_images_in_a_text_is_named(plain: Path) -> None:
    (stage,) = load_stages(find_model(str(plain)), [Span(0, 2, embed=True, head=True)], "fp32", None)
    with pytest.raises(ModelError, match="the token 258, and the model's table of tokens has 258 rows"):
        stage(torch.tensor([[3, 258]]), [2])


def test_a_tokenizer_in_older_files_is_counted(tmp_path: Path) -> None:
    bert(tmp_path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{number}" for number in range(253))]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    assert last_token(find_model(str(tmp_path))) == ("word252", 257)
    (tmp_path / "vocab.txt").write_text("\n".join([*words, "more"]), encoding="utf-8")
    with pytest.raises(ModelError, match="'more' the id 258"):
        check_tokens(find_model(str(tmp_path)))


# ---------------------------------------------------------------- every command fails alike


def test_every_command_refuses_a_model_that_is_here_and_not_understood(folder: Path, tmp_path: Path) -> None:
    lost_shard(folder)
    lost = "model-00002-of-00004.safetensors"
    for refused in (
        lambda: explained(run_config(str(folder))),
        lambda: write_run_file(tmp_path / "new.toml", [], str(folder)),
        lambda: check_config(run_config(str(folder))),
    ):
        with pytest.raises(ModelError, match=lost):
            refused()
    assert not (tmp_path / "new.toml").exists()
    finding = check_model(str(folder))
    assert finding.state == "problem"
    assert lost in finding.found


def test_a_model_that_is_elsewhere_is_explained() -> None:
    assert "org/elsewhere" in explained(run_config("org/elsewhere"))


def test_a_file_of_a_model_is_not_a_model(plain: Path) -> None:
    assert f"perhaps {plain}" in refusal(plain / WEIGHTS)


# ---------------------------------------------------------------- a model of the hub


class Hub:
    """Stands in for snapshot_download: a repository's files, of which a cache may have only some."""

    def __init__(self, cached: Path, complete: Path) -> None:
        self.cached, self.complete, self.patterns = cached, complete, dict[str, Any]()

    def __call__(self, name: str, *, local_files_only: bool, **patterns: Any) -> str:
        self.patterns = patterns
        return str(self.cached if local_files_only else self.complete)


REPOSITORY = {
    "config.json": True, "generation_config.json": True, INDEX: True, "model-00001-of-00002.safetensors": True,
    "tokenizer.json": True, "tokenizer_config.json": True, "vocab.txt": True, "merges.txt": True, "tokenizer.model": True,
    "chat_template.jinja": True, "additional_chat_templates/tools.jinja": True, "adapter_config.json": True,
    "consolidated.safetensors": False, "consolidated-00001.safetensors": False, "original/model.safetensors": False,
    "adapter_model.safetensors": False, "pytorch_model.bin": False, "model.onnx": False, "optimizer.pt": False,
}  # fmt: skip


def test_of_a_repository_what_counts_is_fetched(monkeypatch: pytest.MonkeyPatch, plain: Path) -> None:
    hub = Hub(plain, plain)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    assert find_model("org/model").folder == plain
    fetched = set(huggingface_hub.utils.filter_repo_objects(REPOSITORY, **hub.patterns))
    assert fetched == {file for file, counts in REPOSITORY.items() if counts}


def test_a_repository_of_which_the_cache_has_a_part_is_elsewhere(
    monkeypatch: pytest.MonkeyPatch, plain: Path, folder: Path
) -> None:
    """As after AutoTokenizer.from_pretrained: --explain does not download, and does not hold it against the model."""
    (folder / WEIGHTS).unlink()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Hub(folder, plain))
    with pytest.raises(ModelNotFound, match="the hub was not asked"):
        find_model("org/model", download=False)
    assert "org/model" in explained(run_config("org/model"))
    assert find_model("org/model").folder == plain


def test_a_phi3_that_does_not_say_its_original_length_has_transformers_own(tmp_path: Path) -> None:
    """transformers takes 4096, and not the number of extended positions."""
    half = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = Phi3Config(
        **sizes(max_position_embeddings=8192), rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **half}
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    for place in (written, written["rope_parameters"]):
        place.pop("original_max_position_embeddings", None)
    (tmp_path / "config.json").write_text(json.dumps(written), encoding="utf-8")
    own = AutoConfig.from_pretrained(tmp_path).original_max_position_embeddings
    assert positions_of(find_model(str(tmp_path))).most == own == 4096
