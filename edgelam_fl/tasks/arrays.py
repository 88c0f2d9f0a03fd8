"""Reads a device's file of arrays as samples, and splits those that are learned from those that are only measured.

A file holds one array per key, whose first axis is over samples. Knows keys and axes; knows no channels and no task.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from edgelam_fl.errors import DataError, nearest
from edgelam_fl.names import printable
from edgelam_fl.tasks.data import DataSettings, DevicePairs
from edgelam_fl.tasks.files import ARRAYS
from edgelam_fl.tasks.held_out import sample, set_aside

FORMATS = f"a {' or '.join(ARRAYS)} file of arrays"
SAMPLES = "samples"  # the first axis of every array


@dataclass(frozen=True)
class Array:
    """One array that a task reads from a file. Axes of the same name have the same length in all arrays of a file."""

    key: str
    axes: tuple[str, ...]  # the first is SAMPLES
    is_complex: bool = True  # complex numbers, or real ones with real and imaginary part as a further, last axis of 2
    required: bool = True

    @property
    def meaning(self) -> str:
        """The array in words: its axes and numbers."""
        numbers = "complex (or real, with real and imaginary part as a last axis of 2)" if self.is_complex else "real"
        return f"{self.key!r} [{', '.join(self.axes)}], {numbers}"


@dataclass(frozen=True)
class Sample:
    """One sample of a file of arrays; two are equal if all their numbers are."""

    number: int = field(compare=False)
    """Its place in the file, from 0."""
    arrays: Mapping[str, np.ndarray] = field(compare=False)
    """By key, without the axis over samples: complex64 or float32. What is not required may be absent."""
    digest: str
    """Of its numbers: what is drawn for a sample follows from it, wherever the sample is in a file."""


def place_of(number: int) -> str:
    """Returns the place of a sample in words, as messages have it."""
    return f"sample {number}"


def holds_arrays(path: Path) -> bool:
    """Returns whether a path's name is that of a file of arrays."""
    return path.suffix.lower() in ARRAYS


def device_samples(
    path: Path, settings: DataSettings, arrays: Sequence[Array], eval_file: Path | None = None
) -> DevicePairs:
    """Reads a device's file and splits its samples as `tasks.data.device_pairs` does examples: the content alone decides.

    `arrays`: what the task reads. `eval_file`: has the samples to measure. Raises DataError for a file that does not fit.
    """
    training, bad, unread = _read(path, settings, arrays)
    also_learned = 0
    if eval_file is None:
        held_out = set(set_aside(list(map(_key, training)), settings.held_out)[1])  # equal samples are on one side
        measured = [one for one in training if _key(one) in held_out]
        training = [one for one in training if _key(one) not in held_out]
    else:
        measured, more_bad, _ = _read(eval_file, settings, arrays)
        bad += tuple(f"evaluation file, {place}" for place in more_bad)
        learned = set(map(_key, training))
        also_learned = sum(_key(one) in learned for one in measured)
    most = getattr(settings, "evaluate_examples", 0)  # callers may know only the keys that every run has
    kept = set(sample(list(map(_key, measured)), most))
    sampled = [one for one in measured if _key(one) in kept]
    read = tuple(training[0].arrays)
    return DevicePairs(training, sampled, bad, unread, len(measured) - len(sampled), also_learned, read)


def _key(one: Sample) -> tuple[str, str]:
    """Returns what stands for a sample in the place of a question and its answer."""
    return one.digest, one.digest


def _read(
    path: Path, settings: DataSettings, arrays: Sequence[Array]
) -> tuple[list[Sample], tuple[str, ...], tuple[str, ...]]:
    """Returns the samples of a file, the places of bad ones that are left out, and the keys that nothing reads."""
    given = read_arrays(path)
    known = _checked(path, given, arrays)
    samples, bad = list[Sample](), list[str]()
    for number in range(len(next(iter(known.values())))):
        each = {key: array[number] for key, array in known.items()}
        if words := _fault(each):
            place = place_of(number)
            if getattr(settings, "bad_lines", "refuse") != "skip":
                way_out = "(data.bad_lines = 'skip' leaves such samples out)"
                raise DataError(f"{path}, {place}: {words} {way_out}", "numbers", place)
            bad.append(place)
            continue
        samples.append(Sample(number, each, _digest(each)))
    if not samples:
        raise DataError(f"{path} holds no sample that can be used; at least 1 is needed", "few-examples")
    return samples, tuple(bad), tuple(sorted(given.keys() - known.keys()))


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Reads every array of a file by key. Raises DataError for one that is missing, of another format or damaged."""
    if not path.is_file():
        raise DataError(f"no data file at {path}; this task takes {FORMATS}", "missing-file")
    if not holds_arrays(path):
        raise DataError(f"{path} is no file of arrays: this task takes {FORMATS}", "format")
    try:
        if path.suffix.lower() == ".safetensors":
            found: dict[str, np.ndarray] = load_file(path)
            return found
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as opened:
            return dict(opened)
    except Exception as error:  # a damaged file makes zip, zlib, numpy and safetensors raise errors of a dozen classes
        raise DataError(f"{path} cannot be read as arrays: {printable(str(error), 160)}", "unreadable") from error


def _checked(path: Path, given: Mapping[str, np.ndarray], arrays: Sequence[Array]) -> dict[str, np.ndarray]:
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


def _fault(arrays: Mapping[str, np.ndarray]) -> str:
    """Says why a sample cannot be used; empty if it can."""
    for key, array in arrays.items():
        if not np.isfinite(array).all():
            return f"{key!r} holds a number that is not finite"
        if np.iscomplexobj(array) and not array.any():
            return f"{key!r} has no power: all its numbers are 0"
    return ""


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    total = hashlib.sha256()
    for key, array in arrays.items():
        total.update(f"{key}\0{array.shape}\0".encode())
        total.update(np.ascontiguousarray(array).data)
    return total.hexdigest()
