"""Slices read from safetensors and GGUF, the converted parts in the cache, and the int8 base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from edgelam_fl.errors import ModelError
from edgelam_fl.model import weights
from edgelam_fl.model.quantized import Int8Linear, quantize_rows
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.model.weights import read_tensors
from tests.support import write_tiny_llama

LAYER = "model.layers.3."


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGELAM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def parts(cache: Path) -> list[str]:
    return sorted(f"{file.parent.name}/{file.name}" for file in cache.glob("models/*/*/*.safetensors"))


def names_of_layer(source: ModelSource) -> list[str]:
    return sorted(name for name in source.index if name.startswith(LAYER))


@pytest.mark.real_model
def test_a_layer_of_the_real_gguf_is_transformers_own(smollm: ModelSource, cache: Path) -> None:
    """smollm is a session's fixture: its index is unpacked already, its weights are converted here anew."""
    assert smollm.gguf is not None
    got = dict(read_tensors(smollm, names_of_layer(smollm), "fp32"))
    assert parts(cache) == ["fp32/layer-003.safetensors"], "more than the slice was converted"
    model = AutoModelForCausalLM.from_pretrained(smollm.gguf.parent, gguf_file=smollm.gguf.name, dtype=torch.float32)
    reference = model.state_dict()
    assert len(got) == 9
    for name, tensor in got.items():
        assert torch.equal(tensor, reference[name]), name
    embedding = "model.embed_tokens.weight"
    assert torch.equal(dict(read_tensors(smollm, [embedding], "fp32"))[embedding], reference[embedding])
    assert parts(cache) == ["fp32/ends.safetensors", "fp32/layer-003.safetensors"]


def test_only_the_slices_parts_are_converted_and_once(
    tiny: ModelSource, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = dict(read_tensors(tiny, names_of_layer(tiny), "bf16"))
    assert parts(cache) == ["bf16/layer-003.safetensors"]
    monkeypatch.setattr(weights, "_convert_part", lambda *_: pytest.fail("converted again"))
    second = dict(read_tensors(tiny, names_of_layer(tiny), "bf16"))
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


def test_int8_is_for_the_layers_matrices_only(tiny: ModelSource) -> None:
    got = dict(read_tensors(tiny, [*names_of_layer(tiny), "model.embed_tokens.weight"], "int8"))
    matrices = {name for name in got if "proj.weight" in name and not name.endswith("_scale")}
    assert len(matrices) == 7
    assert {name for name in got if name.endswith("_scale")} == {f"{name}_scale" for name in matrices}
    assert {got[name].dtype for name in matrices} == {torch.int8}
    assert got[f"{LAYER}input_layernorm.weight"].dtype == torch.float32
    assert got["model.embed_tokens.weight"].dtype == torch.float32


def test_a_tensor_that_is_not_there(tiny: ModelSource) -> None:
    with pytest.raises(ModelError, match=r"has no tensor model\.layers\.9\.x"):
        list(read_tensors(tiny, ["model.layers.9.x"], "fp32"))


# ---------------------------------------------------------------- int8


@pytest.mark.parametrize("magnitude", [1.0, 1e-8, 1e6])
def test_each_rows_error_is_at_most_half_its_scale(magnitude: float) -> None:
    weight = magnitude * torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    weight[3] *= 1e-4  # its own scale, not its neighbours'
    q, scale = quantize_rows(weight)
    assert torch.equal(scale, weight.abs().amax(dim=1) / 127)
    assert int(q.abs().max()) == 127
    error = (q.double() * scale.double()[:, None] - weight.double()).abs()
    assert bool((error <= scale.double()[:, None] / 2 * (1 + 1e-5)).all())


def test_a_row_of_zeros_and_one_of_1e_8() -> None:
    q, scale = quantize_rows(torch.stack([torch.zeros(4), torch.full((4,), 1e-8)]))
    assert q.tolist() == [[0] * 4, [127] * 4]
    assert scale[0] == 1
    assert float(scale[1]) == pytest.approx(1e-8 / 127)


@pytest.mark.parametrize("bias", [True, False])
def test_int8_linear_is_the_dequantized_linear(bias: bool) -> None:
    torch.manual_seed(1)
    linear = nn.Linear(24, 10, bias=bias).requires_grad_(False)
    q, scale = quantize_rows(linear.weight)
    small = Int8Linear(linear)
    state = {"weight": q, "weight_scale": scale} | ({"bias": linear.bias} if bias else {})
    small.load_state_dict(state, assign=True)
    linear.weight.copy_(q.float() * scale[:, None])
    inputs = [torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(2), requires_grad=True) for _ in range(2)]
    outputs = [module(x) for module, x in zip((small, linear), inputs, strict=True)]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    for output in outputs:
        (output**2).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-5, atol=1e-4)
    assert small.weight.grad is None
