"""Ids and labels of whole texts: templates and tokenizers of the forms that models have, against transformers' own ids and masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizer

from edgelam_fl.cli.run_file import explained
from edgelam_fl.config import ModelSection, TaskSection
from edgelam_fl.errors import ConfigError, DataError, ModelError
from edgelam_fl.model.generation import check_answers
from edgelam_fl.model.source import find_model
from edgelam_fl.serving.generate import LocalSpeaker
from edgelam_fl.tasks.base import Example
from edgelam_fl.tasks.causal_lm import CausalLm
from edgelam_fl.tasks.data import Chat, Prompt
from edgelam_fl.tasks.masking import IGNORED
from tests.fleet import plain_loss
from tests.support import run_config, write_tiny_llama
from tests.texts import (
    MARKS,
    NO_SYSTEM,
    PARTS,
    QWEN_THINK,
    STOPS,
    TEMPLATES,
    TOOLS,
    chat,
    language,
    random_chat,
    tokenizer,
    unmarked,
)

ALPACA, CHATML, ZEPHYR, GEMMA = (unmarked(TEMPLATES[name]) for name in ("alpaca", "chatml", "zephyr", "gemma"))
DROPS_SYSTEM = "{% for m in messages %}{% if m.role != 'system' %}<|user|>{{ m.content }}</s>{% endif %}{% endfor %}"
MOVES_SYSTEM = (
    "{% for m in messages %}{% if m.role != 'system' %}<|user|>{% if loop.last %}{{ messages[0].content }}: {% endif %}"
    "{{ m.content }}</s>{% endif %}{% endfor %}"
)
DROPS_THOUGHT = "{% for m in messages %}<|user|>{{ m.content.split('</think>')[-1] }}</s>{% endfor %}"
OTHER_PROMPT = (  # the prompt alone is written as no whole chat begins
    "{% if add_generation_prompt %}Now: {% endif %}{% for m in messages %}<|user|>{{ m.content }}</s>{% endfor %}"
)
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Rome"}}}
ASKED = {"role": "user", "content": "Weather?"}
CALLING = Chat((ASKED, {"role": "assistant", "content": "", "tool_calls": [CALL]}), (WEATHER,))
TOLD = Chat((*CALLING.messages, {"role": "tool", "name": "weather", "content": "sun"}, {"role": "assistant", "content": "Sunny."}), (WEATHER,))  # fmt: skip


def made(task: CausalLm, prompt: Prompt, answer: str = "") -> Example:
    (example,) = task.examples([(prompt, answer)]).examples
    return example


def learned(task: CausalLm, example: Example) -> str:
    """The learned tokens of each part of the text, | between parts."""
    parts: list[list[int]] = [[]]
    for label in example.labels:
        if label != IGNORED:
            parts[-1].append(label)
        elif parts[-1]:
            parts.append([])
    return "|".join(task.tokenizer.decode(part) for part in parts if part)


def tokens(task: CausalLm, example: Example) -> str:
    return " ".join(task.tokenizer.convert_ids_to_tokens(example.ids))


def masked_by_transformers(task: CausalLm, asked: Chat) -> tuple[list[int], list[int]]:
    out = task.tokenizer.apply_chat_template(list(asked.messages), return_dict=True, return_assistant_tokens_mask=True)
    marked = zip(out["input_ids"], out["assistant_masks"], strict=True)
    return list(out["input_ids"]), [token if mark else IGNORED for token, mark in marked]


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize("kind", ["byte-level", "metaspace"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_masks_are_those_of_transformers(name: str, kind: str) -> None:
    """Found by rendering, and by the template's own marks; an answer that the template does not end gets one token more."""
    found = language(kind, unmarked(TEMPLATES[name]), stops=STOPS.get(name, ""), loss_on="assistant")
    marked = language(kind, TEMPLATES[name], stops=STOPS.get(name, ""), loss_on="assistant")
    last = language(kind, unmarked(TEMPLATES[name]), stops=STOPS.get(name, ""), loss_on="answer")
    more = [found.tokenizer.eos_token_id] if name == "alpaca" else []
    for seed in range(6):
        asked = random_chat(seed, system=name not in NO_SYSTEM)
        ids, labels = masked_by_transformers(marked, asked)
        for task in (found, marked):
            example = made(task, asked)
            assert example.ids == ids + more
            assert example.labels == labels + more
        example = made(last, asked)
        first = max(n for n, label in enumerate(labels) if label != IGNORED and (n == 0 or labels[n - 1] == IGNORED))
        assert example.ids == ids + more
        assert example.labels == [IGNORED] * first + labels[first:] + more


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_character_of_several_tokens_is_learned_whole(name: str) -> None:
    """transformers' mask ends with the first of the bytes that a turn's last character is made of."""
    found = language("byte fallback", unmarked(TEMPLATES[name]), stops=STOPS.get(name, ""), loss_on="assistant")
    marked = language("byte fallback", TEMPLATES[name], stops=STOPS.get(name, ""))
    for seed in range(3):
        asked = random_chat(seed, system=name not in NO_SYSTEM)
        ids, labels = masked_by_transformers(marked, asked)
        example = made(found, asked)
        assert example.ids[: len(ids)] == ids
        assert all(own == theirs or theirs == IGNORED for own, theirs in zip(example.labels, labels, strict=False))
        more = [own for own, theirs in zip(example.labels, labels, strict=False) if own != theirs]
        assert set(found.tokenizer.convert_ids_to_tokens(more)) <= {"\n", "<0x0A>"}


