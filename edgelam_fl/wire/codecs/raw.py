"""The codec `raw`: a tensor's own bytes, little-endian, row-major. Loses nothing."""

from __future__ import annotations

import math

import torch

from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.codecs.base import dtype_of


class RawCodec:
    """Sends every element with all its bits."""

    name = "raw"

    def encode(self, tensor: torch.Tensor) -> bytes:
        return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""

    def expected_bytes(self, meta: pb.Tensor) -> int:
        return math.prod(meta.shape) * dtype_of(meta).itemsize

    def decode(self, data: bytearray, meta: pb.Tensor) -> torch.Tensor:
        if not data:
            return torch.empty(tuple(meta.shape), dtype=dtype_of(meta))
        return torch.frombuffer(data, dtype=dtype_of(meta)).view(tuple(meta.shape))
