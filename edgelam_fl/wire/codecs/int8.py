"""The codec `int8`: sends every number as a whole number from -127 to 127, in units of its row's scale."""

from __future__ import annotations

import torch

from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.codecs.base import dtype_of
from edgelam_fl.wire.codecs.rows import LEAST_SCALE, expected_bytes, join, largest, rows_of, scaled

_MOST = 127


class Int8Codec:
    """Keeps a float32 scale per row, and of every number what remains after rounding to the scale."""

    name = "int8"

    def encode(self, tensor: torch.Tensor) -> bytes:
        rows_RD = rows_of(tensor)
        if not rows_RD.numel():
            return b""
        scales_R1 = (largest(rows_RD) / _MOST).clamp_(min=LEAST_SCALE)
        return join(scales_R1, scaled(rows_RD, scales_R1))

    def expected_bytes(self, meta: pb.Tensor) -> int:
        return expected_bytes(self.name, meta, dtype_of(meta).itemsize)

    def decode(self, data: bytearray, meta: pb.Tensor) -> torch.Tensor:
        shape = tuple(meta.shape)
        if not data:
            return torch.empty(shape, dtype=dtype_of(meta))
        rows = len(data) // (shape[-1] + 4)
        scales_R1 = torch.frombuffer(data, dtype=torch.float32, count=rows).view(rows, 1)
        numbers_RD = torch.frombuffer(data, dtype=torch.int8, offset=scales_R1.nbytes).view(rows, -1)
        return (numbers_RD * scales_R1).to(dtype_of(meta)).view(shape)
