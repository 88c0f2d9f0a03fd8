from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from edgelam_fl.errors import ConfigError, DataError
from edgelam_fl.model.source import ModelSource
from edgelam_fl.node.examples import DeviceExamples
from edgelam_fl.tasks.base import Example
from edgelam_fl.tasks.causal_lm import IGNORED, CausalLm, labelled, loss_rows, loss_sum, make_units, sum_of_means
from edgelam_fl.tasks.data import Chat
from edgelam_fl.wire import edgelam_pb2 as pb


def task(
    source: ModelSource,
    template: str = "chat",
    max_tokens: int = 64,
    loss_on: str = "answer",
    weighting: str = "labels",
    too_long: str = "cut-prompt",
) -> CausalLm:
    settings = pb.TaskSettings(
        template=template, max_tokens=max_tokens, loss_on=loss_on, weighting=weighting, too_long=too_long
    )
    return CausalLm(source.folder, settings)


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
    (example,) = language.examples([("Why?", "So.")]).examples
    learned = [label for label in example.labels if label != IGNORED]
    assert language.prompt_text("Why?") == prompt
    if answer is None:  # the tiny template writes no generation prompt in front of an answer
        assert language.tokenizer.decode(learned).endswith("So.</s>")
    else:
        assert language.tokenizer.decode(learned) == answer
        assert language.tokenizer.decode(example.ids) == prompt + answer
    assert example.labels[-len(learned) :] == example.ids[-len(learned) :] == learned
    assert example.count == len(learned)


def test_a_prompt_that_looks_like_the_template_stays_text(tiny: ModelSource) -> None:
    assert task(tiny, "{prompt} -> {answer}").prompt_text("x {answer}") == "x {answer} -> "


def test_a_passage_is_learned_whole_and_has_nothing_before_it(tiny: ModelSource) -> None:
    language = task(tiny, "plain", loss_on="all")
    (example,) = language.examples([("", "It is so.")]).examples
    assert language.tokenizer.decode(example.ids) == "It is so.</s>"
    assert example.labels == example.ids


def test_a_chat_goes_through_the_models_template(tiny: ModelSource) -> None:
    language = task(tiny, max_tokens=128)
    turns = [("system", "Be short."), ("user", "Why?"), ("assistant", "So."), ("user", "So?"), ("assistant", "Yes.")]
    chat = Chat(tuple({"role": role, "content": content} for role, content in turns))
    (example,) = language.examples([(chat, "Yes.")]).examples
    prompt = "<system>Be short.</s><user>Why?</s><assistant>So.</s><user>So?</s><assistant>"
    assert language.prompt_text(chat) == prompt
    assert language.tokenizer.decode(example.ids) == prompt + "Yes.</s>"
    assert language.tokenizer.decode([label for label in example.labels if label != IGNORED]) == "Yes.</s>"
    with pytest.raises(DataError, match=r"a chat needs task\.template = 'chat', got 'plain'"):
        task(tiny, "plain").examples([(chat, "Yes.")])


def test_chat_templates_that_cannot_serve_say_why(tiny: ModelSource) -> None:
    language = task(tiny)
    for template, kind, expected in [
        (None, ConfigError, "the model has no chat template; set 'plain' or a text"),
        ("{{ raise_exception('no system') }}", DataError, "refuses a chat of user, assistant: no system"),
        ("{{ messages[-1]['content'] }}", DataError, r"leaves out or changes a message of 'user' \('Why\?'\)"),
        ("{% for m in messages %}{{ m['content'] | replace('So', 'Yes') }}{% endfor %}", DataError, r"leaves out an answer \('So\.'\)"),
        ("{% for m in messages %}", ConfigError, "the model's chat template is not readable"),
        ({"rag": "{{ messages }}", "tool_use": "{{ messages }}"}, ConfigError, r"several chat templates \(rag, tool_use\) and none is named 'default'"),
    ]:  # fmt: skip
        language.tokenizer.chat_template = template
        with pytest.raises(kind, match=expected):
            language.examples([("Why?", "So.")])


def test_loss_on_all_learns_every_token_but_the_first(tiny: ModelSource) -> None:
    (example,) = task(tiny, "plain", loss_on="all").examples([("Why?", "So.")]).examples
    assert example.labels == example.ids
    assert example.count == len(example.ids) - 1


