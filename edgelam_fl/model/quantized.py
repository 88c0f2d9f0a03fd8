"""A frozen linear layer in int8, one scale a row. Half of bf16's memory, and the backward keeps no dequantized copy."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional


def quantize_rows(weight_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric absmax quantization of each row: int8 [out, in] and fp32 scale [out]. A row of zeros gets scale 1."""
    absmax_O = weight_OI.float().abs().amax(dim=1)
    scale_O = torch.where(absmax_O > 0, absmax_O / 127, torch.ones_like(absmax_O))
    return torch.round(weight_OI.float() / scale_O[:, None]).to(torch.int8), scale_O


class _RowScaledLinear(torch.autograd.Function):
    """y = (x q^T) * scale. q is dequantized for the one product and dropped; nothing but the int8 tensor is saved."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, q_OI: torch.Tensor, scale_O: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(q_OI, scale_O)
        return functional.linear(x, q_OI.to(x.dtype)) * scale_O.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        q_OI, scale_O = ctx.saved_tensors
        (grad,) = grads
        return (grad * scale_O.to(grad.dtype)) @ q_OI.to(grad.dtype), None, None


class Int8Linear(nn.Linear):
    """Stands in for a frozen `nn.Linear`; peft wraps it like one. Its state is `weight` (int8), `weight_scale`, `bias`."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(torch.empty_like(linear.weight, dtype=torch.int8), requires_grad=False)
        scale_O = torch.empty(linear.out_features, dtype=torch.float32, device=linear.weight.device)
        self.weight_scale = nn.Parameter(scale_O, requires_grad=False)
        self.bias = linear.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        y = _RowScaledLinear.apply(input, self.weight, self.weight_scale)
        return y if self.bias is None else y + self.bias
