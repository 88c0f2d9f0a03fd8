"""Frozen linear layers with quantized weights: int8 with one scale per row, nf4 with one scale per block of 64 weights.

Each matrix is quantized on its own, so the numbers of a slice are those of the whole model. Forward and backward dequantize for
one product and keep no dequantized copy. On a CPU int8 is dequantized into memory of the thread that is used again: from new
memory for each product, activations end up between the holes that the matrices leave, and the system clears the same pages over and
over. Knows no files; peft wraps these layers like any `nn.Linear`.

Shapes: O out features, I in features, N blocks.
"""

from __future__ import annotations

import threading
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


class _Scratch(threading.local):
    """The memory of one thread for one dequantized matrix: that of the largest so far."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def cast(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Returns `weight` in another dtype, to be used before the thread's next call."""
        if weight.device.type != "cpu":
            return weight.to(dtype)
        size = weight.numel() * dtype.itemsize
        if len(self._bytes) < size:
            self._bytes = torch.empty(size, dtype=torch.uint8)
        return self._bytes[:size].view(dtype).view(weight.shape).copy_(weight)


_scratch = _Scratch()


class _Int8Product(torch.autograd.Function):
    """Computes y = (x q^T) * scale."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, q_OI: torch.Tensor, scale_O: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(q_OI, scale_O)
        return functional.linear(x, _scratch.cast(q_OI, x.dtype)) * scale_O.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        q_OI, scale_O = ctx.saved_tensors
        (grad,) = grads
        return (grad * scale_O.to(grad.dtype)) @ _scratch.cast(q_OI, grad.dtype), None, None


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
            weight, scale = self.empty_state(out_features, in_features)
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

    @staticmethod
    def empty_state(out_features: int, in_features: int) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError

    def dequantize(self) -> torch.Tensor:
        """Returns the matrix [out, in] in fp32."""
        raise NotImplementedError

    @property
    def W_q(self) -> torch.Tensor:
        """The packed weights: a layer that has them under this name is one that peft asks to `dequantize` (for DoRA)."""
        return self.weight

    @staticmethod
    def product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        """Returns x times the transposed matrix [out, in] of this shape, of which `weight` and `scale` are the state."""
        raise NotImplementedError

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        y = self.product(input, self.weight, self.weight_scale, (self.out_features, self.in_features))
        return y if self.bias is None else y + self.bias


class Int8Linear(QuantizedLinear):
    """int8 with one scale per row: half the memory of bf16 at its speed, with an error of 0.8 %."""

    quantize = staticmethod(quantize_rows)

    @staticmethod
    def empty_state(out_features: int, in_features: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.empty(out_features, in_features, dtype=torch.int8), torch.empty(out_features, dtype=torch.float32)

    def dequantize(self) -> torch.Tensor:
        return self.weight.float() * self.weight_scale[:, None]

    @staticmethod
    def product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        return _Int8Product.apply(x, weight, scale)


class Nf4Linear(QuantizedLinear):
    """nf4: 4.5 bits per weight, with an error of 9 %."""

    quantize = staticmethod(quantize_nf4)

    @staticmethod
    def empty_state(out_features: int, in_features: int) -> tuple[torch.Tensor, torch.Tensor]:
        blocks = -(out_features * in_features // -BLOCK)
        return torch.empty(blocks, BLOCK // 2, dtype=torch.uint8), torch.empty(blocks, dtype=torch.float32)

    def dequantize(self) -> torch.Tensor:
        return dequantize_nf4(self.weight, self.weight_scale, (self.out_features, self.in_features), torch.float32)

    @staticmethod
    def product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        return _Nf4Product.apply(x, weight, scale, shape)


QUANTIZED: dict[str, type[QuantizedLinear]] = {"int8": Int8Linear, "nf4": Nf4Linear}


def quantize(weight: torch.Tensor, base: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes a matrix [out, in], or each matrix of experts [E, out, in] by itself: packed weights and scales."""
    if weight.dim() == 2:
        return QUANTIZED[base].quantize(weight)
    weights, scales = zip(*(QUANTIZED[base].quantize(weight_OI) for weight_OI in weight), strict=True)
    return torch.stack(weights), torch.stack(scales)


class QuantizedExperts(nn.Module):
    """The experts of one layer with packed matrices, computed one by one as in transformers' `eager` implementation.

    Shapes: N positions, K experts per position, D hidden.
    """

    def __init__(self, experts: Any, base: str) -> None:
        """Makes empty ones for transformers' experts: two tensors [E, out, in], `gate_up_proj` and `down_proj`."""
        super().__init__()
        self._kind, self._gate = QUANTIZED[base], experts._apply_gate
        self._shapes: dict[str, tuple[int, int]] = {}
        for name in ("gate_up_proj", "down_proj"):
            count, out_features, in_features = experts.get_parameter(name).shape
            self._shapes[name] = out_features, in_features
            with torch.device(experts.get_parameter(name).device):
                weight, scale = self._kind.empty_state(out_features, in_features)
            for end, tensor in (("", weight), ("_scale", scale)):
                state = tensor.new_empty(count, *tensor.shape)
                self.register_parameter(name + end, nn.Parameter(state, requires_grad=False))

    def forward(self, states_ND: torch.Tensor, experts_NK: torch.Tensor, shares_NK: torch.Tensor) -> torch.Tensor:
        total_ND = torch.zeros_like(states_ND)
        for expert in experts_NK.unique().tolist():
            positions, places = torch.where(experts_NK == expert)
            inner = self._gate(self._product(states_ND[positions], "gate_up_proj", expert))
            outer = self._product(inner, "down_proj", expert) * shares_NK[positions, places, None]
            total_ND = total_ND.index_add(0, positions, outer.to(total_ND.dtype))
        return total_ND

    def _product(self, x: torch.Tensor, name: str, expert: int) -> torch.Tensor:
        weight, scale = self.get_parameter(name)[expert], self.get_parameter(f"{name}_scale")[expert]
        return self._kind.product(x, weight, scale, self._shapes[name])


def quantize_layer(layer: nn.Module, base: str, held: str | None) -> None:
    """Replaces all linear layers by empty ones of the base, and the experts in the module `held`, if the layer has it."""
    for parent in list(layer.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in (nn.Linear, Conv1D):
                setattr(parent, name, QUANTIZED[base].in_place_of(child))
            elif name == held:
                setattr(parent, name, QuantizedExperts(child, base))
