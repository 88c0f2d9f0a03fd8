"""Which base type a node holds its frozen slice in, and what it computes in. Pure functions of profile and run file."""

from __future__ import annotations

import math
from collections.abc import Sequence

from edgelam_fl.config import RunConfig
from edgelam_fl.model.adapter import Span
from edgelam_fl.model.source import ModelSource, layer_number
from edgelam_fl.wire import edgelam_pb2 as pb

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "nf4": 0.55}  # a parameter in the layers, with its share of scales
_SHARE_OF_MEMORY = 0.5  # the rest is for activations, moments and everybody else


def choose_base(config: RunConfig, source: ModelSource, profile: pb.Profile, spans: Sequence[Span]) -> tuple[str, str]:
    """(base, compute) of a node, as `model.base` and `model.compute` name them.

    With base = "auto" the fastest measured pair whose slice fits half of the node's free memory; fp32 where the node
    measured nothing, or nothing fits what is asked for.
    """
    base, compute = config.model.base, config.model.compute
    if base == "auto":
        measured = {key.partition("/")[::2]: seconds for key, seconds in profile.base_seconds.items()}
        room = profile.memory_available_bytes * _SHARE_OF_MEMORY
        fitting = [
            (seconds, pair)
            for pair, seconds in measured.items()
            if seconds > 0
            and pair[0] in _BYTES
            and pair[1] in (DTYPES if compute == "auto" else (compute,))
            and slice_bytes(source, spans, pair[0]) <= room
        ]
        if fitting:
            return min(fitting)[1]
        base = "fp32"
    if compute == "auto":
        compute = "bf16" if base == "bf16" else "fp32"
    return base, compute


def slice_bytes(source: ModelSource, spans: Sequence[Span], base: str) -> float:
    """About what the spans' frozen weights need. What stands outside the layers is never quantized."""
    outside = any(span.embed or span.head for span in spans)
    total = 0.0
    for name, entry in source.index.items():
        layer = layer_number(name)
        if layer is None:
            total += outside * math.prod(entry.shape) * max(2.0, _BYTES[base])
        elif any(span.first <= layer < span.last for span in spans):
            total += math.prod(entry.shape) * _BYTES[base]
    return total
