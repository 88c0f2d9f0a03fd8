"""The codec `fp16`: sends every number as float16, after its row was multiplied by a power of two.

float16 has more bits than bfloat16 and a small range: gradients of hidden states are below its smallest number, states of some
models above its largest. So the largest number of each row is brought to between 2^14 and 2^15, and a byte per row
says by which power of two.
"""

from __future__ import annotations

import torch

from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.codecs.base import dtype_of
from edgelam_fl.wire.codecs.rows import expected_bytes, join, largest, rows_of

_TOP = 14  # binary exponent of each row's largest number as it travels
_LEAST = -100  # smaller exponents count as this one: powers of two stay within float32


class Fp16Codec:
    """Keeps sign and eleven bits of every number that is at least 2^-28 of the largest of its row."""

    name = "fp16"

    def encode(self, tensor: torch.Tensor) -> bytes:
        rows_RD = rows_of(tensor)
        if not rows_RD.numel():
            return b""
        exponents_R1 = (torch.frexp(largest(rows_RD)).exponent - 1).clamp_(min=_LEAST)
        numbers_RD = rows_RD * torch.exp2((_TOP - exponents_R1).float())
        return join(numbers_RD.to(torch.float16), exponents_R1.to(torch.int8))

    def expected_bytes(self, meta: pb.Tensor) -> int:
        return expected_bytes(self.name, meta, dtype_of(meta).itemsize)

    def decode(self, data: bytearray, meta: pb.Tensor) -> torch.Tensor:
        shape = tuple(meta.shape)
        if not data:
            return torch.empty(shape, dtype=dtype_of(meta))
        rows = len(data) // (2 * shape[-1] + 1)
        numbers_RD = torch.frombuffer(data, dtype=torch.float16, count=rows * shape[-1]).view(rows, -1)
        exponents_R1 = torch.frombuffer(data, dtype=torch.int8, offset=numbers_RD.nbytes).view(rows, 1)
        return (numbers_RD.float() * torch.exp2(exponents_R1.float() - _TOP)).to(dtype_of(meta)).view(shape)
