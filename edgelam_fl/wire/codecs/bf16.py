"""The codec `bf16`: sends every number as bfloat16, half of what float32 takes; bfloat16 itself loses nothing."""

from __future__ import annotations

import torch

from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.codecs.base import dtype_of
from edgelam_fl.wire.codecs.rows import expected_bytes, join


class Bf16Codec:
    """Keeps sign, exponent and seven bits of every number."""

    name = "bf16"

    def encode(self, tensor: torch.Tensor) -> bytes:
        return join(tensor.detach().to(torch.bfloat16).contiguous())

    def expected_bytes(self, meta: pb.Tensor) -> int:
        return expected_bytes(self.name, meta, dtype_of(meta).itemsize)

    def decode(self, data: bytearray, meta: pb.Tensor) -> torch.Tensor:
        numbers = torch.frombuffer(data, dtype=torch.bfloat16) if data else torch.empty(0, dtype=torch.bfloat16)
        return numbers.to(dtype_of(meta)).view(tuple(meta.shape))
