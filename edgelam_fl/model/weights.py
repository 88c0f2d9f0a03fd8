"""Reads the tensors of a slice, and no others. Knows files and dtypes, not modules.

Safetensors files in the wanted dtype are mapped directly. Other sources (a GGUF file, another dtype, int8, nf4) are converted once,
tensor by tensor, into one cached file per layer, so that the next start and the other nodes of this machine map the same pages.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from filelock import FileLock
from safetensors import safe_open

from edgelam_fl.errors import ModelError
from edgelam_fl.files import cache_folder
from edgelam_fl.model import gguf
from edgelam_fl.model.bases import compute_dtype
from edgelam_fl.model.index import TensorEntry, layer_number
from edgelam_fl.model.quantized import QUANTIZED, quantize
from edgelam_fl.model.served import SAFETENSORS_DTYPES
from edgelam_fl.model.source import ModelSource
from edgelam_fl.model.unpack import unpacked

ALIGNED_BYTES = 64
_PLAIN = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_STORED_DTYPE = {"fp32": "F32", "bf16": "BF16"}
_SAFETENSORS_NAME = {getattr(torch, name): stored for stored, (name, _) in SAFETENSORS_DTYPES.items()}


def read_tensors(
    source: ModelSource, names: Iterable[str], base: str, compute: str = ""
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields each named tensor in the dtype that is computed in; int8 and nf4 matrices are packed and followed by `_scale`.

    The tensors are mapped from files: memory is used when they are first touched, and shared between processes.
    """
    if source.read is not None:
        yield from source.read(list(names), base, compute)
        return
    files: dict[Path, list[tuple[str, str]]] = {}
    for name in names:
        file, stored = tensor_file(source, name, base, compute)
        files.setdefault(file, []).append((name, stored))
    for file, wanted in files.items():
        with safe_open(file, framework="pt") as tensors:
            available = set(tensors.keys())
            for name, stored in wanted:
                yield name, tensors.get_tensor(stored)
                if f"{name}_scale" in available:
                    yield f"{name}_scale", tensors.get_tensor(f"{name}_scale")


def tensor_file(source: ModelSource, name: str, base: str, compute: str = "") -> tuple[Path, str]:
    """Returns the safetensors file that holds a tensor as wanted, made if absent, and its name there; `_scale` is in it too."""
    if name not in source.index:
        raise ModelError(f"model {source.name} has no tensor {name}")
    entry, file = source.index[name], _file_for(source, name, base, compute_dtype(base, compute))
    return file, entry.stored_name if Path(entry.file) == file else name


def _part(name: str) -> str:
    layer = layer_number(name)
    return "ends" if layer is None else f"layer-{layer:03d}"


def _file_for(source: ModelSource, name: str, base: str, dtype: torch.dtype) -> Path:
    """Returns the safetensors file that holds the tensor as wanted: the source's own, or the cached part (made if absent)."""
    entry, part = source.index[name], _part(name)
    if base not in QUANTIZED or part == "ends":  # the ends are not quantized, so all bases share the plain file
        base = form = _PLAIN[dtype]
    else:
        form = f"{base}-{_PLAIN[dtype]}"
    if source.gguf is None and not entry.pieces and entry.stored_type == _STORED_DTYPE.get(form):
        return Path(entry.file)
    cached = cache_folder() / "models" / source.weights_digest[:16] / form / f"{part}.safetensors"
    if not cached.is_file():
        cached.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(cached.with_suffix(".lock")):
            if not cached.is_file():
                _convert_part(source, part, base, dtype, cached)
    return cached


def _convert_part(source: ModelSource, part: str, base: str, dtype: torch.dtype, cached: Path) -> None:
    with PartWriter(cached) as writer:
        for name in (name for name in source.index if _part(name) == part):
            tensor = _read_source(source, name)
            if base in QUANTIZED and source.packs(name):
                matrix_OI = tensor.t().contiguous() if source.family.input_first else tensor
                weight, scale = quantize(matrix_OI, base)
                writer.add(name, weight)
                writer.add(f"{name}_scale", scale)
            else:
                writer.add(name, tensor.to(dtype) if tensor.is_floating_point() else tensor)


class PartWriter:
    """Writes a safetensors file tensor by tensor, with one of them in memory; puts it in place on exit without an error."""

    def __init__(self, path: Path) -> None:
        self._path, self._temporary = path, path.with_name(f".{path.name}.{os.getpid()}")
        self._spools: dict[torch.dtype, BinaryIO] = {}  # dtype -> bytes of its tensors so far
        self._entries: dict[torch.dtype, list[tuple[str, torch.Size, int]]] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if tensor.dtype not in self._spools:
            self._spools[tensor.dtype] = tempfile.TemporaryFile(dir=self._path.parent)  # noqa: SIM115 - closed in __exit__
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        self._spools[tensor.dtype].write(data.data)
        self._entries.setdefault(tensor.dtype, []).append((name, tensor.shape, data.nbytes))

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._join()
                self._temporary.replace(self._path)
        finally:
            for spool in self._spools.values():
                spool.close()
            self._temporary.unlink(missing_ok=True)

    def _join(self) -> None:
        """Writes wide elements first, so that every tensor begins at a multiple of its element size, and all at `ALIGNED_BYTES`."""
        dtypes = sorted(self._spools, key=lambda dtype: -dtype.itemsize)
        header, offset = {}, 0
        for dtype in dtypes:
            for name, shape, size in self._entries[dtype]:
                header[name] = {
                    "dtype": _SAFETENSORS_NAME[dtype], "shape": list(shape), "data_offsets": [offset, offset + size],
                }  # fmt: skip
                offset += size
        text = json.dumps(header).encode()
        text += b" " * (-(len(text) + 8) % ALIGNED_BYTES)
        with self._temporary.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for dtype in dtypes:
                self._spools[dtype].seek(0)
                shutil.copyfileobj(self._spools[dtype], file, 1 << 20)


def _read_source(source: ModelSource, name: str) -> torch.Tensor:
    entry = source.index[name]
    if source.gguf is not None:
        return torch.from_numpy(gguf.read_tensor(entry, source.config).copy())
    if entry.pieces:
        return torch.cat([_read_entry(piece) for piece in entry.pieces]).view(entry.shape)
    return _read_entry(entry)


def _read_entry(entry: TensorEntry) -> torch.Tensor:
    stored = _stored(entry.file, entry.stored_name)
    if entry.packing is None:
        return stored
    beside = entry.packing.beside
    return unpacked(entry.packing, stored, lambda end: _stored(*beside[end]))


def _stored(file: str, name: str) -> torch.Tensor:
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name)