@pytest.mark.parametrize("name", TEMPLATES)
def test_places_without_a_words_space_tell_the_same(name: str) -> None:
    """Some byte-level tokenizers leave the space out of a word's place; transformers' mask of Llama 2's template is empty then."""
    trimmed, plain = (
        language(kind, unmarked(TEMPLATES[name]), stops=STOPS.get(name, ""), loss_on="assistant")
        for kind in ("byte-level, trimmed", "byte-level")
    )
    for seed in range(6):
        asked = random_chat(seed, system=name not in NO_SYSTEM)
        assert made(trimmed, asked) == made(plain, asked)
        assert trimmed.opening(asked.messages[:-1]) == plain.opening(asked.messages[:-1])


@pytest.mark.parametrize("kind", ["byte-level", "bytes", "metaspace", "byte fallback"])
@pytest.mark.parametrize("name", [*TEMPLATES, "plain", "own"])
def test_generation_begins_with_the_tokens_that_come_before_what_is_learned(name: str, kind: str) -> None:
    template = {"plain": "plain", "own": "Q: {prompt} A: {answer}"}.get(name, "chat")
    task = language(kind, unmarked(TEMPLATES.get(name, CHATML)), stops=STOPS.get(name, ""), bos=True, template=template)
    for seed in range(3):
        asked = (
            random_chat(seed, system=name not in NO_SYSTEM)
            if template == "chat"
            else chat("Who keeps it?", "The device.")
        )
        example = made(task, asked) if template == "chat" else made(task, "Who keeps it?", "The device.")
        begin = task.opening(asked.messages[:-1])
        assert example.ids[: len(begin.ids)] == begin.ids
        assert set(example.labels[: len(begin.ids)]) == {IGNORED}
        first = next(number for number, label in enumerate(example.labels) if label != IGNORED)
        assert not task.tokenizer.decode(example.ids[len(begin.ids) : first]).strip(), "a space that joins no emoji"


# ---------------------------------------------------------------- a row per feature

