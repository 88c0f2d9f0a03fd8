"""Which base type a node holds its frozen slice in, and what it computes in. Pure functions of profile and run file."""

from __future__ import annotations

from collections.abc import Sequence

from edgelam_fl.model.adapter import Span
from edgelam_fl.model.memory import weights_bytes
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.wire import edgelam_pb2 as pb

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
BASES = ("fp32", "bf16", "int8", "nf4")
_SHARE_OF_MEMORY = 0.5  # the rest is for activations, moments and everybody else


def choose_base(spec: RunSpec, profile: pb.Profile, spans: Sequence[Span]) -> tuple[str, str]:
    """(base, compute) of a node, as `model.base` and `model.compute` name them.

    With base = "auto" the fastest measured pair whose slice fits half of the node's free memory; unquantized where the
    node measured nothing, or nothing fits what is asked for.
    """
    base, compute = spec.config.model.base, spec.config.model.compute
    if base == "auto":
        measured = {key.partition("/")[::2]: seconds for key, seconds in profile.base_seconds.items()}
        room = profile.memory_available_bytes * _SHARE_OF_MEMORY
        fitting = [
            (seconds, pair)
            for pair, seconds in measured.items()
            if seconds > 0
            and pair[0] in BASES
            and pair[1] in (DTYPES if compute == "auto" else (compute,))
            and weights_bytes(spec.source, spans, pair[0], DTYPES[pair[1]]) <= room
        ]
        if fitting:
            return min(fitting)[1]
        base = "bf16" if compute == "bf16" else "fp32"
    if compute == "auto":
        compute = "bf16" if base == "bf16" else "fp32"
    return base, compute
