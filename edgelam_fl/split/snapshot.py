"""The state of one adapter's training after some steps of a round, as plain arrays, numbers and the report so far.

What makes such a state and what goes on from it is in `trainee`, `driver`, `lane` and `host`; what keeps it is a `Keeper`, which
they know by its name alone. Knows neither files nor models. Reads bytes from other times and machines as what they may be: damaged.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from safetensors import SafetensorError
from safetensors.numpy import load, save

from edgelam_fl.wire import edgelam_pb2 as pb

_MAGIC = b"EdgeLAM snapshot 1\n"
_HASH_BYTES = 32
_LENGTHS = struct.Struct("<QQ")  # of the numbers and of the report


class Damaged(Exception):
    """Bytes that are no snapshot, or not all of one."""


@dataclass(frozen=True)
class SourceState:
    """The state of one adapter, which nothing that trains on changes any more."""

    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    numbers: Mapping[str, Any] = field(default_factory=dict)  # what JSON can hold
    report: pb.JobReport = field(default_factory=pb.JobReport)  # what was measured in the round so far

    def to_bytes(self) -> bytes:
        """Writes the state, with a SHA-256 of all of it in front."""
        numbers, report = json.dumps(self.numbers).encode(), self.report.SerializeToString()
        tensors = save({name: np.require(array, requirements="C") for name, array in self.arrays.items()})
        body = b"".join([_LENGTHS.pack(len(numbers), len(report)), numbers, report, tensors])
        return _MAGIC + hashlib.sha256(body).digest() + body

    @classmethod
    def from_bytes(cls, data: bytes) -> SourceState:
        """Reads what `to_bytes` wrote. Raises Damaged for other bytes."""
        begin = len(_MAGIC) + _HASH_BYTES
        if data[: len(_MAGIC)] != _MAGIC:
            raise Damaged("it does not begin as a snapshot of this version does")
        body = data[begin:]
        if hashlib.sha256(body).digest() != data[len(_MAGIC) : begin]:
            raise Damaged("its bytes are not those of its digest")
        try:
            numbers_bytes, report_bytes = _LENGTHS.unpack_from(body)
            report_at = _LENGTHS.size + numbers_bytes
            numbers = json.loads(body[_LENGTHS.size : report_at])
            report = pb.JobReport.FromString(body[report_at : report_at + report_bytes])
            return cls(load(body[report_at + report_bytes :]), numbers, report)
        except (struct.error, ValueError, RecursionError, DecodeError, SafetensorError) as error:
            raise Damaged(f"it cannot be read: {type(error).__name__}") from error


@dataclass(frozen=True)
class Keeper:
    """Takes the states of a node's sources in one round, as training comes by their steps."""

    every: int = 0  # steps from one snapshot to the next; 0: none is kept
    take: Callable[[str, Sequence[int], SourceState], None] = lambda source, steps, state: None
    drop: Callable[[str], None] = lambda source: None  # no attempt will need a source any more

    def due(self, after: int, until: int) -> list[int]:
        """Lists the numbers of steps done, above `after` and up to `until`, at which a snapshot is due."""
        return list(range(after - after % self.every + self.every, until + 1, self.every)) if self.every else []


NO_KEEPER = Keeper()
ENDS = "ends"  # the source of a device's own layers


def site_lane(device: str = "") -> str:
    """Names a source at a host, whatever the host is called: that of its site, or with copies that of one device."""
    return f"site {device}" if device else "site"