@pytest.mark.parametrize(
    ("answer", "too_long", "text", "learned", "counts"),
    [
        ("So.", "cut-prompt", "hy?\nSo.</s>", "So.</s>", (1, 1, 0)),
        ("So.", "cut-end", "Why?\nSo.", "So.", (1, 1, 0)),
        ("So.", "skip", None, None, (0, 0, 1)),
        ("So it is so.", "cut-prompt", "hy?\nSo i", "So i", (1, 1, 0)),
        ("So it is so.", "cut-end", "Why?\nSo ", "So ", (1, 1, 0)),
        ("So", "cut-end", "Why?\nSo</s>", "So</s>", (1, 0, 0)),
    ],
)
def test_what_becomes_of_an_example_that_is_too_long(
    tiny: ModelSource, answer: str, too_long: str, text: str | None, learned: str | None, counts: tuple[int, int, int]
) -> None:
    language = task(tiny, "plain", max_tokens=8, too_long=too_long)
    made = language.examples([("Why?", answer)])
    assert (len(made.examples), made.cut, made.skipped) == counts
    for example in made.examples:
        assert language.tokenizer.decode(example.ids) == text
        assert language.tokenizer.decode([label for label in example.labels if label != IGNORED]) == learned
        assert len(example.labels) == len(example.ids) <= 8


def test_the_oldest_turns_of_a_long_chat_go_and_the_systems_message_stays(tiny: ModelSource) -> None:
    turns = [("system", "Be."), *[("user", "a" * 20), ("assistant", "b")] * 9, ("user", "Why?"), ("assistant", "So.")]
    chat = Chat(tuple({"role": role, "content": content} for role, content in turns))
    language = task(tiny, max_tokens=100)
    made = language.examples([(chat, "So.")])
    (example,) = made.examples
    older = f"<user>{'a' * 20}</s><assistant>b</s>"
    assert language.tokenizer.decode(example.ids) == f"<system>Be.</s>{older}<user>Why?</s><assistant>So.</s>"
    assert (made.cut, made.skipped) == (1, 0)
    (example,) = task(tiny, max_tokens=20).examples([(chat, "So.")]).examples
    assert language.tokenizer.decode(example.ids) == "Why?</s><assistant>So.</s>", (
        "then the oldest tokens of the last turn"
    )


def test_examples_without_room_for_an_answer_are_counted_and_none_left_is_an_error(
    tiny: ModelSource, tmp_path: Path
) -> None:
    language = task(tiny, "plain", max_tokens=8, too_long="cut-end")
    made = language.examples([("12345678", "x"), ("1", "x"), ("1", "so many more")])
    assert (len(made.examples), made.cut, made.skipped) == (2, 1, 1)
    file = tmp_path / "data.jsonl"
    file.write_text("".join(f'{{"question": "1234567{n}", "answer": "x{n}"}}\n' for n in range(3)), encoding="utf-8")
    settings = pb.TaskSettings(
        template="plain", max_tokens=8, prompt_field="question", answer_field="answer", held_out=0.3
    )
    with pytest.raises(DataError, match=r"no example has an answer within task\.max_tokens = 8; raise it"):
        DeviceExamples(file).load(language, settings, "m")


