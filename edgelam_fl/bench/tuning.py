"""Chooses settings for each strategy of a matrix, on a seed and on examples that no cell of the matrix is measured with.

The tries are a matrix of their own, whose strategies bring the settings in their names ("fedavg optimizer.lr=0.002"); so do the
chosen strategies of the matrix itself, and the tables say which settings these are. Knows no processes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from edgelam_fl.bench.datasets import Data
from edgelam_fl.bench.matrix import Axes, Matrix, Tune
from edgelam_fl.bench.tables import Lines, quality
from edgelam_fl.config import toml_value
from edgelam_fl.errors import RunFailed


def tries(matrix: Matrix) -> Matrix:
    """Returns the matrix of all tries: each strategy with each combination of the settings to choose from, on the seed of [tune]."""
    values = [f"{name} {settings}" for name in _strategies(matrix) for settings in _combinations(matrix.tune)]
    bench = matrix.bench.model_copy(update={"references": False})
    axes = _with(matrix.axes, matrix.compared, values, seed=(matrix.tune.seed,))
    return replace(matrix, name=f"{matrix.name}, tuning", bench=bench, axes=axes, tune=Tune())


def held_back(data: Data, tune: Tune) -> Data:
    """Returns the data of the tries: a share of the training examples takes the place of the test set."""
    count = max(1, round(tune.share * len(data.training)))
    return Data(data.training[count:], data.training[:count], data.classes, data.arrays)


def tuned(matrix: Matrix, lines: Lines) -> Matrix:
    """Returns the matrix with the best settings of each strategy in its name, by the mean over all else that varies.

    lines: of all cells of `tries`. Raises RunFailed if no try of a strategy was finished.
    """
    axis = matrix.compared
    found: dict[str, list[float]] = {}
    for cell in tries(matrix).cells():
        line = lines.get(cell.name, {})
        if line.get("state") == "done":
            found.setdefault(cell.values[axis], []).append(quality(line))
    most = max(map(len, found.values()), default=0)  # a try that failed somewhere cannot be compared
    best = {}
    for name in _strategies(matrix):
        scores = {
            value: fmean(found[value])
            for value in (f"{name} {settings}" for settings in _combinations(matrix.tune))
            if len(found.get(value, [])) == most > 0
        }
        if not scores:
            raise RunFailed(f"no settings could be chosen for {name}: every try failed; run the command again")
        best[name] = max(scores, key=lambda value: scores[value])
    bench = matrix.bench.model_copy(update={"baseline": best[matrix.bench.baseline]})
    return replace(matrix, bench=bench, axes=_with(matrix.axes, axis, [*best.values()]))


def _strategies(matrix: Matrix) -> tuple[str, ...]:
    values: tuple[str, ...] = getattr(matrix.axes, matrix.compared)
    return values


def _combinations(tune: Tune) -> list[str]:
    """Lists all combinations of the settings, each as an axis has it behind a strategy's name."""
    settings = [
        [f"{key}={toml_value(value).replace(' ', '')}" for value in values] for key, values in tune.keys.items()
    ]
    return [" ".join(one) for one in itertools.product(*settings)]


def _with(axes: Axes, axis: str, values: Sequence[str], **more: tuple[int, ...]) -> Axes:
    return axes.model_copy(update={axis: tuple(values), **more})
