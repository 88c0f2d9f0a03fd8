"""The codec `int8`: sends every number as a whole number from -127 to 127, in units of the scale of its group of 64, which was turned."""

from __future__ import annotations

import torch

from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.codec_bytes import CODEC_BYTES
from edgelam_fl.wire.codecs.base import dtype_of
from edgelam_fl.wire.codecs.rows import expected_bytes, join, rows_of
from edgelam_fl.wire.codecs.turned import turned, turned_back

_MOST = 127


class Int8Codec:
    """Keeps a bfloat16 scale per group, and of every turned number what remains after rounding to the scale."""

    name = "int8"

    def encode(self, tensor: torch.Tensor) -> bytes:
        rows_RD = rows_of(tensor)
        return (
            join(*turned(rows_RD, CODEC_BYTES[self.name].group_of(rows_RD.shape[1]), _MOST)) if rows_RD.numel() else b""
        )

    def expected_bytes(self, meta: pb.Tensor) -> int:
        return expected_bytes(self.name, meta, dtype_of(meta).itemsize)

    def decode(self, data: bytearray, meta: pb.Tensor) -> torch.Tensor:
        shape = tuple(meta.shape)
        if not data:
            return torch.empty(shape, dtype=dtype_of(meta))
        groups = len(data) // (CODEC_BYTES[self.name].group_of(shape[-1]) + 2)
        scales_G1 = torch.frombuffer(data, dtype=torch.bfloat16, count=groups).view(groups, 1)
        numbers_GN = torch.frombuffer(data, dtype=torch.int8, offset=scales_G1.nbytes).view(groups, -1)
        return turned_back(scales_G1, numbers_GN, shape[-1]).to(dtype_of(meta)).reshape(shape)
