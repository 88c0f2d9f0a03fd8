"""Deals a data set to devices. Pure functions of rows, a partition's text and a seed; knows no files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edgelam_fl.errors import ConfigError

KINDS = (
    "'iid', 'dirichlet:ALPHA' (label skew; ALPHA above 0, as 0.1) or 'size:SIGMA' (size skew, log-normal; as 1.0); "
    "'IidPartitioner' and 'DirichletPartitioner:ALPHA' are the first two"
)
# Names in the library flwr-datasets, which deal alike: shares of each label from one draw, without balancing.
_OF_FLOWER = {"IidPartitioner": "iid", "DirichletPartitioner": "dirichlet"}
LEAST = 8
"""Examples that a device of a matrix has at least."""
_DRAWS = 10_000


def check_partition(partition: str, path: Path | str = "the matrix") -> tuple[str, float]:
    """Splits a partition into (kind, parameter). Raises ConfigError with the forms that are allowed."""
    name, colon, text = partition.partition(":")
    kind = _OF_FLOWER.get(name, name)
    try:
        value = float(text) if colon else 0.0
    except ValueError:
        value = math.nan
    fits = not colon if kind == "iid" else kind in ("dirichlet", "size") and value > 0 and math.isfinite(value)
    if not fits:
        raise ConfigError(f"axes.partition = {partition!r} in {path} must be {KINDS}")
    return kind, value


def deal(
    answers: Sequence[str], devices: int, partition: str, seed: int, least: int = LEAST, asked: str = ""
) -> list[list[int]]:
    """Returns the numbers of each device's examples. answers: those of all examples; the labels of a label skew.

    least: examples of the device with the fewest; a draw that leaves one fewer is repeated. asked: what asks for the partition, for
    messages; empty: a matrix. Raises ConfigError if the examples are too few for the devices or the skew.
    """
    kind, value = check_partition(partition)
    if len(answers) < least * devices:
        raise ConfigError(
            f"{len(answers)} training examples are too few for {devices} devices ({asked or 'bench.devices'}): each needs {least}"
        )
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(answers))
    for _ in range(_DRAWS if kind != "iid" else 1):
        if kind == "dirichlet":
            parts = _by_label(np.array(answers)[order], devices, value, rng)
        else:
            shares = rng.lognormal(0.0, value, devices) if kind == "size" else np.ones(devices)
            parts = np.split(np.arange(len(order)), _borders(shares, len(order)))
        if min(map(len, parts)) >= least:
            return [[int(number) for number in order[np.sort(part)]] for part in parts]
    raise ConfigError(
        f"{asked or f'axes.partition = {partition!r}'} leaves a device with fewer than {least} of {len(answers)} examples in each of "
        f"{_DRAWS} draws; take fewer devices or a weaker skew"
    )


def _by_label(labels: np.ndarray, devices: int, alpha: float, rng: np.random.Generator) -> list[np.ndarray]:
    """Deals each label's examples in shares from a symmetric Dirichlet distribution (arXiv 1909.06335, by label)."""
    parts: list[list[np.ndarray]] = [[] for _ in range(devices)]
    for label in np.unique(labels):
        (rows,) = np.nonzero(labels == label)
        for device, piece in enumerate(np.split(rows, _borders(rng.dirichlet([alpha] * devices), len(rows)))):
            parts[device].append(piece)
    return [np.concatenate(pieces) for pieces in parts]


def _borders(shares: np.ndarray, total: int) -> np.ndarray:
    return np.round(np.cumsum(shares)[:-1] / shares.sum() * total).astype(int)
