"""Computes the weights of quantized tensors in fp32. Knows no files: `read` gives each tensor that is needed.

Neighbour: `model.packing` says which tensors are quantized and how.

Shapes: O rows, I columns, N blocks.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from torch.nn import functional

from edgelam_fl.model.index import Packing

Read = Callable[[str], torch.Tensor]  # end of a name, as in Packing.beside -> the tensor


def unpacked(packing: Packing, weight: torch.Tensor, read: Read) -> torch.Tensor:
    """Returns the weights that a stored tensor stands for."""
    return {"fp8": _fp8, "bnb-4bit": _four_bits, "bnb-8bit": _eight_bits}[packing.kind](packing, weight, read)


def _fp8(packing: Packing, weight_OI: torch.Tensor, read: Read) -> torch.Tensor:
    """Multiplies each block by its scale, as in DeepSeek-V3 (arXiv 2412.19437, section 3.3.2). A U8 scale is a power of two."""
    (end,) = packing.beside
    stored = read(end)
    scale = (stored.float() - 127).exp2() if stored.dtype == torch.uint8 else stored.float()
    rows, columns = packing.block
    per_row = scale.reshape(-(weight_OI.shape[0] // -rows), -1).repeat_interleave(rows, 0)[: weight_OI.shape[0]]
    return weight_OI.float() * per_row.repeat_interleave(columns, 1)[:, : weight_OI.shape[1]]


def _four_bits(packing: Packing, packed: torch.Tensor, read: Read) -> torch.Tensor:
    """Looks each half byte up and multiplies by its block's scale, which may be packed itself (QLoRA, arXiv 2305.14314)."""
    state = json.loads(bytes(read(next(end for end in packing.beside if "quant_state" in end)).tolist()))
    halves = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], dim=1).view(-1)
    values = read(".quant_map").float()[halves.long()]
    scale_N = read(".absmax")
    if ".nested_absmax" in packing.beside:
        codes = read(".nested_quant_map").float()[scale_N.long()]
        scale_N = _times_blocks(codes, read(".nested_absmax").float(), state["nested_blocksize"])
        scale_N = scale_N + state["nested_offset"]
    shape = torch.Size(state["shape"])
    return _times_blocks(values[: shape.numel()], scale_N.float(), state["blocksize"]).view(shape)


def _times_blocks(values: torch.Tensor, scale_N: torch.Tensor, block: int) -> torch.Tensor:
    """Multiplies each block of values by its scale; the last block may be a part of one."""
    whole = functional.pad(values, (0, -len(values) % block)).view(-1, block)
    return (whole * scale_N.view(-1, 1)).view(-1)[: len(values)]


def _eight_bits(packing: Packing, weight_OI: torch.Tensor, read: Read) -> torch.Tensor:
    """Multiplies each row by its largest magnitude / 127 (LLM.int8, arXiv 2208.07339)."""
    (end,) = packing.beside
    return weight_OI.float() * (read(end).float() / 127)[:, None]
