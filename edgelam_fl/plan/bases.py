"""Chooses the base in which a node holds its frozen slice, and what it computes in, from its profile and the run file.

Knows nothing of other nodes and of routes.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgelam_fl.config import RunConfig
from edgelam_fl.model.adapter import Span
from edgelam_fl.model.base_names import BASES, DTYPES
from edgelam_fl.model.memory import weights_bytes
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.wire import edgelam_pb2 as pb

_SHARE_OF_MEMORY = 0.5  # weights may fill this share; the rest is for activations, moments and other programs


def choose_base(spec: RunSpec, profile: pb.Profile, spans: Sequence[Span]) -> tuple[str, str]:
    """Returns a node's (base, compute), as `model.base` and `model.compute` name them.

    With base = "auto" this is the fastest measured pair whose slice fits half of the node's free memory, and no quantized
    base if the node measured nothing or nothing fits.
    """
    room = profile.memory_available_bytes * _SHARE_OF_MEMORY
    for base, compute in _fastest_first(spec.config, profile):
        if weights_bytes(spec.source, spans, base, DTYPES[compute], tokens=spec.values is None) <= room:
            return base, compute
    return _without_measuring(spec.config)


def host_pairs(config: RunConfig, profile: pb.Profile) -> list[str]:
    """Lists the pairs "base/compute" that a host may hold a slice in, the preferred one first.

    With base = "auto" these are all that it measured, the fastest first.
    """
    pairs = _fastest_first(config, profile) or [_without_measuring(config)]
    return [f"{base}/{compute}" for base, compute in pairs]


def split_pair(pair: str) -> tuple[str, str]:
    """Takes "base/compute" apart."""
    base, _, compute = pair.partition("/")
    return base, compute


def _fastest_first(config: RunConfig, profile: pb.Profile) -> list[tuple[str, str]]:
    """Lists the measured pairs that the run file allows, the fastest first; none if it names a base."""
    if config.model.base != "auto":
        return []
    allowed = tuple(DTYPES) if config.model.compute == "auto" else (config.model.compute,)
    measured = [(seconds, split_pair(pair)) for pair, seconds in profile.base_seconds.items() if seconds > 0]
    return [pair for _, pair in sorted(measured) if pair[0] in BASES and pair[1] in allowed]


def _without_measuring(config: RunConfig) -> tuple[str, str]:
    base, compute = config.model.base, config.model.compute
    if base == "auto":
        base = "bf16" if compute == "bf16" else "fp32"
    if compute == "auto":
        compute = "bf16" if base == "bf16" else "fp32"
    return base, compute
