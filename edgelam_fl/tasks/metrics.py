"""Measures of the answers that a model gives to held-out questions, against the true ones. Knows texts alone: no tokens, no models.

A metric of one's own is a function of two texts, the answer and the true one, that returns a number of at least 0. Whoever owns a
node says from which modules such functions may come: a run file's word alone never makes a node import anything.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from edgelam_fl.bounds import Bounds
from edgelam_fl.errors import ConfigError, Mismatch, nearest

Metric = Callable[[str, str], float]  # the answer, the true answer -> at least 0; its mean over the answers is reported

_WORD = re.compile(r"\w+")
ANSWERS = "answers"  # name of the number of answers, among a report's sums
_OF_ANSWERS = f"{ANSWERS}/"  # begins the names of the metrics' sums there


def exact_match(answer: str, truth: str) -> float:
    """Returns 1 if the two are equal but for blanks around them, else 0."""
    return float(answer.strip() == truth.strip())


def rouge_l(answer: str, truth: str) -> float:
    """Returns the F1 of ROUGE-L (Lin, 2004): of the longest common subsequence of words, whatever their case; 0 without words.

    As Google's rouge_score without stemming, but for words: any letters and digits make them, not a to z and 0 to 9 alone.
    """
    said, true = (_WORD.findall(text.casefold()) for text in (answer, truth))
    common = _longest_common(said, true)
    return 2 * common / (len(said) + len(true)) if common else 0.0


def _longest_common(left: Sequence[str], right: Sequence[str]) -> int:
    """Returns the length of the longest sequence of words that both hold in this order, perhaps with others between."""
    row = [0] * (len(right) + 1)
    for word in left:
        before = 0  # of the row above, one place to the left
        for place, other in enumerate(right, 1):
            above = row[place]
            row[place] = before + 1 if word == other else max(above, row[place - 1])
            before = above
    return row[-1]


BUILT_IN: Mapping[str, Metric] = {"exact_match": exact_match, "rouge_l": rouge_l}


def check_metrics(names: Iterable[str]) -> None:
    """Raises ConfigError for a name that is neither a built-in metric nor MODULE:FUNCTION. Imports nothing."""
    for name in names:
        module, colon, function = name.partition(":")
        if name in BUILT_IN or (colon and all(part.isidentifier() for part in (*module.split("."), function))):
            continue
        raise ConfigError(
            f"task.metrics: {name!r} is not known ({nearest(name, BUILT_IN)}), nor package.module:function"
        )


def load_metrics(names: Sequence[str], bounds: Bounds) -> dict[str, Metric]:
    """Returns the metrics by name. `bounds`: the modules that functions of one's own may come from.

    Raises ConfigError as `check_metrics`, and Mismatch for a module that is not allowed here, or lacks the function.
    """
    check_metrics(names)
    return {name: BUILT_IN.get(name) or _own(name, bounds) for name in names}


def _own(name: str, bounds: Bounds) -> Metric:
    module, _, function = name.partition(":")
    if not bounds.allows_module(module):
        raise Mismatch(
            f"task.metrics: {name!r} is not imported here, since the node's operator did not allow it; `edgelam client --metrics "
            f"{module}` does"
        )
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ImportError as error:
        raise Mismatch(
            f"task.metrics: {name!r}: the module cannot be imported here ({type(error).__name__})"
        ) from error
    if not callable(found):
        raise Mismatch(f"task.metrics: {name!r}: the module has no such function here")

    def metric(answer: str, truth: str) -> float:
        try:
            value = float(found(answer, truth))
        except Exception as error:
            raise ConfigError(f"task.metrics: {name!r} failed on an answer: {type(error).__name__}: {error}") from error
        if not 0 <= value < math.inf:
            raise ConfigError(f"task.metrics: {name!r} returned {value}; allowed: numbers of at least 0")
        return value

    return metric


def sums_of(answers: Sequence[tuple[str, str]], metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Returns the number of answers and the sum of each metric over them, under the names of a report. `answers`: with the true ones."""
    sums = {_OF_ANSWERS + name: math.fsum(metric(*pair) for pair in answers) for name, metric in metrics.items()}
    return {ANSWERS: float(len(answers)), **sums}


def means_of(sums: Mapping[str, float]) -> dict[str, float]:
    """Returns the mean of each metric from a report's sums, by name in order; empty if nothing was answered."""
    answers = sums.get(ANSWERS, 0.0)
    if not answers > 0:
        return {}
    return {
        name.removeprefix(_OF_ANSWERS): sums[name] / answers for name in sorted(sums) if name.startswith(_OF_ANSWERS)
    }
