"""What codecs that write row by row have in common: rows as float32, their largest numbers, and their bytes.

Knows no codec by name. Shapes: R rows, D numbers of a row.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch

from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.codec_bytes import CODEC_BYTES
from edgelam_fl.wire.codecs.base import dtype_of

LEAST_SCALE = torch.finfo(torch.float32).tiny  # below it, a quotient of two numbers may be infinite


class RowCodec(ABC):
    """A codec that writes a tensor's rows, whatever its other dimensions are. A tensor without numbers has no bytes."""

    name: str

    @abstractmethod
    def encode_rows(self, rows_RD: torch.Tensor) -> bytes:
        """Returns the bytes of float32 rows, of which there is at least one."""

    @abstractmethod
    def decode_rows(self, data: bytearray, width: int) -> torch.Tensor:
        """Returns the rows [R, width] that `encode_rows` wrote, as float32."""

    def encode(self, tensor: torch.Tensor) -> bytes:
        rows_RD = rows_of(tensor)
        return self.encode_rows(rows_RD) if rows_RD.numel() else b""

    def expected_bytes(self, meta: pb.Tensor) -> int:
        return expected_bytes(self.name, meta, dtype_of(meta).itemsize)

    def decode(self, data: bytearray, meta: pb.Tensor) -> torch.Tensor:
        rows_RD = self.decode_rows(data, meta.shape[-1]) if data else torch.empty(0)
        return rows_RD.to(dtype_of(meta)).reshape(tuple(meta.shape))


def rows_of(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor's rows [R, D] as float32, without a copy if they are that already; none of a tensor without numbers."""
    width = tensor.shape[-1] if tensor.numel() else 1
    return tensor.detach().to(torch.float32).reshape(-1, width)


def largest(rows_RD: torch.Tensor) -> torch.Tensor:
    """Returns the largest absolute value of each row [R, 1]; not a number if one of the row's is not."""
    least_R1, most_R1 = rows_RD.aminmax(dim=1, keepdim=True)
    return torch.maximum(-least_R1, most_R1)


def scaled(rows_RD: torch.Tensor, scales_R1: torch.Tensor, most: int) -> torch.Tensor:
    """Returns the rows in units of their scales, rounded, from -most to most, as int8; zeros in rows whose scale is not finite."""
    units_RD = (rows_RD / scales_R1).round_().clamp_(-most, most)
    usable_R1 = scales_R1.isfinite()
    if not usable_R1.all():  # what is not finite has no whole number; the scale says so to the receiver
        units_RD = torch.where(usable_R1, units_RD, 0.0)
    return units_RD.to(torch.int8)


def join(*parts: torch.Tensor) -> bytes:
    """Returns the bytes of contiguous tensors, one after the other."""
    return b"".join(part.view(-1).view(torch.uint8).numpy().data for part in parts if part.numel())


def expected_bytes(codec: str, meta: pb.Tensor, item_bytes: int) -> int:
    """Returns the bytes that a codec makes of a tensor of this shape, by its row in CODEC_BYTES."""
    return math.prod(meta.shape[:-1]) * CODEC_BYTES[codec].bytes_of_row(meta.shape[-1], item_bytes)
