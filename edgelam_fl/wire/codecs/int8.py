"""The codec `int8`: sends every number as a whole number from -127 to 127, in units of the scale of its group of 64, which was turned."""

from __future__ import annotations

import torch

from edgelam_fl.wire.codec_bytes import CODEC_BYTES
from edgelam_fl.wire.codecs.rows import RowCodec, join
from edgelam_fl.wire.codecs.turned import turned, turned_back

_MOST = 127


class Int8Codec(RowCodec):
    """Keeps a bfloat16 scale per group, and of every turned number what remains after rounding to the scale."""

    name = "int8"

    def encode_rows(self, rows_RD: torch.Tensor) -> bytes:
        return join(*turned(rows_RD, CODEC_BYTES[self.name].group_of(rows_RD.shape[1]), _MOST))

    def decode_rows(self, data: bytearray, width: int) -> torch.Tensor:
        groups = len(data) // (CODEC_BYTES[self.name].group_of(width) + 2)
        scales_G1 = torch.frombuffer(data, dtype=torch.bfloat16, count=groups).view(groups, 1)
        numbers_GN = torch.frombuffer(data, dtype=torch.int8, offset=scales_G1.nbytes).view(groups, -1)
        return turned_back(scales_G1, numbers_GN, width)
