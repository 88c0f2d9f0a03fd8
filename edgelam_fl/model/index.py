"""The index of a model's tensors: where each one is, its size and its layer."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from edgelam_fl.errors import ModelError
from edgelam_fl.model.families import Experts

_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class Packing:
    """How the numbers of a quantized tensor are packed in its file."""

    kind: str  # "fp8", "bnb-4bit" or "bnb-8bit"
    beside: Mapping[
        str, tuple[str, str]
    ]  # end of the name of a tensor that is needed to unpack -> its file, its name there
    block: tuple[int, int] = (0, 0)  # fp8: rows and columns that share one scale


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a model: its shape in torch, and where its bytes are."""

    shape: tuple[int, ...]
    file: str
    stored_name: str
    stored_type: str  # name of the element type in safetensors or GGUF
    offset: int = 0  # of its first byte in the file
    stored_bytes: int = 0
    packing: Packing | None = None  # None: the numbers are stored as they are, or the file is a GGUF
    pieces: tuple[TensorEntry, ...] = ()  # the stored tensors whose rows, one after another, are this one

    @property
    def stored(self) -> tuple[TensorEntry, ...]:
        """The tensors in files: this one, or its pieces."""
        return self.pieces or (self,)


@lru_cache(maxsize=1 << 16)  # asked for each tensor of each node of a round
def layer_number(name: str) -> int | None:
    """Returns the layer that a tensor, module or adapter name belongs to; None outside the layers."""
    match = re.search(r"\.(?:layers|h|layer)\.(\d+)\.", f".{name}")
    return int(match.group(1)) if match else None


def join_experts(index: Mapping[str, TensorEntry], experts: Experts) -> dict[str, TensorEntry]:
    """Returns an index in which the stored matrices of experts are pieces of the model's tensors [experts, out, in].

    Raises ModelError if one of them is absent or has another shape.
    """
    pattern = re.compile(rf"(.*\.{experts.block}\.{experts.held})\.(\d+)\.(\w+)\.weight")
    joined, modules = dict[str, TensorEntry](), dict[str, int]()  # module -> number of its experts
    for name, entry in index.items():
        if match := pattern.fullmatch(name):
            modules[match[1]] = max(modules.get(match[1], 0), int(match[2]) + 1)
        else:
            joined[name] = entry
    for module, count in modules.items():
        for tensor, parts in experts.joined.items():
            names = [f"{module}.{number}.{part}.weight" for number in range(count) for part in parts]
            joined[f"{module}.{tensor}"] = _join([_piece(index, name) for name in names], count)
    return joined


def _piece(index: Mapping[str, TensorEntry], name: str) -> TensorEntry:
    if name not in index:
        raise ModelError(f"model.name: the files of the model have no tensor {name}, but other experts of its layer")
    return index[name]


def _join(pieces: list[TensorEntry], experts: int) -> TensorEntry:
    shapes = {piece.shape for piece in pieces}
    if len(shapes) > 1 or len(pieces[0].shape) != 2:
        raise ModelError(
            f"model.name: {pieces[0].stored_name} and its like have the shapes {sorted(shapes)}; one is expected"
        )
    rows, columns = pieces[0].shape
    return TensorEntry((experts, len(pieces) * rows // experts, columns), pieces[0].file, "", "", pieces=tuple(pieces))


def safetensors_header(file: Path) -> dict[str, Any]:
    """Reads dtype, shape and data_offsets per tensor. Raises ModelError for a file that is not whole."""
    try:
        with file.open("rb") as stream:
            begin = stream.read(8)
            if begin.startswith(b"version"):
                raise ValueError("it is a pointer of Git LFS; `git lfs pull` fetches the file")
            (length,) = struct.unpack("<Q", begin)
            size = file.stat().st_size
            if length > min(_MAX_HEADER_BYTES, size):
                raise ValueError(f"its header claims {length} bytes")
            header: dict[str, Any] = json.loads(stream.read(length))
        _check_header(header, size - 8 - length)
        return header
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError, struct.error) as error:
        raise ModelError(f"{file} is not a whole safetensors file: {error}. Fetch it again") from error


def tensor_bytes(entry: TensorEntry) -> bytes:
    """Reads the bytes of one small tensor."""
    with Path(entry.file).open("rb") as stream:
        stream.seek(entry.offset)
        return stream.read(entry.stored_bytes)


def _check_header(header: dict[str, Any], data_bytes: int) -> None:
    """Raises what `safetensors_header` catches for entries that are none, and for data that end too early or too late."""
    end = 0
    for tensor, info in header.items():
        if tensor != "__metadata__":
            first, last = (int(offset) for offset in info["data_offsets"])
            if not isinstance(info["dtype"], str) or not all(type(size) is int and size >= 0 for size in info["shape"]):
                raise ValueError(f"its header describes {tensor} as {info}")
            if not 0 <= first <= last:
                raise ValueError(f"its header puts {tensor} at {first} to {last}")
            end = max(end, last)
    if end != data_bytes:
        raise ValueError(f"its header needs {end} bytes of data, and it has {data_bytes}")
