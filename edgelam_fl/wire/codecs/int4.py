"""The codec `int4`: sends every number as a whole number from -7 to 7, in units of the scale of its group of 32, which was turned."""

from __future__ import annotations

import torch

from edgelam_fl.wire.codec_bytes import CODEC_BYTES
from edgelam_fl.wire.codecs.rows import RowCodec, join
from edgelam_fl.wire.codecs.turned import turned, turned_back

_MOST = 7
_ABOVE_ZERO = _MOST + 1  # added to every number, so that two fit a byte without signs


class Int4Codec(RowCodec):
    """Keeps a bfloat16 scale per group, and of every turned number what remains after rounding to the scale."""

    name = "int4"

    def encode_rows(self, rows_RD: torch.Tensor) -> bytes:
        scales_G1, numbers_GN = turned(rows_RD, CODEC_BYTES[self.name].group_of(rows_RD.shape[1]), _MOST)
        low, high = (numbers_GN + _ABOVE_ZERO).chunk(2, dim=1)
        return join(scales_G1, low | (high << 4))

    def decode_rows(self, data: bytearray, width: int) -> torch.Tensor:
        groups = len(data) // (CODEC_BYTES[self.name].group_of(width) // 2 + 2)
        scales_G1 = torch.frombuffer(data, dtype=torch.bfloat16, count=groups).view(groups, 1)
        pairs = torch.frombuffer(data, dtype=torch.uint8, offset=scales_G1.nbytes).view(groups, -1)
        numbers_GN = torch.cat([pairs & 15, pairs >> 4], dim=1).float() - _ABOVE_ZERO
        return turned_back(scales_G1, numbers_GN, width)
