"""The demo's data: what is held out on any device can be read in no device's training set."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgelam_fl.tasks.data import read_pairs
from edgelam_fl.tasks.docstrings import normalised
from edgelam_fl.tasks.held_out import set_aside


@pytest.mark.parametrize("held_out", [0.1, 0.25])
def test_no_held_out_answer_stands_in_any_training_set(docstring_files: list[Path], held_out: float) -> None:
    sides = [set_aside(read_pairs(file, "question", "answer"), held_out) for file in docstring_files]
    learned = "\n".join(f"{p}\n{a}" for training, _ in sides for p, a in training)
    learned_normalised = "\n".join(normalised(a) for training, _ in sides for _, a in training)
    measured = [answer for _, held in sides for _, answer in held]
    assert len(measured) > 30
    for answer in measured:
        assert answer not in learned
        assert normalised(answer) not in learned_normalised
    assert len({answer for training, held in sides for _, answer in training + held}) == sum(
        len(training) + len(held) for training, held in sides
    ), "an answer stands twice"
