"""The codec `fp16`: sends every number as float16, after its row was multiplied by a power of two.

float16 has more bits than bfloat16 and a small range: gradients of hidden states are below its smallest number, states of some
models above its largest. So the largest number of each row is brought to between 2^14 and 2^15, and a byte per row
says by which power of two.
"""

from __future__ import annotations

import torch

from edgelam_fl.wire.codecs.rows import RowCodec, join, largest

_TOP = 14  # binary exponent of each row's largest number as it travels
_LEAST = -100  # smaller exponents count as this one: powers of two stay within float32


class Fp16Codec(RowCodec):
    """Keeps sign and eleven bits of every number that is at least 2^-28 of the largest of its row."""

    name = "fp16"

    def encode_rows(self, rows_RD: torch.Tensor) -> bytes:
        exponents_R1 = (torch.frexp(largest(rows_RD)).exponent - 1).clamp_(min=_LEAST)
        numbers_RD = rows_RD * torch.exp2((_TOP - exponents_R1).float())
        return join(numbers_RD.to(torch.float16), exponents_R1.to(torch.int8))

    def decode_rows(self, data: bytearray, width: int) -> torch.Tensor:
        rows = len(data) // (2 * width + 1)
        numbers_RD = torch.frombuffer(data, dtype=torch.float16, count=rows * width).view(rows, -1)
        exponents_R1 = torch.frombuffer(data, dtype=torch.int8, offset=numbers_RD.nbytes).view(rows, 1)
        return numbers_RD.float() * torch.exp2(exponents_R1.float() - _TOP)
