"""Tensors to bytes and back. A codec has three methods and a name that travels in every frame.

Nothing that a peer claims is allocated before `expected_bytes` has checked it.
"""

from __future__ import annotations

import math

import torch

from edgelam_fl.errors import ProtocolError
from edgelam_fl.wire import edgelam_pb2 as pb

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int64": torch.int64}
HIDDEN = ("float32", "bfloat16")  # what hidden states and their gradients travel as
NUMBERS = ("int64",)  # what labels travel as
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_DIMENSIONS = 4
_MAX_SIDE = 1 << 24


class RawCodec:
    """The tensor's own bytes, little-endian, row-major. Loses nothing."""

    name = "raw"

    def encode(self, tensor: torch.Tensor) -> bytes:
        return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""

    def expected_bytes(self, meta: pb.Tensor) -> int:
        return math.prod(meta.shape) * _dtype(meta).itemsize

    def decode(self, data: bytearray, meta: pb.Tensor) -> torch.Tensor:
        if not data:
            return torch.empty(tuple(meta.shape), dtype=_dtype(meta))
        return torch.frombuffer(data, dtype=_dtype(meta)).view(tuple(meta.shape))


CODECS = {codec.name: codec for codec in (RawCodec(),)}


def describe(tensor: torch.Tensor, codec: str, dtypes: tuple[str, ...] = HIDDEN) -> pb.Tensor:
    name = _NAMES.get(tensor.dtype)
    if name not in dtypes:
        raise ProtocolError(f"a tensor of {tensor.dtype} cannot travel; known: {', '.join(dtypes)}")
    return pb.Tensor(dtype=name, shape=tensor.shape, codec=codec)


def check(meta: pb.Tensor, max_bytes: int, dtypes: tuple[str, ...] = HIDDEN) -> None:
    """Raises ProtocolError unless the announced tensor is of a known kind, consistent and within the link's limit."""
    if meta.codec not in CODECS:
        raise ProtocolError(f"codec {meta.codec!r} is not known here; known: {', '.join(CODECS)}")
    if meta.dtype not in dtypes:
        raise ProtocolError(f"a tensor of dtype {meta.dtype!r}; known: {', '.join(dtypes)}")
    if not 1 <= len(meta.shape) <= _MAX_DIMENSIONS:
        raise ProtocolError(f"a tensor of {len(meta.shape)} dimensions; allowed: 1 to {_MAX_DIMENSIONS}")
    if max(meta.shape) > _MAX_SIDE:
        raise ProtocolError(f"a tensor of shape {list(meta.shape)}; a side may have {_MAX_SIDE} at most")
    expected = CODECS[meta.codec].expected_bytes(meta)
    if meta.total_bytes != expected:
        raise ProtocolError(
            f"a tensor of shape {list(meta.shape)} announces {meta.total_bytes} bytes; it has {expected}"
        )
    if expected > max_bytes:
        raise ProtocolError(f"a tensor of {expected} bytes; this link's plan allows {max_bytes}")


def _dtype(meta: pb.Tensor) -> torch.dtype:
    return _DTYPES[meta.dtype]
