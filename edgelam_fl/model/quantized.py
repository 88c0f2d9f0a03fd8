"""Frozen linear layers with quantized weights: int8 with one scale per row, nf4 with one scale per block of 64 weights.

Each matrix is quantized on its own, so the numbers of a slice are those of the whole model. Forward and backward dequantize for
one product and keep no dequantized copy. Knows no files; peft wraps these layers like any `nn.Linear`.

Shapes: O out features, I in features, N blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

BLOCK = 64  # weights that share one scale in nf4
_CHUNK_BLOCKS = (
    4096  # quantized at a time: the library's intermediate tensors are several times as large as the weights
)


def quantize_rows(weight_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes each row by its absolute maximum: int8 [out, in] and fp32 scale [out]. A row of zeros gets scale 1."""
    absmax_O = weight_OI.float().abs().amax(dim=1)
    scale_O = torch.where(absmax_O > 0, absmax_O / 127, torch.ones_like(absmax_O))
    return torch.round(weight_OI.float() / scale_O[:, None]).to(torch.int8), scale_O


def quantize_nf4(weight_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes to bitsandbytes' nf4: uint8 [N, 32], two weights per byte, and fp32 scale [N], the largest magnitude per block.

    Blocks follow the matrix row by row; the last block is padded with zeros.
    """
    from bitsandbytes.functional import quantize_4bit

    flat = weight_OI.reshape(-1)
    flat = functional.pad(flat, (0, -flat.numel() % BLOCK))
    packed, scales = [], []
    for chunk in flat.view(-1, BLOCK).split(_CHUNK_BLOCKS):
        q, state = quantize_4bit(chunk.float(), blocksize=BLOCK, quant_type="nf4")
        packed.append(q.view(-1, BLOCK // 2))
        scales.append(state.absmax)
    return torch.cat(packed), torch.cat(scales)


def dequantize_nf4(
    packed: torch.Tensor, scale_N: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """Returns the weights [out, in] that `quantize_nf4` packed."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    # One block per row: the CPU kernel of bitsandbytes 0.50 reads wrong scales unless rows are a whole number of blocks.
    blocks = torch.Size((len(scale_N), BLOCK))
    state = QuantState(scale_N, shape=blocks, blocksize=BLOCK, quant_type="nf4", dtype=dtype)
    weights = dequantize_4bit(packed.view(-1, 1), state).view(-1)
    return weights[: shape[0] * shape[1]].view(shape)


class _Int8Product(torch.autograd.Function):
    """Computes y = (x q^T) * scale."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, q_OI: torch.Tensor, scale_O: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(q_OI, scale_O)
        return functional.linear(x, q_OI.to(x.dtype)) * scale_O.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        q_OI, scale_O = ctx.saved_tensors
        (grad,) = grads
        return (grad * scale_O.to(grad.dtype)) @ q_OI.to(grad.dtype), None, None


class _Nf4Product(torch.autograd.Function):
    """Computes y = x W^T with W dequantized in the dtype of x."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, packed: torch.Tensor, scale_N: torch.Tensor, shape: tuple[int, int]
    ) -> torch.Tensor:
        ctx.save_for_backward(packed, scale_N)
        ctx.shape = shape
        return functional.linear(x, dequantize_nf4(packed, scale_N, shape, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        packed, scale_N = ctx.saved_tensors
        (grad,) = grads
        return grad @ dequantize_nf4(packed, scale_N, ctx.shape, grad.dtype), None, None, None


class QuantizedLinear(nn.Linear):
    """A frozen linear layer with packed weights. Its state is `weight` (packed), `weight_scale` and, if any, `bias`."""

    def __init__(self, out_features: int, in_features: int, bias: nn.Parameter | None, device: torch.device) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = out_features, in_features
        with torch.device(device):
            weight, scale = self.empty_state()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.register_parameter("bias", bias)

    @classmethod
    def in_place_of(cls, linear: nn.Linear | Conv1D) -> QuantizedLinear:
        """Makes an empty layer for `linear`. GPT-2's Conv1D stores its matrix as [in, out]; here it is [out, in]."""
        shape = linear.weight.shape
        out_features, in_features = reversed(shape) if isinstance(linear, Conv1D) else shape
        return cls(out_features, in_features, linear.bias, linear.weight.device)

    @classmethod
    def from_weight(cls, weight_OI: torch.Tensor) -> QuantizedLinear:
        out_features, in_features = weight_OI.shape
        linear = cls(out_features, in_features, None, torch.device("meta"))
        weight, scale = cls.quantize(weight_OI)
        linear.load_state_dict({"weight": weight, "weight_scale": scale}, assign=True)
        return linear.requires_grad_(False)

    @staticmethod
    def quantize(weight_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns `weight` and `weight_scale` of the state."""
        raise NotImplementedError

    def empty_state(self) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError

    def product(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        y = self.product(input)
        return y if self.bias is None else y + self.bias


class Int8Linear(QuantizedLinear):
    """int8 with one scale per row: half the memory of bf16 at its speed, with an error of 0.8 %."""

    quantize = staticmethod(quantize_rows)

    def empty_state(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.empty(self.out_features, self.in_features, dtype=torch.int8), torch.empty(
            self.out_features, dtype=torch.float32
        )

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return _Int8Product.apply(x, self.weight, self.weight_scale)


class Nf4Linear(QuantizedLinear):
    """nf4: 4.5 bits per weight, with an error of 9 %."""

    quantize = staticmethod(quantize_nf4)

    def empty_state(self) -> tuple[torch.Tensor, torch.Tensor]:
        blocks = -(self.out_features * self.in_features // -BLOCK)
        return torch.empty(blocks, BLOCK // 2, dtype=torch.uint8), torch.empty(blocks, dtype=torch.float32)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return _Nf4Product.apply(x, self.weight, self.weight_scale, (self.out_features, self.in_features))


QUANTIZED: dict[str, type[QuantizedLinear]] = {"int8": Int8Linear, "nf4": Nf4Linear}


def quantize_linears(layer: nn.Module, base: str) -> None:
    """Replaces all linear layers by empty ones of the base."""
    for parent in list(layer.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in (nn.Linear, Conv1D):
                setattr(parent, name, QUANTIZED[base].in_place_of(child))
