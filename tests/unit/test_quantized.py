"""int8 and nf4: how far the quantized weights may be off, and layers that compute with them."""

from __future__ import annotations

from threading import Thread

import pytest
import torch
from bitsandbytes.functional import get_4bit_type
from torch import nn
from transformers.pytorch_utils import Conv1D

from edgelam_fl.model.quantized import (
    QUANTIZED,
    Int8Linear,
    Nf4Linear,
    QuantizedLinear,
    dequantize_nf4,
    quantize_layer,
    quantize_nf4,
    quantize_rows,
)

NF4_VALUES = get_4bit_type("nf4", device="cpu")  # 16 of them, from -1 to 1
WIDEST_GAP = float((NF4_VALUES[1:] - NF4_VALUES[:-1]).max())


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("magnitude", [1.0, 1e-8, 1e6])
def test_int8_is_off_by_half_its_rows_scale_at_most(magnitude: float) -> None:
    weight = magnitude * normal(16, 64)
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


# (4, 96) and (5, 32) have rows that are not a whole number of blocks, (3, 65) has a last block that is not full.
@pytest.mark.parametrize("shape", [(16, 64), (4, 96), (5, 32), (3, 65), (1, 7), (600, 512)])
@pytest.mark.parametrize("magnitude", [1.0, 1e-8, 1e6])
def test_nf4_is_off_by_half_the_widest_gap_of_its_blocks_scale_at_most(
    shape: tuple[int, int], magnitude: float
) -> None:
    weight = magnitude * normal(*shape)
    weight[0] *= 1e-4
    packed, scale = quantize_nf4(weight)
    blocks = -(weight.numel() // -64)
    assert packed.shape == (blocks, 32)
    assert packed.dtype == torch.uint8
    padded = nn.functional.pad(weight.flatten(), (0, 64 * blocks - weight.numel())).view(blocks, 64)
    assert torch.equal(scale, padded.abs().amax(dim=1))
    error = (dequantize_nf4(packed, scale, shape, torch.float32) - weight).abs()
    allowed = WIDEST_GAP / 2 * scale.repeat_interleave(64)[: weight.numel()].view(shape)
    assert bool((error <= allowed * (1 + 1e-5)).all())


def test_nf4_keeps_its_own_values_and_zeros() -> None:
    weight = torch.stack([3 * NF4_VALUES.repeat(4), torch.zeros(64), 1e-8 * NF4_VALUES.repeat(4)])
    packed, scale = quantize_nf4(weight)
    assert torch.equal(scale, torch.tensor([3.0, 0.0, 1e-8]))
    assert torch.equal(dequantize_nf4(packed, scale, (3, 64), torch.float32), weight)


def test_nf4_in_bf16_is_the_fp32_weight_within_one_rounding() -> None:
    packed, scale = quantize_nf4(normal(10, 192))
    fine, coarse = (dequantize_nf4(packed, scale, (10, 192), dtype) for dtype in (torch.float32, torch.bfloat16))
    assert coarse.dtype == torch.bfloat16
    assert bool(((coarse.float() - fine).abs() <= 2**-7 * fine.abs()).all())


@pytest.mark.parametrize("quantize", [quantize_rows, quantize_nf4])
def test_a_matrix_is_quantized_alone(quantize: object) -> None:
    """Twice in a row and from another place in memory: the same bits."""
    weight = normal(24, 320)
    copy = torch.cat([torch.zeros(7), weight.flatten()])[7:].view(24, 320)
    for left, right in zip(quantize(weight), quantize(copy), strict=True):  # type: ignore[operator]
        assert torch.equal(left, right)


def dequantized(layer: QuantizedLinear) -> torch.Tensor:
    if isinstance(layer, Int8Linear):
        return layer.weight.float() * layer.weight_scale[:, None]
    assert isinstance(layer, Nf4Linear)
    return dequantize_nf4(layer.weight, layer.weight_scale, (layer.out_features, layer.in_features), torch.float32)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("base", QUANTIZED)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_quantized_layer_is_the_linear_one_of_its_weights(
    base: str, bias: bool, dtype: torch.dtype, tolerance: float
) -> None:
    weight, shift = normal(10, 24), normal(10, seed=3)
    small = QUANTIZED[base].from_weight(weight)
    if bias:
        small.bias = nn.Parameter(shift.to(dtype), requires_grad=False)
    plain = nn.Linear(24, 10, bias=bias).requires_grad_(False)
    plain.load_state_dict({"weight": dequantized(small)} | ({"bias": shift} if bias else {}))
    inputs = [normal(2, 5, 24, seed=2).to(kind).requires_grad_() for kind in (torch.float32, dtype)]
    outputs = [module(x) for module, x in zip((plain, small), inputs, strict=True)]
    for output in outputs:
        (output**2).sum().backward()
    assert outputs[1].dtype == dtype
    for want, got in [[output.detach() for output in outputs], [x.grad for x in inputs]]:
        assert float((got.float() - want).norm()) < tolerance * float(want.norm())
    assert small.weight.grad is None


@pytest.mark.parametrize("base", QUANTIZED)
def test_nothing_dequantized_is_kept_for_the_backward(base: str) -> None:
    layer = QUANTIZED[base].from_weight(normal(64, 64))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(normal(3, 64).requires_grad_())
    own = {layer.weight.data_ptr(), layer.weight_scale.data_ptr()}
    assert {tensor.data_ptr() for tensor in kept} == own


@pytest.mark.parametrize("base", QUANTIZED)
def test_linear_layers_of_both_layouts_are_replaced(base: str) -> None:
    with torch.device("meta"):
        block = nn.Sequential(nn.Linear(24, 10), nn.ReLU(), nn.Sequential(Conv1D(12, 10)), nn.LayerNorm(12))
    quantize_layer(block, base, None)
    layers = [module for module in block.modules() if isinstance(module, nn.Linear)]
    assert [type(layer) for layer in layers] == [QUANTIZED[base]] * 2
    assert [(layer.out_features, layer.in_features) for layer in layers] == [(10, 24), (12, 10)]
    for layer in layers:
        packed, scale = QUANTIZED[base].quantize(normal(layer.out_features, layer.in_features))
        assert (layer.weight.shape, layer.weight.dtype) == (packed.shape, packed.dtype)
        assert layer.weight_scale.shape == scale.shape
        assert layer.weight.device.type == "meta"


def test_threads_do_not_share_the_memory_of_dequantized_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one thread has dequantized and not multiplied yet, another computes with other weights."""
    one, other = Int8Linear.from_weight(normal(8, 16)), Int8Linear.from_weight(normal(8, 16, seed=2))
    x, multiply = normal(3, 16), nn.functional.linear
    expected = one(x)

    def beside(*arguments: torch.Tensor) -> torch.Tensor:
        monkeypatch.undo()
        thread = Thread(target=other, args=(x,))
        thread.start()
        thread.join()
        return multiply(*arguments)

    monkeypatch.setattr(nn.functional, "linear", beside)
    assert torch.equal(one(x), expected)
    assert nn.functional.linear is multiply, "the other thread has computed"
