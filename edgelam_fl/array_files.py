"""Reads files of arrays, and checks the arrays that are meant by key, axes and numbers. Knows no samples, no channels and no task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from edgelam_fl.errors import DataError, nearest
from edgelam_fl.names import printable

ARRAYS = (".npz", ".safetensors")
FORMATS = f"a {' or '.join(ARRAYS)} file of arrays"


@dataclass(frozen=True)
class Array:
    """One array that is read from a file. Axes of the same name have the same length in all arrays of a file."""

    key: str
    axes: tuple[str, ...]  # the first is over samples
    is_complex: bool = True  # complex numbers, or real ones with real and imaginary part as a further, last axis of 2
    required: bool = True

    @property
    def meaning(self) -> str:
        """The array in words: its axes and numbers."""
        numbers = "complex (or real, with real and imaginary part as a last axis of 2)" if self.is_complex else "real"
        return f"{self.key!r} [{', '.join(self.axes)}], {numbers}"


def holds_arrays(path: Path) -> bool:
    """Returns whether a path's name is that of a file of arrays."""
    return path.suffix.lower() in ARRAYS


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Reads every array of a file by key. Raises DataError for one that is missing, of another format or damaged."""
    if not path.is_file():
        raise DataError(f"no data file at {path}; {FORMATS} is read here", "missing-file")
    if not holds_arrays(path):
        raise DataError(f"{path} is no file of arrays: {FORMATS} is read here", "format")
    try:
        if path.suffix.lower() == ".safetensors":
            found: dict[str, np.ndarray] = load_file(path)
            return found
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as opened:
            return dict(opened)
    except Exception as error:  # a damaged file makes zip, zlib, numpy and safetensors raise errors of a dozen classes
        raise DataError(f"{path} cannot be read as arrays: {printable(str(error), 160)}", "unreadable") from error


def checked_arrays(path: Path, given: Mapping[str, np.ndarray], arrays: Sequence[Array]) -> dict[str, np.ndarray]:
    """Returns the arrays that are read, as complex64 or float32. Raises DataError, which names the axes that are meant."""
    meant = "; ".join(array.meaning + ("" if array.required else " (may be absent)") for array in arrays)
    found, lengths = dict[str, np.ndarray](), dict[str, int]()
    for array in arrays:
        if array.key not in given:
            if array.required:
                other = nearest(array.key, given) if given else "it has no array at all"
                raise DataError(f"{path} has no array {array.key!r} ({other}). Meant are: {meant}", "missing-field")
            continue
        numbers = _as_numbers(given[array.key], array)
        shape = list(given[array.key].shape)
        if numbers is None:
            raise DataError(f"{path}: {array.key!r} is {given[array.key].dtype} {shape}. Meant are: {meant}", "axes")
        for axis, length in zip(array.axes, numbers.shape, strict=True):
            if not length or lengths.setdefault(axis, length) != length:
                why = f"{lengths[axis]} {axis} in another array" if length else f"no {axis}"
                raise DataError(f"{path}: {array.key!r} is {shape}, with {why}. Meant are: {meant}", "axes")
        found[array.key] = numbers
    return found


def _as_numbers(given: np.ndarray, array: Array) -> np.ndarray | None:
    """Returns an array as complex64 or float32; None if its axes or numbers are others than are meant."""
    axes, is_complex = len(array.axes), np.iscomplexobj(given)
    if given.dtype.kind not in "fiuc" or (is_complex and not array.is_complex):
        return None
    if array.is_complex and not is_complex:
        if given.ndim != axes + 1 or given.shape[-1] != 2:
            return None
        parts = given.astype(np.float32)
        return parts[..., 0] + np.complex64(1j) * parts[..., 1]
    return given.astype(np.complex64 if is_complex else np.float32) if given.ndim == axes else None


def fault_of(arrays: Mapping[str, np.ndarray]) -> str:
    """Says why the arrays of one sample cannot be used; empty if they can."""
    for key, array in arrays.items():
        if not np.isfinite(array).all():
            return f"{key!r} holds a number that is not finite"
        if np.iscomplexobj(array) and not array.any():
            return f"{key!r} has no power: all its numbers are 0"
    return ""
