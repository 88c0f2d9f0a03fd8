"""Reads what a GGUF file says of itself: its keys, and where each tensor lies. Imports no torch; knows no architecture.

The format is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgelam_fl.errors import ModelError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32  # bytes, if general.alignment does not say otherwise
_MOST_DIMENSIONS = 4


class StoredTensor(NamedTuple):
    shape: tuple[int, ...]  # as in torch: the last dimension is contiguous
    kind: str  # name of its element type, which may be a quantized one
    offset: int  # bytes from the beginning of the file
    size: int  # bytes


@dataclass(frozen=True)
class GgufHeader:
    """All keys of a file with their values, and all tensors by their stored names."""

    keys: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]


def read_header(path: Path) -> GgufHeader:
    """Reads the keys and the places of the tensors, and no tensor.

    Raises ModelError for a file that is not GGUF, of another byte order or version, cut off, or with tensors of a type that nobody
    here can unpack.
    """
    with path.open("rb") as file:
        if file.read(4) != _MAGIC:
            raise ModelError(f"{path} is not a GGUF file: it does not begin with GGUF")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _Reader(path, data).header()
            except (struct.error, IndexError, UnicodeDecodeError, OverflowError, RecursionError, MemoryError) as error:
                raise ModelError(
                    f"{path} is not a whole GGUF file: its header cannot be read ({error}). Fetch the file again"
                ) from error


class _Reader:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._at = path, data, len(_MAGIC)

    def header(self) -> GgufHeader:
        (version,) = self._take("I")
        if version not in _VERSIONS:
            big = struct.unpack(">I", struct.pack("<I", version))[0] in _VERSIONS
            what = "is big-endian" if big else f"is of GGUF version {version}"
            raise ModelError(
                f"{self._path} {what}; read are little-endian files of the versions 2 and 3. Convert the model again with "
                f"llama.cpp's convert_hf_to_gguf.py, or set model.name to its safetensors folder"
            )
        tensors, keys = self._take("QQ")
        values: dict[str, Any] = {}
        for _ in range(keys):
            name = self._string()
            if name in values:
                raise ModelError(f"{self._path} has the key {name} twice. Fetch the file again")
            values[name] = self._value(self._take("I")[0])
        entries = [self._entry() for _ in range(tensors)]
        return GgufHeader(values, self._placed(entries, self._alignment(values)))

    def _take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{form}", self._data, self._at)
        self._at += struct.calcsize(f"<{form}")
        return values

    def _string(self) -> str:
        (length,) = self._take("Q")
        end = self._at + length
        if end > len(self._data):
            raise IndexError(f"a text of {length} bytes at byte {self._at} of {len(self._data)}")
        text = self._data[self._at : end].decode("utf-8")
        self._at = end
        return text

    def _value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self._take(_NUMBERS[kind])[0]
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise IndexError(f"a value of the unknown type {kind} at byte {self._at}")
        element, count = self._take("IQ")
        if count > len(self._data):
            raise IndexError(f"a list of {count} values at byte {self._at} of {len(self._data)}")
        if element in _NUMBERS:
            return list(self._take(f"{count}{_NUMBERS[element]}"))
        return [self._value(element) for _ in range(count)]

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        (dimensions,) = self._take("I")
        if dimensions > _MOST_DIMENSIONS:
            raise IndexError(f"{name} with {dimensions} dimensions")
        shape = self._take(f"{dimensions}Q")[::-1]
        kind, offset = self._take("IQ")
        return name, shape, kind, offset

    def _alignment(self, keys: Mapping[str, Any]) -> int:
        alignment = keys.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise ModelError(
                f"{self._path}: general.alignment = {alignment!r} must be a power of two. Fetch the file again"
            )
        return alignment

    def _placed(self, entries: list[tuple[str, tuple[int, ...], int, int]], alignment: int) -> dict[str, StoredTensor]:
        start = -(-self._at // alignment) * alignment
        placed: dict[str, StoredTensor] = {}
        for name, shape, number, offset in entries:
            if name in placed or offset % alignment:
                what = "is there twice" if name in placed else f"begins at {offset}, no multiple of {alignment}"
                raise ModelError(f"{self._path}: the tensor {name} {what}. Fetch the file again")
            kind, size = self._kind_and_size(name, shape, number)
            placed[name] = StoredTensor(shape, kind, start + offset, size)
        end = max((tensor.offset + tensor.size for tensor in placed.values()), default=0)
        if end > len(self._data):
            raise ModelError(
                f"{self._path} is cut off: its tensors end at byte {end}, the file has {len(self._data)}. Fetch the file again"
            )
        return placed

    def _kind_and_size(self, name: str, shape: tuple[int, ...], number: int) -> tuple[str, int]:
        """Returns the name of an element type and the bytes of a tensor. Raises ModelError if it cannot be unpacked here."""
        import gguf

        known = {kind.value: kind for kind in gguf.GGMLQuantizationType}
        kind = known.get(number)
        if kind is None or not _unpacks(kind):
            what = f"of the element type {kind.name if kind else f'number {number}'}"
            raise ModelError(
                f"{self._path}: the tensor {name} is {what}, which nothing here can unpack. Use a file in another quantization "
                f"(Q4_K_M, Q8_0 and F16 are read), or the model's safetensors folder"
            )
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        if not shape or shape[-1] % elements:
            raise ModelError(
                f"{self._path}: rows of {name} have {shape[-1:]} numbers, blocks of {kind.name} have {elements}. Fetch the file again"
            )
        return kind.name, math.prod(shape) // elements * size


def _unpacks(kind: Any) -> bool:
    """Tells whether the gguf package can turn blocks of this kind into numbers."""
    import gguf

    if kind not in _UNPACKS:
        plain = kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
        block = np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
        try:
            _UNPACKS[kind] = plain or gguf.dequantize(block, kind).size > 0
        except (NotImplementedError, ValueError, KeyError):
            _UNPACKS[kind] = False
    return _UNPACKS[kind]


_UNPACKS: dict[Any, bool] = {}
