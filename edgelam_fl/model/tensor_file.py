"""Files of named arrays in the format of safetensors, written piece by piece and read back. Knows nothing about the names.

The library's own writer holds a second copy of all tensors in memory, leaves `.tmp*` files behind if it is killed, and says
"No space left" in words alone. Here a full disk is an OSError like any other, and nothing is written beside the file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

_WORDS = {
    "float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
DTYPES = frozenset(_WORDS)
"""Names of the dtypes that a file can hold."""
_ALIGNED_TO = 8  # bytes: the data begin at a multiple of the largest item


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> str:
    """Writes the arrays into a new file, and to the disk; returns the SHA-256 of its bytes.

    `metadata`: more words for the header; None: none. Raises OSError, FileExistsError among them.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))  # as the format demands
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, array in ordered:
        begin, end = end, end + array.nbytes
        header[name] = {
            "dtype": _WORDS[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED_TO)
    total = hashlib.sha256()
    with path.open("xb") as file:
        for piece in (len(text).to_bytes(8, "little"), text):
            file.write(piece)
            total.update(piece)
        for _, array in ordered:
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            file.write(data)
            total.update(data)
        file.flush()
        os.fsync(file.fileno())
    return total.hexdigest()


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Reads what `write_tensors` wrote. Raises OSError, or SafetensorError for other bytes."""
    found: dict[str, np.ndarray] = load_file(path)
    return found
