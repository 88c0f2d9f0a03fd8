"""Packs adapters into Flower's ArrayRecords, and reads them.

An adapter is one file in the format of safetensors, cut into Arrays. Flower stores and sends each Array as objects of their
own, and each object costs its server a request and several statements of its database, however small it is: a tensor
alone is too little. A large object is no better: its receiver sees nothing of it until it is whole, and takes the sender
for lost (`server.pulling`).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from flwr.app import Array, ArrayRecord

from edgelam_fl.errors import ProtocolError
from edgelam_fl.model import adapter as adapters

_TYPE = "safetensors"
_PIECE_BYTES = 1 << 19


def to_record(tensors: Mapping[str, np.ndarray]) -> ArrayRecord:
    """Packs an adapter."""
    return packed_record(adapters.to_bytes(dict(tensors)) if tensors else b"")


def packed_record(data: bytes) -> ArrayRecord:
    """Packs an adapter that is bytes already, as `model.adapter.to_bytes` makes them. No bytes are an adapter without tensors."""
    pieces = [data[begin : begin + _PIECE_BYTES] for begin in range(0, len(data), _PIECE_BYTES)]
    return ArrayRecord(
        {str(number): Array("uint8", (len(piece),), _TYPE, piece) for number, piece in enumerate(pieces)}
    )


def packed_bytes(record: ArrayRecord) -> bytes:
    """Returns the bytes that `packed_record` packed, unread. Raises ProtocolError for any other record."""
    names = [str(number) for number in range(len(record))]
    if (
        not isinstance(record, ArrayRecord)
        or set(record) != set(names)
        or any(a.stype != _TYPE for a in record.values())
    ):
        raise ProtocolError(f"a record of arrays must hold the pieces of one {_TYPE} file, numbered from 0")
    return b"".join(record[name].data for name in names)


def from_record(record: ArrayRecord) -> adapters.Adapter:
    """Reads an adapter; its arrays are copies. Raises ProtocolError for anything else."""
    data = packed_bytes(record)
    return adapters.from_bytes(data) if data else {}


def views(record: ArrayRecord) -> Mapping[str, np.ndarray]:
    """Reads an adapter as read-only views of the record's own bytes, so that they are not in memory twice. Raises as `from_record`."""
    data = packed_bytes(record)
    return adapters.views(data) if data else {}


def record_bytes(record: ArrayRecord) -> int:
    """Returns the bytes that the tensors take on the wire."""
    return sum(len(array.data) for array in record.values())
