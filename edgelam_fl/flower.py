"""Packs adapters into Flower's ArrayRecords, and reads them.

All tensors of an adapter are one Array, in the format of safetensors. Flower stores and sends each Array as objects of their
own, and each object costs its server a request and several statements of its database, however small it is.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from flwr.app import Array, ArrayRecord

from edgelam_fl.errors import ProtocolError
from edgelam_fl.model import adapter as adapters

_NAME, _TYPE = "tensors", "safetensors"


def to_record(tensors: Mapping[str, np.ndarray]) -> ArrayRecord:
    """Packs an adapter."""
    return packed_record(adapters.to_bytes(dict(tensors)) if tensors else b"")


def packed_record(data: bytes) -> ArrayRecord:
    """Packs an adapter that is bytes already, as `model.adapter.to_bytes` makes them. No bytes are an adapter without tensors."""
    return ArrayRecord({_NAME: Array("uint8", (len(data),), _TYPE, data)} if data else {})


def packed_bytes(record: ArrayRecord) -> bytes:
    """Returns the bytes that `packed_record` packed, unread. Raises ProtocolError for any other record."""
    if isinstance(record, ArrayRecord) and not record:
        return b""
    if not isinstance(record, ArrayRecord) or list(record) != [_NAME] or record[_NAME].stype != _TYPE:
        raise ProtocolError(f"a record of arrays must hold {_NAME!r} alone, in the format of {_TYPE}")
    return record[_NAME].data


def from_record(record: ArrayRecord) -> adapters.Adapter:
    """Reads an adapter; its arrays are copies. Raises ProtocolError for anything else."""
    data = packed_bytes(record)
    return adapters.from_bytes(data) if data else {}


def record_bytes(record: ArrayRecord) -> int:
    """Returns the bytes that the tensors take on the wire."""
    return sum(len(array.data) for array in record.values())
