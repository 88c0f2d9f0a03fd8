"""The codec `int4`: sends every number as a whole number from -7 to 7, in units of the scale of its group.

A few channels of hidden states are many times larger than the others, and would set the scale for their whole group. So each
group of 32 numbers is multiplied by a Hadamard matrix, which spreads a large number evenly over its group, and by the
matrix's inverse at the receiver (as QuaRot does with weights and activations, arXiv 2404.00456).

Shapes: R rows, D numbers of a row, G groups, N numbers of a group.
"""

from __future__ import annotations

from functools import cache

import torch
from torch.nn import functional

from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.codec_bytes import INT4_GROUP as GROUP
from edgelam_fl.wire.codecs.base import dtype_of
from edgelam_fl.wire.codecs.rows import LEAST_SCALE, expected_bytes, join, largest, rows_of, scaled

_MOST = 7
_ABOVE_ZERO = _MOST + 1  # added to every number, so that two fit a byte without signs


class Int4Codec:
    """Keeps a bfloat16 scale per group, and of every turned number what remains after rounding to the scale."""

    name = "int4"

    def encode(self, tensor: torch.Tensor) -> bytes:
        rows_RD = rows_of(tensor)
        if not rows_RD.numel():
            return b""
        filled_RD = functional.pad(rows_RD, (0, -rows_RD.shape[1] % GROUP))
        # By the matrix over its size, so that no sum is larger than the numbers; what is left out comes back with the inverse.
        turned_GN = filled_RD.view(-1, GROUP) @ (_hadamard() / GROUP)
        scales_G1 = (largest(turned_GN) / _MOST).clamp_(min=LEAST_SCALE).to(torch.bfloat16)
        # A scale that was rounded down would make 8 of 7.
        numbers_GN = scaled(turned_GN, scales_G1.float()).clamp_(-_MOST, _MOST) + _ABOVE_ZERO
        low, high = numbers_GN.chunk(2, dim=1)
        return join(scales_G1, low | (high << 4))

    def expected_bytes(self, meta: pb.Tensor) -> int:
        return expected_bytes(self.name, meta, dtype_of(meta).itemsize)

    def decode(self, data: bytearray, meta: pb.Tensor) -> torch.Tensor:
        shape = tuple(meta.shape)
        if not data:
            return torch.empty(shape, dtype=dtype_of(meta))
        groups = len(data) // (GROUP // 2 + 2)
        scales_G1 = torch.frombuffer(data, dtype=torch.bfloat16, count=groups).view(groups, 1)
        pairs = torch.frombuffer(data, dtype=torch.uint8, offset=scales_G1.nbytes).view(groups, -1)
        numbers_GN = torch.cat([pairs & 15, pairs >> 4], dim=1).float() - _ABOVE_ZERO
        rows_RD = ((numbers_GN * scales_G1.float()) @ _hadamard()).view(-1, -(-shape[-1] // GROUP) * GROUP)
        return rows_RD[:, : shape[-1]].to(dtype_of(meta)).reshape(shape)


@cache
def _hadamard() -> torch.Tensor:
    """Returns the Hadamard matrix [N, N] of ones and minus ones. It is its own inverse, but for the factor N."""
    matrix = torch.ones(1, 1)
    while len(matrix) < GROUP:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return matrix
