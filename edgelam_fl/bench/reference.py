"""What the federations are held against: TF-IDF with logistic regression, and one device that has all data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from edgelam_fl.bench.datasets import Data
from edgelam_fl.bench.matrix import Matrix


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
