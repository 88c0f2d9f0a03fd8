"""What the federations are held against: TF-IDF with logistic regression, and one device that has all data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from edgelam_fl.bench.datasets import Data
from edgelam_fl.bench.matrix import Axes, Matrix
from edgelam_fl.config import RunConfig

ONE_DEVICE = "reference one device"
WHAT_ONE_DEVICE = "one device that has all data, the same layers, as many examples learned as by all devices together"


def one_device(matrix: Matrix) -> Matrix:
    """A matrix of one cell: all data on one device, which makes the steps of all, in one federation of its own."""
    federation = dict(matrix.base.get("federation", {}))
    steps = federation.get("local_steps", RunConfig().federation.local_steps)
    federation |= {"local_steps": matrix.bench.devices * steps, "min_nodes": 1, "devices_per_round": 0}
    base = {**matrix.base, "federation": federation, "split": {**matrix.base.get("split", {}), "hosts": 0}}
    axes = Axes(seed=matrix.axes.seed[:1], rank=matrix.axes.rank[:1])
    return replace(matrix, bench=matrix.bench.model_copy(update={"devices": 1}), axes=axes, base=base)


def measure(
    matrix: Matrix, data: Data, configs: Mapping[str, Any], known: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines that are not known yet, by name. Of a causal LM there are none."""
    if data.classes and "reference tf-idf" not in known:
        yield "reference tf-idf", {"what": "TF-IDF of 1 and 2 words, logistic regression", "accuracy": tf_idf(data)}


def tf_idf(data: Data) -> float:
    """Accuracy on the test set, fitted on all training examples."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(max_iter=1000, C=10.0)
    )
    texts, labels = zip(*data.training, strict=True)
    model.fit(texts, labels)
    return float(model.score(*zip(*data.test, strict=True)))
