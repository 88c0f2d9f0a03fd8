"""Converts adapters to and from Flower's ArrayRecords."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO

import numpy as np
from flwr.app import Array, ArrayRecord


def to_record(tensors: Mapping[str, np.ndarray]) -> ArrayRecord:
    return ArrayRecord({name: Array(np.ascontiguousarray(array)) for name, array in tensors.items()})


def from_record(record: ArrayRecord) -> dict[str, np.ndarray]:
    return {name: array.numpy() for name, array in record.items()}


def views(record: ArrayRecord) -> dict[str, np.ndarray]:
    """Returns the arrays as read-only views of the record's own bytes, so that they are not in memory twice.

    Raises ValueError if an array is not in numpy's format 1.0.
    """
    return {name: _view(array) for name, array in record.items()}


def _view(array: Array) -> np.ndarray:
    header = BytesIO(array.data)
    if array.stype != "numpy.ndarray" or np.lib.format.read_magic(header) != (1, 0):
        raise ValueError(f"an array of type {array.stype!r}, not of numpy's format 1.0")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(header)
    numbers = np.frombuffer(array.data, dtype, offset=header.tell())
    return numbers.reshape(shape, order="F" if fortran else "C")


def record_bytes(record: ArrayRecord) -> int:
    """Returns the bytes that the arrays take on the wire."""
    return sum(len(array.data) for array in record.values())
