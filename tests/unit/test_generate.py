from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from edgelam_fl.config import RunConfig
from edgelam_fl.errors import ConfigError, ModelError
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.serving.before_after import ANSWER_TOKENS, answers_of, check_can_answer
from edgelam_fl.serving.generate import LocalSpeaker, answer, behind, greedy, pieces
from edgelam_fl.serving.results import Result, open_result
from tests.fleet import plain_model
from tests.results import write_result
from tests.support import run_config, write_tiny_llama

END = 9


class Counting:
    """Its likeliest token is one more than the last; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], int]] = []

    def __call__(self, ids: Sequence[int], position: int) -> torch.Tensor:
        self.asked.append((list(ids), position))
        return torch.nn.functional.one_hot(torch.tensor(ids[-1] + 1), 20).float()


def test_the_prompt_goes_whole_then_each_token_alone_at_its_position() -> None:
    step = Counting()
    assert list(greedy(step, [5, 2, 3], 3, {END})) == [4, 5, 6]
    assert step.asked == [([5, 2, 3], 0), ([4], 3), ([5], 4)], "and the last token is not asked about"


def test_it_ends_at_a_stop_token_which_is_not_given_out() -> None:
    assert list(greedy(Counting(), [6], 100, {END})) == [7, 8]
    assert list(greedy(Counting(), [8], 100, {END})) == []


def test_tokens_come_before_the_next_is_asked_for() -> None:
    step = Counting()
    tokens = greedy(step, [1], 100, {END})
    assert next(tokens) == 2
    assert len(step.asked) == 1


def test_a_character_of_several_tokens_comes_whole() -> None:
    data = "aäb€".encode()

    def decode(taken: list[int]) -> str:
        return bytes(taken).decode("utf-8", errors="replace")

    assert list(pieces(iter(data), decode)) == ["a", "ä", "b", "€"]
    assert list(pieces(iter(data[:-1]), decode)) == ["a", "ä", "b", "\ufffd"], "what stays half is shown at the end"


@pytest.mark.parametrize(
    ("given", "said", "expected"),
    [
        ("", ["a", " b"], ["a", " b"]),
        (" ", [" ", "a"], ["a"]),
        (" ", [" a", "b"], ["a", "b"]),
        (" ", ["a", " b"], ["a", " b"]),
        (" <t>\n", ["<", "t", ">\nSo"], ["So"]),
        (" <t>\n", ["<", "u>"], ["<u>"]),
        (" <t>\n", [" <t"], [" <t"]),
        (" <t>\n", [" <t>", "\n"], []),
    ],
)
def test_what_the_template_writes_before_an_answer_is_no_part_of_it(
    given: str, said: list[str], expected: list[str]
) -> None:
    assert list(behind(given, said)) == expected


# ---------------------------------------------------------------- the tiny model


@pytest.fixture
def result(tmp_path: Path, tiny: ModelSource) -> Result:
    return open_result(write_result(tmp_path / "run", tiny))


def speaker_of(config: RunConfig) -> LocalSpeaker:
    return LocalSpeaker(config.model, config.task)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def generated(tiny: ModelSource, result: Result, text: str, tokens: int, *, tuned: bool) -> str:
    """By transformers and peft alone."""
    model: Any = plain_model(tiny, result.config, load_file(result.adapter / "adapter_model.safetensors"))
    tokenizer = speaker_of(result.config)._task.tokenizer
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    model = model if tuned else model.unload()
    made = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=1
    )
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("tuned", [True, False])
def test_answers_are_those_of_generate(tiny: ModelSource, result: Result, tuned: bool) -> None:
    speaker = speaker_of(result.config)
    speaker.put_on(result.adapter)
    conversation = [user("one"), {"role": "assistant", "content": "two"}, user("three")]
    got = "".join(speaker.say(conversation, 24, tuned=tuned))
    text = "<user>one</s><assistant>two</s><user>three</s><assistant>"
    assert got == generated(tiny, result, text, 24, tuned=tuned)
    assert len(got) > 12


def test_the_adapter_changes_the_answer_and_can_be_left_out(result: Result) -> None:
    with_it, without = (answer(result.config, adapter, "Who?", 12) for adapter in (result.adapter, None))
    assert with_it != without
    assert answer(result.config, result.adapter, "Who?", 12) == with_it
    assert "".join(speaker_of(result.config).say([user("Who?")], 12)).strip() == without, "before any is put on"


def test_questions_for_the_page_are_answered_before_and_after_the_run(result: Result) -> None:
    check_can_answer(result, ["Who?"])
    (asked,) = answers_of(result, ["Who?", "Who?"])
    after, before = (answer(result.config, adapter, "Who?", ANSWER_TOKENS) for adapter in (result.adapter, None))
    assert (asked.question, asked.before, asked.after) == ("Who?", before, after)
    assert before != after
    with pytest.raises(ConfigError, match="--ask is empty"):
        check_can_answer(result, ["Who?", " "])


def test_another_adapter_takes_the_place_of_the_first(tmp_path: Path, tiny: ModelSource, result: Result) -> None:
    other = open_result(write_result(tmp_path / "other", tiny, "lora.rank=2"))
    speaker = speaker_of(result.config)
    speaker.put_on(result.adapter)
    speaker.put_on(other.adapter)
    fresh = speaker_of(other.config)
    fresh.put_on(other.adapter)
    assert list(speaker.say([user("Who?")], 12)) == list(fresh.say([user("Who?")], 12))


def test_without_a_chat_template_each_question_stands_alone(tmp_path: Path, tiny: ModelSource) -> None:
    result = open_result(write_result(tmp_path / "plain", tiny, "task.template=plain"))
    speaker = speaker_of(result.config)
    assert not speaker.remembers
    conversation = [user("one"), {"role": "assistant", "content": "two"}, user("three")]
    assert list(speaker.say(conversation, 8)) == list(speaker.say([user("three")], 8))


def test_the_oldest_turns_go_when_the_context_is_full(tiny: ModelSource, result: Result) -> None:
    """One token a byte; the tiny model holds 512."""
    speaker = speaker_of(result.config)
    turns = [user("a" * 150), {"role": "assistant", "content": "b" * 150}] * 2 + [user("c")]
    kept = speaker._opening(turns, 10).ids
    assert kept == speaker._opening(turns[2:], 10).ids
    assert len(kept) <= 512 - 10 < len(speaker._opening(turns, -512).ids)
    said = list(speaker.say(turns, 10))
    assert speaker.omitted[0].startswith("the oldest 1 of 3 turns were left out: ")
    assert speaker.omitted[0].endswith(" holds 512 tokens with the answer")
    assert list(speaker.say(turns[2:], 10)) == said
    assert not any("turns" in remark for remark in speaker.omitted)
    with pytest.raises(
        ConfigError, match=r"the question takes \d+ tokens and the answer up to 10; .* holds 512 together"
    ):
        speaker._opening([user("a" * 600)], 10)


def test_an_answer_ends_at_a_token_that_generation_config_alone_names(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "model", layers=4)
    source = find_model(str(folder))
    result = open_result(write_result(tmp_path / "run", source))
    speaker = speaker_of(result.config)
    with torch.no_grad(), speaker.opened(tuned=False) as step:
        likeliest = list(greedy(step, speaker._opening([user("Who?")], 8).ids, 8, source.stop_ids))
    assert len(likeliest) == 8
    "".join(speaker.say([user("Who?")], 2))
    assert speaker.omitted == ["the answer was cut at 2 tokens (--max-tokens)"]
    settings = json.loads((folder / "generation_config.json").read_text())
    ends = [1, likeliest[3]]
    (folder / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": ends}))
    speaker = speaker_of(result.config)
    said = "".join(speaker.say([user("Who?")], 8))
    before = likeliest[: likeliest.index(likeliest[3])]
    assert said == speaker._task.tokenizer.decode(before, skip_special_tokens=True)
    assert speaker.omitted == []


SETTINGS: dict[str, Any] = {
    "repetition_penalty": {"repetition_penalty": 9.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "bad_words_ids": {"bad_words_ids": [[31], [226, 226]]},
    "suppress_tokens": {"suppress_tokens": list(range(2, 120))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(2, 200))},
    "min_new_tokens": {"min_new_tokens": 20, "eos_token_id": list(range(1, 200))},
    "sequence_bias": {"sequence_bias": [[[77], 4.0], [[88, 99], 9.0]]},
    "several": {
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 3,
        "suppress_tokens": [30, 31],
        "temperature": 0.6,
        "top_k": 5,
    },
}


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """A model of its own, whose settings the tests write."""
    return find_model(str(write_tiny_llama(tmp_path_factory.mktemp("loud"), layers=4)))


def settle(source: ModelSource, settings: dict[str, Any]) -> None:
    (source.folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, **settings}))


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_the_model_are_computed_as_generate_does(loud: ModelSource, name: str) -> None:
    settle(loud, SETTINGS[name])
    config = run_config(loud.name)
    got = answer(config, None, "three of them", 24)
    model: Any = AutoModelForCausalLM.from_pretrained(loud.folder)
    tokenizer = speaker_of(config)._task.tokenizer
    ids = torch.tensor([tokenizer("<user>three of them</s><assistant>", add_special_tokens=False)["input_ids"]])
    made = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=1,
        temperature=None, top_k=None,
    )  # fmt: skip
    ends = {1, *(SETTINGS[name].get("eos_token_id") or [])}
    tokens = made[0, ids.shape[1] :].tolist()
    assert got == tokenizer.decode(tokens[:-1] if tokens[-1] in ends else tokens, skip_special_tokens=True).strip()
    settle(loud, {})
    assert got != answer(config, None, "three of them", 24), "the setting makes no difference here"


def test_what_chat_does_not_do_is_said_and_sampling_is_not(loud: ModelSource) -> None:
    settle(loud, {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "num_beams": 1, "max_length": 20})
    assert speaker_of(run_config(loud.name)).remark == ""
    settle(loud, {"num_beams": 4, "stop_strings": ["###"], "of_tomorrow": 1})
    remark = speaker_of(run_config(loud.name)).remark
    assert (
        "asks for num_beams = 4, stop_strings = ['###'], of_tomorrow = 1, which is left out: answers are greedy"
        in remark
    )


def test_a_setting_that_transformers_refuses(loud: ModelSource) -> None:
    settle(loud, {"repetition_penalty": -1.0})
    with pytest.raises(
        ModelError, match=r"generation_config\.json: repetition_penalty = -1\.0 is refused by transformers"
    ):
        answer(run_config(loud.name), None, "Who?", 4)
