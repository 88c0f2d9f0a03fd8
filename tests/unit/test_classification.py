from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from edgelam_fl.config import TaskSection
from edgelam_fl.errors import ConfigError, DataError
from edgelam_fl.tasks.classification import Classification
from edgelam_fl.tasks.kinds import make_task

CLASSES = ("animal", "plant", "person")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of whole words that writes [CLS] ... [SEP], as a BERT's does."""
    vocabulary = {word: n for n, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "big", "green", "one"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    folder = tmp_path_factory.mktemp("words")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)
    return folder


def task(folder: Path, max_tokens: int = 64, too_long: Literal["cut-prompt", "skip"] = "cut-prompt") -> Classification:
    settings = TaskSection(kind="classification", max_tokens=max_tokens, classes=CLASSES, too_long=too_long)
    made = make_task(settings, folder)
    assert isinstance(made, Classification)
    return made


def test_a_text_gets_special_tokens_and_its_class_a_number(words: Path) -> None:
    first, second = task(words).examples([("a big one", "plant"), ("a", "animal")]).examples
    assert (first.ids, first.labels, first.count) == ([2, 4, 5, 7, 3], [1], 1)
    assert (second.ids, second.labels, second.count) == ([2, 4, 3], [0], 1)


def test_a_long_text_is_cut_and_still_ends_as_a_text_does(words: Path) -> None:
    made = task(words, max_tokens=8).examples([("a " * 20, "plant"), ("a", "plant")])
    example, _ = made.examples
    assert (made.cut, made.skipped) == (1, 0)
    assert example.ids == [2] + [4] * (8 - 2) + [3]
    skipping = task(words, max_tokens=8, too_long="skip").examples([("a " * 20, "plant"), ("a", "animal")])
    assert [example.labels for example in skipping.examples] == [[CLASSES.index("animal")]]
    assert (skipping.cut, skipping.skipped) == (0, 1)


def test_units_carry_a_label_a_row(words: Path) -> None:
    language = task(words)
    pairs = [("a big green one", "person"), ("a", "plant"), ("a one", "animal")]
    units = language.units(language.examples(pairs).examples, 2)
    assert [unit.row_lengths for unit in units] == [[3, 4], [6]]
    assert units[0].inputs.tolist() == [[2, 4, 3, 0], [2, 4, 7, 3]]
    assert [unit.labels.tolist() for unit in units] == [[1, 0], [2]]
    assert [unit.count for unit in units] == [2, 1]


def test_the_loss_is_a_sum_over_rows_and_comes_with_the_hits() -> None:
    logits, labels = torch.tensor([[2.0, 0.0, 1.0], [0.0, 0.5, 3.0]]), torch.tensor([0, 1])
    by_hand = sum(
        -math.log(math.exp(row[label]) / sum(map(math.exp, row)))
        for row, label in zip(logits.tolist(), labels.tolist(), strict=True)
    )
    loss, others = task(Path("none")).loss(logits.bfloat16(), labels)
    assert float(loss) == pytest.approx(by_hand, rel=1e-6)
    assert (loss.dtype, others) == (torch.float32, {"correct": 1})


def test_smoothing_is_torchs_and_for_what_is_learned_alone() -> None:
    logits, labels = torch.tensor([[2.0, 0.0, 1.0], [0.0, 0.5, 3.0]]), torch.tensor([0, 1])
    made = make_task(TaskSection(kind="classification", classes=CLASSES, label_smoothing=0.3), Path("none"))
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=0.3)
    assert torch.equal(made.loss(logits, labels, training=True)[0], expected)
    assert torch.equal(made.loss(logits, labels)[0], task(Path("none")).loss(logits, labels)[0])


def test_an_unknown_class_is_named_with_the_nearest(words: Path) -> None:
    with pytest.raises(DataError, match=r"'plants' is none of task\.classes \(did you mean 'plant'\?\)"):
        task(words).examples([("a", "plants")])


@pytest.mark.parametrize("classes", [(), ("one",), ("one", "two", "one")])
def test_classes_are_two_at_least_and_differ(classes: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"task\.classes = .* must name at least 2 classes, each once"):
        make_task(TaskSection(kind="classification", classes=classes), Path("none"))
