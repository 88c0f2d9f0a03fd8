"""The index of a model's tensors: where each one is, its size and its layer."""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelam_fl.errors import ModelError

_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a model: its shape in torch, and where its bytes are."""

    shape: tuple[int, ...]
    file: str
    stored_name: str
    stored_type: str  # name of the element type in safetensors or GGUF
    offset: int = 0  # in bytes; GGUF only
    stored_bytes: int = 0  # GGUF only


def layer_number(name: str) -> int | None:
    """Returns the layer that a tensor, module or adapter name belongs to; None outside the layers."""
    match = re.search(r"\.(?:layers|h|layer)\.(\d+)\.", f".{name}")
    return int(match.group(1)) if match else None


def safetensors_header(file: Path) -> dict[str, Any]:
    """Reads dtype, shape and data_offsets per tensor. Raises ModelError for a file that is not whole."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(_MAX_HEADER_BYTES, file.stat().st_size):
                raise ValueError(f"its header claims {length} bytes")
            header: dict[str, Any] = json.loads(stream.read(length))
            return header
    except (ValueError, struct.error) as error:
        raise ModelError(f"{file} is not a whole safetensors file: {error}") from error
