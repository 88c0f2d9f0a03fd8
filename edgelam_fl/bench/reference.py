"""Measures what to compare federations with: TF-IDF with logistic regression, and one device that has all data.

Knows no processes: the one device is a matrix of its own, which `command` runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from edgelam_fl.bench.datasets import Data
from edgelam_fl.bench.matrix import Axes, Matrix
from edgelam_fl.config import RunConfig

ONE_DEVICE = "reference one device, seed "  # and the seed
SEEDS = 3  # of the matrix, the first ones
WHAT_ONE_DEVICE = "one device that has all data, the same layers, as many examples learned as by all devices together"


def one_device(matrix: Matrix) -> Matrix:
    """Returns a matrix of a cell per seed: a federation of one device, which has all data and makes the steps of all devices."""
    federation = dict(matrix.base.get("federation", {}))
    steps = federation.get("local_steps", RunConfig().federation.local_steps)
    federation |= {"local_steps": matrix.bench.devices * steps, "min_nodes": 1, "devices_per_round": 0}
    base = {**matrix.base, "federation": federation, "split": {**matrix.base.get("split", {}), "hosts": 0}}
    axes = Axes(seed=matrix.axes.seed[:SEEDS], rank=matrix.axes.rank[:1])
    return replace(matrix, bench=matrix.bench.model_copy(update={"devices": 1}), axes=axes, base=base)


def measure(
    matrix: Matrix, data: Data, configs: Mapping[str, Any], known: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (name, line) of the references that are not in `known` yet; none for a causal language model."""
    if data.classes and "reference tf-idf" not in known:
        yield "reference tf-idf", {"what": "TF-IDF of 1 and 2 words, logistic regression", "accuracy": tf_idf(data)}


def tf_idf(data: Data) -> float:
    """Returns the accuracy on the test set of a model fitted on all training examples."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(max_iter=1000, C=10.0)
    )
    texts, labels = zip(*data.training, strict=True)
    model.fit(texts, labels)
    return float(model.score(*zip(*data.test, strict=True)))