ROWS: dict[str, tuple[dict[str, Any], tuple[Prompt, str], str]] = {
    "a system's message": ({"jinja": CHATML, "stops": "<|im_end|>"}, (chat("q", "a", system="s"), ""), "a<|im_end|>\n"),
    "a system's message that is moved": ({"jinja": MOVES_SYSTEM}, (chat("q", "a", system="s"), ""), "a</s>"),
    "every answer of a chat": ({"jinja": CHATML, "stops": "<|im_end|>", "loss_on": "assistant"}, (chat("q", "a", "r", "b"), ""), "a<|im_end|>\n|b<|im_end|>\n"),
    "a token behind the end": ({"jinja": TEMPLATES["phi 3"], "stops": "<|end|>"}, ("q", "a"), "a<|end|>\n</s>"),
    "no end of an answer": ({"jinja": ALPACA}, ("q", "a"), "a\n</s>"),
    "an end that generation does not know": ({"jinja": CHATML}, ("q", "a"), "a<|im_end|>\n</s>"),
    "an end inside of an answer": ({"jinja": ALPACA}, ("q", "a</s>b"), "a</s>b\n</s>"),
    "contents as parts": ({"jinja": PARTS, "stops": "<|im_end|>"}, ("q", "a"), "a<|im_end|>\n"),
    "a thought before the answer": ({"jinja": QWEN_THINK, "stops": "<|im_end|>"}, ("q", "a"), "<think>\n\n</think>\n\na<|im_end|>\n"),
    "a thought in the answer": ({"jinja": TEMPLATES["think"]}, (chat("q", "<think>\nt</think>a"), ""), "t</think>a</s>"),
    "earlier thoughts left out": ({"jinja": unmarked(TEMPLATES["think"]), "loss_on": "assistant"}, (chat("q", "<think>\nt</think>a", "r", "<think>\nu</think>b"), ""), "a</s>|u</think>b</s>"),
    "a prompt that is no beginning": ({"jinja": OTHER_PROMPT}, ("yes or no?", "yes"), "yes</s>"),
    "tools": ({"jinja": TOOLS, "stops": "<|im_end|>"}, (TOLD, "Sunny."), "Sunny.<|im_end|>\n"),
    "a call of a tool": ({"jinja": TOOLS, "stops": "<|im_end|>"}, (CALLING, ""), '<tool_call>{"name": "weather", "arguments": {"town": "Rome"}}</tool_call><|im_end|>\n'),
    "a call and an answer": ({"jinja": TOOLS, "stops": "<|im_end|>", "loss_on": "assistant"}, (TOLD, ""), '<tool_call>{"name": "weather", "arguments": {"town": "Rome"}}</tool_call><|im_end|>\n|Sunny.<|im_end|>\n'),
    "several named templates": ({"jinja": {"default": ZEPHYR, "tool_use": TOOLS}}, ("q", "a"), "a</s>\n"),
    "a named template for tools": ({"jinja": {"default": ZEPHYR, "tool_use": TOOLS}, "stops": "<|im_end|>"}, (TOLD, ""), "Sunny.<|im_end|>\n"),
    "an answer that begins with a line": ({"jinja": CHATML, "stops": "<|im_end|>"}, ("q", "\n\na"), "\n\na<|im_end|>\n"),
}  # fmt: skip


@pytest.mark.parametrize("feature", ROWS)
def test_what_is_learned_of_a_chat(feature: str) -> None:
    settings, (prompt, answer), expected = ROWS[feature]
    task = language("bytes", **settings)
    example = made(task, prompt, answer)
    assert learned(task, example) == expected
    asked = prompt if isinstance(prompt, Chat) else chat(prompt, answer)
    tools = list(asked.tools) or None
    messages = [
        dict(m, content=[{"type": "text", "text": m["content"]}]) if settings["jinja"] == PARTS else m
        for m in asked.messages
    ]
    ids = task.tokenizer.apply_chat_template(messages, tools=tools, return_dict=True)["input_ids"]  # fmt: skip
    assert example.ids[: len(ids)] == ids
    assert example.ids[len(ids) :] in ([], [MARKS.index("</s>")])


REFUSED: dict[str, tuple[dict[str, Any], tuple[Prompt, str], type[Exception], str]] = {
    "a system's message that is refused": ({"jinja": GEMMA}, (chat("q", "a", system="s"), ""), DataError, "refuses a chat of system, user, assistant: System role not supported"),
    "a system's message that is dropped": ({"jinja": DROPS_SYSTEM}, (chat("q", "a", system="Be short."), ""), DataError, r"leaves out or changes a message of 'system' \('Be short\.'\)"),
    "strict turns": ({"jinja": GEMMA}, (Chat(({"role": "user", "content": "q"},) * 2 + ({"role": "assistant", "content": "a"},)), ""), DataError, "refuses a chat of user, user, assistant: roles must alternate"),
    "a thought that is dropped": ({"jinja": DROPS_THOUGHT}, (chat("q", "<think>t</think>a"), ""), DataError, "changes or leaves out an answer"),
    "a thought beside the answer": ({"jinja": CHATML}, (Chat((ASKED, {"role": "assistant", "content": "a", "reasoning_content": "why"})), ""), DataError, r"leaves out the thought of an answer \('reasoning_content'\)"),
    "no end at all": ({"jinja": ALPACA, "eos": False}, ("q", "a"), ConfigError, "nothing ends an answer: the model's tokenizer names no eos_token"),
    "no end, plain": ({"jinja": CHATML, "template": "plain", "eos": False}, ("q", "a"), ConfigError, "nothing ends an answer"),
    "tools that are dropped": ({"jinja": CHATML, "stops": "<|im_end|>"}, (Chat(chat("q", "a").messages, (WEATHER,)), ""), DataError, "does not write tools, as 'weather'"),
    "a call that is dropped": ({"jinja": TOOLS.replace("m.tool_calls", "[]"), "stops": "<|im_end|>"}, (CALLING, ""), DataError, r"does not write calls of tools \(weather\)"),
    "a template that reads files": ({"jinja": "{{ ''.__class__.__mro__ }}"}, ("q", "a"), DataError, "refuses a chat of user, assistant: access to attribute '__class__'"),
    "a template with a fault": ({"jinja": "{{ messages[0].content + 1 }}"}, ("q", "a"), DataError, "refuses a chat of user, assistant: can only concatenate str"),
}  # fmt: skip


