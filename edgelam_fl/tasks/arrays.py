"""Reads a device's file of arrays as samples, and splits those that are learned from those that are only measured.

A file holds one array per key, whose first axis is over samples. Knows no channels and no task; `array_files` reads the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edgelam_fl.array_files import Array, checked_arrays, fault_of, read_arrays
from edgelam_fl.errors import DataError
from edgelam_fl.tasks.data import DataSettings, DevicePairs
from edgelam_fl.tasks.held_out import sample, set_aside

SAMPLES = "samples"  # the first axis of every array


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


def ranges_of(samples: Sequence[Sample], arrays: Sequence[Array]) -> dict[str, tuple[float, float]]:
    """Returns the least and the greatest of what an array has once per sample, by key, and of the lengths of axes, by their names."""
    found: dict[str, tuple[float, float]] = {}
    for one in samples:
        for array in (array for array in arrays if array.key in one.arrays):
            own = one.arrays[array.key]
            named = zip(array.axes[1:], own.shape, strict=True) if own.ndim else [(array.key, float(own))]
            for name, value in named:
                low, high = found.get(name, (value, value))
                found[name] = min(low, value), max(high, value)
    return found


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
        measured, more_bad, more_unread = _read(eval_file, settings, arrays)
        unread = tuple(dict.fromkeys((*unread, *more_unread)))
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
    known = checked_arrays(path, given, arrays)
    samples, bad = list[Sample](), list[str]()
    for number in range(len(next(iter(known.values())))):
        each = {key: array[number] for key, array in known.items()}
        if words := fault_of(each):
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


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    total = hashlib.sha256()
    for key, array in arrays.items():
        total.update(f"{key}\0{array.shape}\0".encode())
        total.update(np.ascontiguousarray(array).data)
    return total.hexdigest()
