from __future__ import annotations

import math

import pytest
import torch

from edgelam_fl.errors import DataError
from edgelam_fl.model.source import ModelSource
from edgelam_fl.tasks.causal_lm import IGNORED, CausalLm, Example, loss_sum, make_units


def task(source: ModelSource, template: str = "chat", max_tokens: int = 64, loss_on: str = "answer") -> CausalLm:
    return CausalLm(source.folder, template=template, max_tokens=max_tokens, loss_on=loss_on)


@pytest.mark.parametrize(
    ("template", "prompt", "answer"),
    [
        ("chat", "<user>Why?</s><assistant>", None),
        ("plain", "Why?\n", "So.</s>"),
        ("Q: {prompt} A: {answer}", "Q: Why? A: ", "So.</s>"),
    ],
)
def test_labels_stand_on_the_answer_only(tiny: ModelSource, template: str, prompt: str, answer: str | None) -> None:
    language = task(tiny, template)
    (example,) = language.examples([("Why?", "So.")])
    learned = [label for label in example.labels if label != IGNORED]
    assert language.prompt_text("Why?") == prompt
    if answer is None:  # the tiny template writes no generation prompt in front of an answer
        assert language.tokenizer.decode(learned).endswith("So.</s>")
    else:
        assert language.tokenizer.decode(learned) == answer
        assert language.tokenizer.decode(example.ids) == prompt + answer
    assert example.labels[-len(learned) :] == example.ids[-len(learned) :] == learned
    assert example.label_count == len(learned)


def test_a_prompt_that_looks_like_the_template_stays_text(tiny: ModelSource) -> None:
    assert task(tiny, "{prompt} -> {answer}").prompt_text("x {answer}") == "x {answer} -> "


def test_loss_on_all_learns_every_token_but_the_first(tiny: ModelSource) -> None:
    (example,) = task(tiny, "plain", loss_on="all").examples([("Why?", "So.")])
    assert example.labels == example.ids
    assert example.label_count == len(example.ids) - 1


def test_long_examples_are_cut_at_the_end(tiny: ModelSource) -> None:
    language = task(tiny, "plain", max_tokens=8)
    (example,) = language.examples([("Why?", "So it is.")])
    assert language.tokenizer.decode(example.ids) == "Why?\nSo "
    assert (len(example.ids), example.label_count) == (8, 3)


def test_examples_without_room_for_an_answer_go_and_none_left_is_an_error(tiny: ModelSource) -> None:
    language = task(tiny, "plain", max_tokens=8)
    assert len(language.examples([("12345678", "x"), ("1", "x")])) == 1
    with pytest.raises(DataError, match=r"no example has an answer within task\.max_tokens = 8; raise it"):
        language.examples([("12345678", "x")])


def some_examples(*lengths: int) -> list[Example]:
    return [Example([length] * length, [IGNORED] + [length] * (length - 1)) for length in lengths]


def test_units_are_sorted_and_padded_on_the_right() -> None:
    units = make_units(some_examples(5, 2, 4, 3, 1), 2)
    assert [unit.row_lengths for unit in units] == [[1, 2, 3], [4, 5]]
    assert units[0].ids_BT.tolist() == [[1, 0, 0], [2, 2, 0], [3, 3, 3]]
    assert units[0].labels_BT.tolist() == [[IGNORED] * 3, [IGNORED, 2, IGNORED], [IGNORED, 3, 3]]
    assert [unit.label_count for unit in units] == [0 + 1 + 2, 3 + 4]


@pytest.mark.parametrize(("rows", "pieces"), [(8, 2), (7, 3), (2, 4), (1, 1)])
def test_pieces_differ_by_one_row_at_most(rows: int, pieces: int) -> None:
    sizes = [len(unit.row_lengths) for unit in make_units(some_examples(*range(1, rows + 1)), pieces)]
    assert (sum(sizes), len(sizes)) == (rows, min(rows, pieces))
    assert max(sizes) - min(sizes) <= 1


def test_the_loss_sum_is_cross_entropy_by_hand() -> None:
    logits = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([[3, 1, IGNORED, 2], [IGNORED, IGNORED, 4, IGNORED]])
    by_hand = 0.0
    for row, position, label in [(0, 0, 1), (0, 2, 2), (1, 1, 4)]:  # position t predicts token t + 1
        scores = [math.exp(float(value)) for value in logits[row, position]]
        by_hand -= math.log(scores[label] / sum(scores))
    assert float(loss_sum(logits, labels)) == pytest.approx(by_hand, rel=1e-6)
    assert loss_sum(logits.bfloat16(), labels).dtype == torch.float32


def test_sums_of_pieces_are_the_sum_of_the_whole() -> None:
    whole, pieces = make_units(some_examples(2, 3, 5, 9), 1), make_units(some_examples(2, 3, 5, 9), 3)

    def total(units: list) -> float:
        return sum(float(loss_sum(torch.nn.functional.one_hot(u.ids_BT, 10).float(), u.labels_BT)) for u in units)

    assert total(pieces) == pytest.approx(total(whole), rel=1e-6)
    assert sum(unit.label_count for unit in pieces) == whole[0].label_count == 1 + 2 + 4 + 8