@pytest.mark.parametrize("feature", REFUSED)
def test_what_is_refused_by_name(feature: str) -> None:
    settings, (prompt, answer), kind, expected = REFUSED[feature]
    task = language("bytes", **settings)
    with pytest.raises(kind, match=expected):
        task.examples([(prompt, answer)])


def test_a_passage_may_go_without_an_end() -> None:
    task = language("bytes", CHATML, eos=False, template="plain", loss_on="all")
    assert learned(task, made(task, "", "It is so.")) == "It is so."


# ---------------------------------------------------------------- tokenizers


@pytest.mark.parametrize(
    ("kind", "bos", "template", "pair", "expected"),
    [
        ("byte-level", False, "Q: {prompt} A: {answer}", ("Who keeps", "The data"), "Q : ĠWho Ġkeeps ĠA : ĠThe Ġdata </s>"),
        ("byte-level", True, "Q: {prompt} A: {answer}", ("Who keeps", "The data"), "<s> Q : ĠWho Ġkeeps ĠA : ĠThe Ġdata </s>"),
        ("byte-level", True, "<s>Q: {prompt} A: {answer}", ("Who", "The"), "<s> Q : ĠWho ĠA : ĠThe </s>"),
        ("byte-level", True, "plain", ("Who keeps", "The data"), "<s> Wh o Ġkeeps Ċ The Ġdata </s>"),
        ("byte-level", True, "plain", ("", "The data"), "<s> The Ġdata </s>"),
        ("metaspace", False, "plain", ("Who keeps", "The data"), "▁Who▁keep s \n The▁d a t a </s>"),
        ("metaspace", True, "plain", ("Who keeps", "The data"), "<s> ▁Who▁keep s \n The▁d a t a </s>"),
        ("byte fallback", True, "plain", ("Who", "é"), "<s> ▁ W ho <0x0A> <0xC3> <0xA9> </s>"),
    ],
)  # fmt: skip
def test_ids_are_the_tokenizers_own_of_the_whole_text(
    kind: str, bos: bool, template: str, pair: tuple[str, str], expected: str
) -> None:
    task = language(kind, CHATML, bos=bos, template=template, loss_on="answer" if pair[0] else "all")
    example = made(task, *pair)
    before = task.prompt_text(pair[0]) + pair[1]
    plain = tokenizer(kind, bos=bos)
    assert example.ids[:-1] == plain(before, add_special_tokens=not before.startswith("<s>"))["input_ids"]
    if "▁" not in expected:
        assert tokens(task, example) == expected
    assert tokens(task, example).split()[-1] == "</s>"
    assert example.ids.count(MARKS.index("<s>")) == (bos or before.startswith("<s>"))
    shown = task.tokenizer.convert_ids_to_tokens([label for label in example.labels if label != IGNORED])
    if kind == "metaspace":
        assert "".join(shown).replace("▁", " ") == f"{pair[1]}</s>"


@pytest.mark.parametrize("name", ["llama 3", "llama 2", "gemma"])
def test_a_template_that_writes_the_first_token_gets_no_second_one(name: str) -> None:
    task = language("byte-level", unmarked(TEMPLATES[name]), stops=STOPS.get(name, ""), bos=True)
    assert made(task, "q", "a").ids.count(MARKS.index("<s>")) == 1
    assert task.opening(chat("q").messages).ids.count(MARKS.index("<s>")) == 1


def test_answers_have_the_tokens_that_the_whole_chat_has() -> None:
    """A tokenizer that puts a space before a text's first word writes none before an answer within a chat."""
    task = language("metaspace", "{{ bos_token }}" + ZEPHYR)
    example = made(task, "Who keeps the data?", "The device keeps the data.")
    whole = task.tokenizer.apply_chat_template(
        list(chat("Who keeps the data?", "The device keeps the data.").messages)
    )["input_ids"]
    assert example.ids == whole
    assert not task.tokenizer.convert_ids_to_tokens([next(label for label in example.labels if label != IGNORED)])[0].startswith("▁")  # fmt: skip


