"""Slices read from safetensors and GGUF, and the converted parts in the cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from edgelam_fl.errors import ModelError
from edgelam_fl.model.quantized import QUANTIZED
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.model.weights import read_tensors
from tests.fleet import plain_base
from tests.support import write_tiny_llama

LAYER = "model.layers.3."


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGELAM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def parts(cache: Path) -> list[str]:
    return sorted(f"{file.parent.name}/{file.name}" for file in cache.glob("models/*/*/*.safetensors"))


def stamps(cache: Path) -> list[tuple[int, int]]:
    """Lists which files lie in the cache: whoever converts a part again puts another file in its place."""
    return [(file.stat().st_ino, file.stat().st_mtime_ns) for file in sorted(cache.glob("models/*/*/*.safetensors"))]


def names_of_layer(source: ModelSource) -> list[str]:
    return sorted(name for name in source.index if name.startswith(LAYER))


@pytest.mark.real_model
def test_a_layer_of_the_real_gguf_is_transformers_own(smollm: ModelSource, cache: Path) -> None:
    """smollm is a session's fixture: its index is unpacked already, its weights are converted here anew."""
    assert smollm.gguf is not None
    got = dict(read_tensors(smollm, names_of_layer(smollm), "fp32"))
    assert parts(cache) == ["fp32/layer-003.safetensors"], "more than the slice was converted"
    reference = plain_base(smollm.folder, smollm.gguf, "fp32").state_dict()
    assert len(got) == 9
    for name, tensor in got.items():
        assert torch.equal(tensor, reference[name]), name
    embedding = "model.embed_tokens.weight"
    assert torch.equal(dict(read_tensors(smollm, [embedding], "fp32"))[embedding], reference[embedding])
    assert parts(cache) == ["fp32/ends.safetensors", "fp32/layer-003.safetensors"]


def test_only_the_slices_parts_are_converted_and_once(tiny: ModelSource, cache: Path) -> None:
    first = dict(read_tensors(tiny, names_of_layer(tiny), "bf16"))
    assert parts(cache) == ["bf16/layer-003.safetensors"]
    converted = stamps(cache)
    second = dict(read_tensors(tiny, names_of_layer(tiny), "bf16"))
    assert stamps(cache) == converted, "converted again"
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert {tensor.dtype for tensor in first.values()} == {torch.bfloat16}


def test_what_lies_as_wanted_is_not_copied(tiny: ModelSource, cache: Path) -> None:
    assert len(dict(read_tensors(tiny, names_of_layer(tiny), "fp32"))) == 9
    assert parts(cache) == []


def test_the_cache_does_not_mix_up_models_of_one_form(tmp_path: Path) -> None:
    name = f"{LAYER}mlp.up_proj.weight"
    one, other = (find_model(str(write_tiny_llama(tmp_path / str(seed), layers=4, seed=seed))) for seed in (1, 2))
    for source in (one, other):
        (plain,), (read,) = (dict(read_tensors(source, [name], base)).values() for base in ("fp32", "bf16"))
        assert torch.equal(read, plain.to(torch.bfloat16)), f"the weights of {source.name} are another model's"


COMPUTE = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize(("base", "packed"), [("int8", torch.int8), ("nf4", torch.uint8)])
def test_quantized_bases_are_for_the_layers_matrices_only(
    tiny: ModelSource, base: str, packed: torch.dtype, compute: str
) -> None:
    got = dict(read_tensors(tiny, [*names_of_layer(tiny), "model.embed_tokens.weight"], base, compute))
    matrices = {name for name in got if "proj.weight" in name and not name.endswith("_scale")}
    assert len(matrices) == 7
    assert {name for name in got if name.endswith("_scale")} == {f"{name}_scale" for name in matrices}
    assert {got[name].dtype for name in matrices} == {packed}
    assert {got[f"{name}_scale"].dtype for name in matrices} == {torch.float32}
    assert got[f"{LAYER}input_layernorm.weight"].dtype == COMPUTE[compute]
    assert got["model.embed_tokens.weight"].dtype == COMPUTE[compute]


def test_parts_are_kept_by_base_and_compute_and_ends_by_compute(tiny: ModelSource, cache: Path) -> None:
    names = [f"{LAYER}mlp.up_proj.weight", "model.embed_tokens.weight"]
    for base, compute in [("int8", "float32"), ("int8", "bfloat16"), ("nf4", "bfloat16"), ("bf16", "")]:
        dict(read_tensors(tiny, names, base, compute))
    layers = ["bf16/ends", "bf16/layer-003", "int8-bf16/layer-003", "int8-fp32/layer-003", "nf4-bf16/layer-003"]
    assert parts(cache) == [f"{part}.safetensors" for part in layers]


def test_matrices_that_lie_input_first_are_quantized_by_output(tmp_path: Path) -> None:
    """GPT-2's Conv1D."""
    model = GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=50, n_positions=16, bos_token_id=1, eos_token_id=1)
    )
    model.save_pretrained(tmp_path / "gpt2")
    source = find_model(str(tmp_path / "gpt2"))
    name = "transformer.h.0.attn.c_attn.weight"
    plain = model.state_dict()[name]
    assert plain.shape == (32, 96)
    for base, kind in QUANTIZED.items():
        got = dict(read_tensors(source, [name], base))
        want = kind.quantize(plain.t().contiguous())
        assert torch.equal(got[name], want[0])
        assert torch.equal(got[f"{name}_scale"], want[1])


def test_a_tensor_that_is_not_there(tiny: ModelSource) -> None:
    with pytest.raises(ModelError, match=r"has no tensor model\.layers\.9\.x"):
        list(read_tensors(tiny, ["model.layers.9.x"], "fp32"))
