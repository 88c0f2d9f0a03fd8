"""What a codec is, and the element types that travel. Knows no codec by name: the table is in `wire.codecs`."""

from __future__ import annotations

from typing import Protocol

import torch

from edgelam_fl.wire import edgelam_pb2 as pb

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int64": torch.int64}


class Codec(Protocol):
    """A way to write tensors as bytes. It keeps no state: several links use it from several threads."""

    @property
    def name(self) -> str:
        """Returns the codec's key in the table, which travels in every frame."""

    def encode(self, tensor: torch.Tensor) -> bytes:
        """Returns the tensor's bytes; leaves the tensor as it is."""

    def expected_bytes(self, meta: pb.Tensor) -> int:
        """Returns how many bytes `encode` makes of a tensor of this shape and dtype, whatever its values are."""

    def decode(self, data: bytearray, meta: pb.Tensor) -> torch.Tensor:
        """Returns the tensor; it may use the memory of `data`, whose length has been checked."""


def dtype_of(meta: pb.Tensor) -> torch.dtype:
    """Returns the element type that a checked description names."""
    return DTYPES[meta.dtype]
