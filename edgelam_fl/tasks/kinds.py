"""The tasks by the name that a run file has for them: a new one is one file and one line here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgelam_fl.tasks.base import Task
from edgelam_fl.tasks.causal_lm import CausalLm
from edgelam_fl.tasks.classification import Classification


def make_task(
    kind: str,
    tokenizer_folder: Path,
    *,
    template: str,
    max_tokens: int,
    loss_on: str,
    classes: Sequence[str] = (),
    weighting: str = "labels",
) -> Task:
    """The task of a run file's [task] section: `kind` "causal-lm" or "classification"."""
    if kind == "classification":
        return Classification(tokenizer_folder, max_tokens=max_tokens, classes=classes)
    return CausalLm(
        tokenizer_folder, template=template, max_tokens=max_tokens, loss_on=loss_on, weighting=weighting or "labels"
    )