def at_loss_rows(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    return logits_BTV.flatten(0, 1)[loss_rows(labels_BT)]


def summed(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    return loss_sum(at_loss_rows(logits_BTV, labels_BT), labels_BT, loss_rows(labels_BT))


def test_the_tokenizer_is_loaded_with_the_first_examples(tiny: ModelSource, tmp_path: Path) -> None:
    """A host that is sent labels has the task and no tokenizer."""
    logits, labels = torch.zeros(2, 5), torch.tensor([[IGNORED, 1, 2]])
    language = CausalLm(tmp_path / "none", pb.TaskSettings(template="plain", max_tokens=8, loss_on="all"))
    assert float(language.loss(logits, labels)[0]) == pytest.approx(2 * math.log(5))
    with pytest.raises(OSError, match="none"):
        language.examples([("a", "b")])


def test_by_examples_each_counts_once_with_its_mean_token_loss(tiny: ModelSource) -> None:
    language = task(tiny, "plain", max_tokens=12, weighting="examples", too_long="cut-end")
    examples = language.examples([("1", "x"), ("1", "so many more"), ("12345678901", "cut away")]).examples
    assert [(labelled(example.labels), example.count) for example in examples] == [(1 + 1, 1), (10, 1)]
    (unit,) = language.units(examples, 1)
    logits = torch.randn(*unit.shape, 300, generator=torch.Generator().manual_seed(1))
    alone = [summed(logits[row : row + 1], unit.labels[row : row + 1]) for row in range(2)]
    loss, others = language.loss(at_loss_rows(logits, unit.labels), unit.labels)
    assert float(loss) == pytest.approx(float(alone[0]) / 2 + float(alone[1]) / 10, rel=1e-6)
    assert (unit.count, others) == (2, {})


@pytest.mark.parametrize("weighting", ["labels", "examples"])
def test_losses_of_parts_of_the_positions_add_up(tiny: ModelSource, weighting: str) -> None:
    language = task(tiny, "plain", weighting=weighting)
    (unit,) = language.units(language.examples([("1", "x"), ("1", "so many more")]).examples, 1)
    logits = torch.randn(*unit.shape, 300, generator=torch.Generator().manual_seed(1))
    rows = language.loss_rows(unit.labels)
    assert rows is not None
    parts = [language.loss(logits.flatten(0, 1)[some], unit.labels, some)[0] for some in rows.split(4)]
    whole = language.loss(at_loss_rows(logits, unit.labels), unit.labels)[0]
    assert len(parts) > 1
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-6)


def test_loss_rows_are_the_positions_before_labels() -> None:
    labels = torch.tensor([[3, 1, IGNORED, 2], [IGNORED, IGNORED, 4, IGNORED]])
    assert loss_rows(labels).tolist() == [0, 2, 4 + 1]
    assert loss_rows(torch.full((2, 3), IGNORED)).tolist() == []


def test_by_examples_each_mean_is_of_smoothed_losses(tiny: ModelSource) -> None:
    settings = pb.TaskSettings(
        template="plain", max_tokens=12, loss_on="all", weighting="examples", label_smoothing=0.3
    )
    logits = torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([[IGNORED, 1, 2]])
    loss, _ = CausalLm(tiny.folder, settings).loss(logits[0, :-1], labels, training=True)
    by_torch = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], label_smoothing=0.3)
    assert float(loss) == pytest.approx(float(by_torch), rel=1e-6)


def test_a_row_without_labels_adds_nothing_to_the_sum_of_means() -> None:
    logits = torch.zeros(2, 3, 5, requires_grad=True)
    labels = torch.tensor([[IGNORED, 1, 2], [3, IGNORED, IGNORED]])
    loss = sum_of_means(at_loss_rows(logits, labels), labels, loss_rows(labels))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(math.log(5))
    assert logits.grad is not None
    assert not logits.grad[1].any()


def some_examples(*lengths: int) -> list[Example]:
    return [Example([length] * length, [IGNORED] + [length] * (length - 1), length - 1) for length in lengths]


def test_units_are_sorted_and_padded_on_the_right() -> None:
    units = make_units(some_examples(5, 2, 4, 3, 1), 2)
    assert [unit.row_lengths for unit in units] == [[1, 2, 3], [4, 5]]
    assert units[0].inputs.tolist() == [[1, 0, 0], [2, 2, 0], [3, 3, 3]]
    assert units[0].labels.tolist() == [[IGNORED] * 3, [IGNORED, 2, IGNORED], [IGNORED, 3, 3]]
    assert [unit.count for unit in units] == [0 + 1 + 2, 3 + 4]


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
    assert float(summed(logits, labels)) == pytest.approx(by_hand, rel=1e-6)
    assert summed(logits.bfloat16(), labels).dtype == torch.float32


def test_sums_of_pieces_are_the_sum_of_the_whole() -> None:
    whole, pieces = make_units(some_examples(2, 3, 5, 9), 1), make_units(some_examples(2, 3, 5, 9), 3)

    def total(units: list) -> float:
        return sum(float(summed(torch.nn.functional.one_hot(u.inputs, 10).float(), u.labels)) for u in units)

    assert total(pieces) == pytest.approx(total(whole), rel=1e-6)
    assert sum(unit.count for unit in pieces) == whole[0].count == 1 + 2 + 4 + 8
