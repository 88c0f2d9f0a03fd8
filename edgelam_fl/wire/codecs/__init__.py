"""The table of codecs, one file each, and the checks that every tensor from the network passes before it gets memory.

Knows no links: which of the codecs a link uses is part of its terms (`wire.terms`).
"""

from __future__ import annotations

import math

import torch

from edgelam_fl.errors import ProtocolError
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.codecs.base import DTYPES, Codec, dtype_of
from edgelam_fl.wire.codecs.bf16 import Bf16Codec
from edgelam_fl.wire.codecs.fp16 import Fp16Codec
from edgelam_fl.wire.codecs.int4 import Int4Codec
from edgelam_fl.wire.codecs.int8 import Int8Codec
from edgelam_fl.wire.codecs.raw import RawCodec

CODECS: dict[str, Codec] = {
    RawCodec.name: RawCodec(),
    Fp16Codec.name: Fp16Codec(),
    Bf16Codec.name: Bf16Codec(),
    Int8Codec.name: Int8Codec(),
    Int4Codec.name: Int4Codec(),
}
LOSSLESS = RawCodec.name  # for whole numbers, which are never rounded, whatever a link's codec is
HIDDEN = ("float32", "bfloat16")  # element types of hidden states and their gradients
NUMBERS = ("int64",)  # element type of labels
_MAX_DIMENSIONS = 4
_MAX_SIDE = 1 << 24
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def describe(tensor: torch.Tensor, codec: str, dtypes: tuple[str, ...] = HIDDEN) -> pb.Tensor:
    """Returns the tensor's description for a frame, without its size in bytes. Raises ProtocolError for other dtypes."""
    name = _NAMES.get(tensor.dtype)
    if name not in dtypes:
        raise ProtocolError(f"a tensor of {tensor.dtype} cannot travel; known: {', '.join(dtypes)}")
    return pb.Tensor(dtype=name, shape=tensor.shape, codec=codec)


def check(meta: pb.Tensor, most_bytes: int, dtypes: tuple[str, ...] = HIDDEN) -> None:
    """Raises ProtocolError unless the announced tensor is of a known kind, consistent and within the link's limit.

    `most_bytes` bounds both the encoded and the decoded size.
    """
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
    largest = max(expected, math.prod(meta.shape) * dtype_of(meta).itemsize)
    if largest > most_bytes:
        raise ProtocolError(f"a tensor of {largest} bytes; this link's plan allows {most_bytes}")
