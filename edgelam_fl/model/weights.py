"""Reads the tensors of a slice, and only those. Knows files and dtypes, not modules.

A source in safetensors with the wanted dtype is mapped as it lies. What has to be converted (a GGUF file, another
dtype, int8, nf4) is converted tensor by tensor once and kept in the cache, one file a layer, so that the next start and
the other nodes of this machine map the same pages.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import save_file

from edgelam_fl.errors import ModelError
from edgelam_fl.model import gguf
from edgelam_fl.model.bases import compute_dtype
from edgelam_fl.model.quantized import QUANTIZED
from edgelam_fl.model.source import ModelSource, cache_folder, layer_number

_PLAIN = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_STORED_DTYPE = {"fp32": "F32", "bf16": "BF16"}


def read_tensors(
    source: ModelSource, names: Iterable[str], base: str, compute: str = ""
) -> Iterator[tuple[str, torch.Tensor]]:
    """Each named tensor in the dtype computed in; with int8 and nf4, a layer's matrices packed, followed by their `_scale`.

    The tensors are mapped from files: memory is taken when they are first touched, and shared between processes.
    """
    dtype = compute_dtype(base, compute)
    files: dict[Path, list[str]] = {}
    for name in names:
        if name not in source.index:
            raise ModelError(f"model {source.name} has no tensor {name}")
        files.setdefault(_file_for(source, name, base, dtype), []).append(name)
    for file, wanted in files.items():
        with safe_open(file, framework="pt") as tensors:
            available = set(tensors.keys())
            for name in wanted:
                entry = source.index[name]
                yield name, tensors.get_tensor(entry.stored_name if Path(entry.file) == file else name)
                if f"{name}_scale" in available:
                    yield f"{name}_scale", tensors.get_tensor(f"{name}_scale")


def _part(name: str) -> str:
    layer = layer_number(name)
    return "ends" if layer is None else f"layer-{layer:03d}"


def _file_for(source: ModelSource, name: str, base: str, dtype: torch.dtype) -> Path:
    """The safetensors file that holds the tensor as wanted: the source's own, or the cached part (made if absent)."""
    entry, part = source.index[name], _part(name)
    if base not in QUANTIZED or part == "ends":  # nothing is quantized there, so all bases share the plain file
        base = form = _PLAIN[dtype]
    else:
        form = f"{base}-{_PLAIN[dtype]}"
    if source.gguf is None and entry.stored_type == _STORED_DTYPE.get(form):
        return Path(entry.file)
    cached = cache_folder() / "models" / source.digest[:16] / form / f"{part}.safetensors"
    if not cached.is_file():
        cached.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(cached.with_suffix(".lock")):
            if not cached.is_file():
                _convert_part(source, part, base, dtype, cached)
    return cached


def _convert_part(source: ModelSource, part: str, base: str, dtype: torch.dtype, cached: Path) -> None:
    converted: dict[str, torch.Tensor] = {}
    for name in (name for name in source.index if _part(name) == part):
        tensor = _read_source(source, name)
        if base in QUANTIZED and tensor.dim() == 2 and name.endswith(".weight"):
            matrix_OI = tensor.t().contiguous() if source.family.input_first else tensor
            converted[name], converted[f"{name}_scale"] = QUANTIZED[base].quantize(matrix_OI)
        else:
            converted[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    temporary = cached.with_name(f".{cached.name}.{os.getpid()}")
    save_file(converted, temporary)
    temporary.replace(cached)


def _read_source(source: ModelSource, name: str) -> torch.Tensor:
    entry = source.index[name]
    if source.gguf is not None:
        return torch.from_numpy(gguf.read_tensor(entry, source.config).copy())
    with safe_open(entry.file, framework="pt") as tensors:
        return tensors.get_tensor(entry.stored_name)
