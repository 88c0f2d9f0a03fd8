"""The codec `int4`: sends every number as a whole number from -7 to 7, in units of the scale of its group of 32, which was turned."""

from __future__ import annotations

import torch

from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.codec_bytes import CODEC_BYTES
from edgelam_fl.wire.codecs.base import dtype_of
from edgelam_fl.wire.codecs.rows import expected_bytes, join, rows_of
from edgelam_fl.wire.codecs.turned import turned, turned_back

_MOST = 7
_ABOVE_ZERO = _MOST + 1  # added to every number, so that two fit a byte without signs


class Int4Codec:
    """Keeps a bfloat16 scale per group, and of every turned number what remains after rounding to the scale."""

    name = "int4"

    def encode(self, tensor: torch.Tensor) -> bytes:
        rows_RD = rows_of(tensor)
        if not rows_RD.numel():
            return b""
        scales_G1, numbers_GN = turned(rows_RD, CODEC_BYTES[self.name].group_of(rows_RD.shape[1]), _MOST)
        low, high = (numbers_GN + _ABOVE_ZERO).chunk(2, dim=1)
        return join(scales_G1, low | (high << 4))

    def expected_bytes(self, meta: pb.Tensor) -> int:
        return expected_bytes(self.name, meta, dtype_of(meta).itemsize)

    def decode(self, data: bytearray, meta: pb.Tensor) -> torch.Tensor:
        shape = tuple(meta.shape)
        if not data:
            return torch.empty(shape, dtype=dtype_of(meta))
        groups = len(data) // (CODEC_BYTES[self.name].group_of(shape[-1]) // 2 + 2)
        scales_G1 = torch.frombuffer(data, dtype=torch.bfloat16, count=groups).view(groups, 1)
        pairs = torch.frombuffer(data, dtype=torch.uint8, offset=scales_G1.nbytes).view(groups, -1)
        numbers_GN = torch.cat([pairs & 15, pairs >> 4], dim=1).float() - _ABOVE_ZERO
        return turned_back(scales_G1, numbers_GN, shape[-1]).to(dtype_of(meta)).reshape(shape)
