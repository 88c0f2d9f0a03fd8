"""A new task is one file and one line: a task written to a file here trains over a split model as the built-in ones do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgelam_fl.config import TaskSection
from edgelam_fl.errors import ConfigError
from edgelam_fl.model.adapter import initial_adapter
from edgelam_fl.model.source import ModelSource
from edgelam_fl.tasks.kinds import TASKS, TaskKind, check_task, make_task
from tests.fleet import check_done, joined, memory_fleet
from tests.support import run_config

# Learns which letter an answer begins with: one label per example, at its last position.
FIRST_LETTER = """
import torch
from torch.nn import functional

from edgelam_fl.tasks.base import Example, Made, Unit, cut, pad


class FirstLetter:
    def __init__(self, tokenizer_folder, settings):
        self.most = settings.max_tokens

    def examples(self, pairs):
        return Made([Example(list(prompt.encode()[: self.most]), [answer.encode()[0]], 1) for prompt, answer in pairs])

    def units(self, examples, pieces):
        return [
            Unit(
                pad([row.ids for row in rows], 0),
                torch.tensor([[len(row.ids) - 1, row.labels[0]] for row in rows]),
                [len(row.ids) for row in rows],
                len(rows),
            )
            for rows in cut(examples, pieces)
        ]

    def loss_rows(self, labels):
        return None

    def loss(self, output, labels, rows=None, *, training=False):
        last_BV = output[torch.arange(len(output)), labels[:, 0]].float()
        return functional.cross_entropy(last_BV, labels[:, 1], reduction="sum"), {}
"""


@pytest.fixture
def first_letter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "first_letter.py").write_text(FIRST_LETTER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(TASKS, "first-letter", TaskKind("first_letter:FirstLetter"))


@pytest.mark.usefixtures("first_letter")
def test_a_task_is_one_file_and_one_line(tiny: ModelSource, data_files: list[Path]) -> None:
    config = run_config(tiny.name, "task.kind=first-letter", "task.template=plain", "optimizer.lr=0.01")
    check_task(config.task)
    adapter = initial_adapter(tiny, config.lora.targets, config.lora.rank, config.run.seed)
    with memory_fleet(tiny, config, data_files[:1]) as fleet:
        reports = fleet.run(adapter, 3)
    check_done(reports)
    losses = [step.loss_sum / step.labels for step in reports["device-1"].steps]
    assert [step.labels for step in reports["device-1"].steps] == [config.federation.batch_size] * 3
    assert losses[0] == pytest.approx(np.log(tiny.config["vocab_size"]), rel=0.2), "nothing is known of the letters yet"
    assert losses[-1] < losses[0]
    trained = joined(reports)
    assert any(not np.array_equal(trained[name], adapter[name]) for name in trained if "lora_B" in name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (TaskSection(kind="clasification"), "task.kind = 'clasification' is not known: did you mean 'classification'?"),
        (
            TaskSection(loss_on="assistant", template="plain"),
            "task.loss_on = 'assistant' learns every answer of a chat and needs task.template = 'chat', got 'plain'; 'answer' or "
            "'all' go with it",
        ),
        (TaskSection(classes=("a", "b")), "task.classes is for task.kind = 'classification', got 'causal-lm'"),
        (
            TaskSection(kind="classification", classes=("a", "b", "a")),
            "task.classes = ['a', 'b', 'a'] must name at least 2 classes, each once",
        ),
        (TaskSection(kind="classification"), "task.classes = [] must name at least 2 classes, each once"),
    ],
)
def test_a_task_that_cannot_be_made_says_why(settings: TaskSection, message: str) -> None:
    for refuse in (check_task, lambda wrong: make_task(wrong, Path("none"))):
        with pytest.raises(ConfigError) as caught:
            refuse(settings)
        assert str(caught.value) == message