def test_a_token_across_the_border_is_the_answers_and_generation_says_it() -> None:
    task = language("byte-level", CHATML, template="Q: {prompt} A: {answer}")
    example = made(task, "Who", "The")
    assert task.tokenizer.convert_ids_to_tokens([label for label in example.labels if label != IGNORED]) == [
        "ĠThe",
        "</s>",
    ]
    begin = task.opening(chat("Who").messages)
    assert begin.ids == example.ids[: len(begin.ids)]
    assert begin.given == " ", "which is no part of an answer that begins with it"


class Letters(PreTrainedTokenizer):
    """A tokenizer in Python, which tells no places: pairs of letters, but never across a line's end."""

    def __init__(self, **settings: Any) -> None:
        self._known = {"<unk>": 0, "</s>": 1, **{chr(code): code for code in range(2, 128)}}
        super().__init__(unk_token="<unk>", eos_token="</s>", **settings)

    @property
    def vocab_size(self) -> int:
        return 128 + 128 * 128

    def get_vocab(self) -> dict[str, int]:
        return self._known

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return [line[n : n + 2] for line in text.splitlines(keepends=True) for n in range(0, len(line), 2)]

    def _convert_token_to_id(self, token: str) -> int:
        return self._known.get(token, 0) if len(token) != 2 else 128 + ord(token[0]) * 128 + ord(token[1])

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index) if index < 128 else chr((index - 128) // 128) + chr((index - 128) % 128)


@pytest.mark.parametrize(
    ("template", "expected"), [("plain", ["Th", "e", "</s>"]), ("Q: {prompt}, {answer}", ["he", "</s>"])]
)
def test_a_tokenizer_that_tells_no_places_is_asked_for_the_prompt(template: str, expected: list[str]) -> None:
    task = language("bytes", CHATML, template=template)
    task.tokenizer = Letters()
    example = made(task, "Who" if template == "plain" else "Wh", "The")
    labels = [label for label in example.labels if label != IGNORED]
    shown = ["</s>" if label == 1 else task.tokenizer._convert_id_to_token(label) for label in labels]
    assert shown[-len(expected) :] == expected
    assert len(shown) <= len(expected) + 1, "and the token across the border"


# ---------------------------------------------------------------- a model that learned


def test_a_model_that_learned_60_steps_stops_by_itself(tmp_path: Path) -> None:
    """With a template that ends no answer: the end that was appended is what stops it."""
    made_by = language("bytes", ALPACA)
    made_by.tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(made_by.tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=256, eos_token_id=MARKS.index("</s>"), pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    settings = TaskSection(max_tokens=128)
    task = CausalLm(tmp_path, settings)
    (unit,) = task.units(task.examples([("Who?", "The device."), ("What?", "The data.")]).examples, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = plain_loss(model, unit) / unit.count
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path)
    speaker = LocalSpeaker(ModelSection(name=str(tmp_path)), settings)
    assert "".join(speaker.say([{"role": "user", "content": "Who?"}], 100)) == "The device.\n"


# ---------------------------------------------------------------- before anything starts


def test_a_model_without_a_form_of_chats_or_an_end_is_refused_before_anything_starts(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "model", layers=5)
    check_answers(run_config(str(folder)), find_model(str(folder)))
    template = folder / "chat_template.jinja"
    template.rename(folder / "away.jinja")
    with pytest.raises(
        ConfigError, match=r"task\.template = 'chat', but .* has no chat template; set 'plain' or a text"
    ):
        explained(run_config(str(folder)))
    (folder / "additional_chat_templates").mkdir()
    (folder / "away.jinja").rename(folder / "additional_chat_templates" / "tool_use.jinja")
    check_answers(run_config(str(folder)), find_model(str(folder)))
    for file in ("config.json", "generation_config.json", "tokenizer_config.json"):
        values = json.loads((folder / file).read_text())
        kept = {key: value for key, value in values.items() if not key.startswith("eos_token")}
        (folder / file).write_text(json.dumps(kept))
    with pytest.raises(
        ModelError, match=r"nothing ends an answer of .*: .* name an eos_token in tokenizer_config\.json"
    ):
        explained(run_config(str(folder), "task.template=plain"))
    explained(run_config(str(folder), "task.template=plain", "task.loss_on=all"))
