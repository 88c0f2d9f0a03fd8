"""Records as data sets have them: how each shape is read, or by which words it is refused. The table of docs/models.md."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from edgelam_fl.errors import DataError
from edgelam_fl.tasks.data import Chat, device_pairs, pairs_by
from edgelam_fl.wire import edgelam_pb2 as pb

U, A, S = ({"role": role, "content": role[0]} for role in ("user", "assistant", "system"))
WEATHER = {"name": "weather", "description": "Says the weather.", "parameters": {"type": "object"}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Rome"}}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "sunny"}


def settings(prompt: Sequence[str] = ("question",), answer: str = "answer", **more: Any) -> pb.TaskSettings:
    return pb.TaskSettings(
        prompt_field=prompt[0], more_prompt_fields=prompt[1:], answer_field=answer, held_out=0.5, **more
    )


def lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def chat(*messages: Mapping[str, Any], tools: Sequence[Mapping[str, Any]] = ()) -> Chat:
    return Chat(messages, tuple(tools))


def said(role: str, value: Any) -> dict[str, Any]:
    return {"from": role, "value": value}


READ: dict[str, tuple[Any, Sequence[str], Any]] = {
    "OpenAI messages": ({"messages": [S, U, A]}, (), chat(S, U, A)),
    "later messages of the user": ({"messages": [U, A, U]}, (), chat(U, A)),
    "content in parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, A]},
        (),
        chat({"role": "user", "content": "a\nb"}, A),
    ),
    "parts of the Responses API": (
        {"messages": [U, {"role": "assistant", "content": [{"type": "output_text", "text": "a"}]}]},
        (),
        chat(U, A),
    ),
    "parts as strings": ({"messages": [{"role": "user", "content": ["u"]}, A]}, (), chat(U, A)),
    "empty system text": ({"messages": [{"role": "system", "content": ""}, U, A]}, (), chat(U, A)),
    "role developer": ({"messages": [S | {"role": "developer"}, U, A]}, (), chat(S, U, A)),
    "tool calls, content null": (
        {"messages": [U, CALLS, RESULT, A], "tools": [{"type": "function", "function": WEATHER}]},
        (),
        chat(U, CALLS, RESULT, A, tools=[{"type": "function", "function": WEATHER}]),
    ),
    "arguments as a text of JSON": (
        {"messages": [U, {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Rome"}'}}]}]},
        (),
        chat(U, CALLS | {"tool_calls": [{"id": "1", **CALL}]}),
    ),
    "functions, as OpenAI had them first": (
        {"messages": [U, {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": '{"town": "Rome"}'}}, {"role": "function", "name": "weather", "content": "sunny"}, A], "functions": [WEATHER]},
        (),
        chat(U, CALLS, RESULT | {"name": "weather"}, A, tools=[{"type": "function", "function": WEATHER}]),
    ),
    "result of a tool as an object": (
        {"messages": [U, CALLS, {"role": "tool", "content": {"sky": "clear"}}, A]},
        (),
        chat(U, CALLS, {"role": "tool", "content": '{"sky": "clear"}'}, A),
    ),
    "thinking beside the answer": (
        {"messages": [U, A | {"reasoning_content": "hm"}]},
        (),
        chat(U, A | {"reasoning_content": "hm"}),
    ),
    "ShareGPT": ({"conversations": [said("system", "s"), said("human", "u"), said("gpt", "a")]}, (), chat(S, U, A)),
    "ShareGPT with tools": (
        {
            "conversations": [said("human", "u"), said("function_call", json.dumps(CALL["function"])), said("observation", "sunny"), said("gpt", "a")],
            "tools": json.dumps([WEATHER]), "system": "s",
        },
        (),
        chat(S, U, CALLS, RESULT, A, tools=[{"type": "function", "function": WEATHER}]),
    ),
    "messages in a text of JSON": ({"messages": json.dumps([U, A])}, (), chat(U, A)),
    "a chat under another name": ({"dialog": [U, A]}, ("dialog", "answer"), chat(U, A)),
    "TRL prompt and completion": ({"prompt": "p", "completion": "c"}, ("prompt", "completion"), ("p", "c")),
    "TRL prompt and completion as messages": ({"prompt": [S, U], "completion": [A]}, ("prompt", "completion"), chat(S, U, A)),
    "a prompt as messages, a text as answer": ({"prompt": [U], "completion": "a"}, ("prompt", "completion"), chat(U, A)),
    "a text as prompt, messages as answer": ({"prompt": "u", "completion": [A]}, ("prompt", "completion"), chat(U, A)),
    "chosen answers, by name": (
        {"prompt": "u", "chosen": [U, A], "rejected": [U, A]},
        ("prompt", "chosen"),
        chat(U, A),
    ),
    "Alpaca with input": (
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        ("instruction", "input", "output"),
        ("Add.\n\n1 and 2", "3"),
    ),
    "Alpaca without input": (
        {"instruction": "Sing.", "input": "", "output": "La."},
        ("instruction", "input", "output"),
        ("Sing.", "La."),
    ),
    "Alpaca with a blank input": (
        {"instruction": "Sing.", "input": " \n", "output": "La."},
        ("instruction", "input", "output"),
        ("Sing.", "La."),
    ),
    "language modelling": ({"text": "A passage."}, (), ("", "A passage.")),
    "text and label": ({"text": "t", "label": "no"}, ("text", "label"), ("t", "no")),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_a_shape_is_read(tmp_path: Path, name: str) -> None:
    record, names, expected = READ[name]
    *prompt, answer = names or ("question", "answer")
    pair = expected if isinstance(expected, tuple) else (expected, expected.messages[-1]["content"] or "")
    found = pairs_by(settings(prompt, answer), lines(tmp_path / "data.jsonl", record, record))
    assert found.pairs == [pair, pair]
    assert all(set(message) >= {"role", "content"} for message in getattr(pair[0], "messages", ()))


REFUSED: dict[str, tuple[Any, str]] = {
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, A]},
        ": a message has a part of the type 'image_url', and only texts are learned",
    ),
    "an audio part": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hear"}, {"type": "input_audio"}]}, A]},
        ": a message has a part of the type 'input_audio', and only texts are learned",
    ),
    "an unknown role": ({"messages": [{"role": "bot", "content": "x"}, A]}, ": each of 'messages' must have a 'role'"),
    "an empty answer": ({"messages": [U, {"role": "assistant", "content": " "}]}, ": each of 'messages' must have a 'role'"),
    "nothing before the answer": ({"conversations": [said("gpt", "a")]}, ": 'conversations' must be a list with a turn of the assistant after others"),
    "weights of messages": ({"messages": [U, A | {"weight": 0}]}, ": a message has the weight 0, and weights are not read"),
    "arguments that are no JSON": (
        {"messages": [U, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{town"}}]}, A]},
        ": 'arguments' holds a text that is not JSON (",
    ),
    "half an emoji in the JSON of a text": (
        {"messages": [U, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": "\\ud83d"}'}}]}, A]},
        ": 'arguments' holds a text that is not JSON (it holds half of a character",
    ),
    "a call without a name": ({"messages": [U, {"role": "assistant", "tool_calls": [{"id": "1"}]}]}, ": a tool call must have a 'name'"),
    "a tool call of the user": ({"messages": [U | {"tool_calls": [CALL]}, A]}, ": a message of 'user' calls tools"),
    "a tool that is no function": ({"messages": [U, A], "tools": [{"type": "web_search"}]}, ": a tool must be a function with a 'name'"),
    "a preference": ({"prompt": "u", "chosen": "a", "rejected": "b"}, " holds a preference (chosen, rejected)"),
    "an answer that is a number": ({"question": "q", "answer": 7}, ": 'answer' must be a text that is not empty, got 7"),
    "an answer that is NaN": ({"question": "q", "answer": float("nan")}, ": 'answer' must be a text that is not empty, got nan"),
    "answers in a list": ({"question": "q", "answer": ["a", "b"]}, ": 'answer' must be a text that is not empty, got ['a', 'b']"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_learned_is_refused_by_name(tmp_path: Path, name: str) -> None:
    record, words = REFUSED[name]
    file = lines(tmp_path / "data.jsonl", {"question": "q", "answer": "a"}, record)
    with pytest.raises(DataError) as caught:
        device_pairs(file, settings())
    assert str(caught.value).startswith(f"{file}, line 2{words}")
    assert str(caught.value).endswith(" (data.bad_lines = 'skip' leaves such examples out)")
    assert caught.value.place == "line 2"
    assert "'" not in caught.value.for_others(), "what other machines hear quotes nothing"


def test_tables_fill_no_arguments_in(tmp_path: Path) -> None:
    """In a table every object has every key; those that none of its writers gave are null."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    other = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "CET"}}}
    rows = [{"messages": [U, {"role": "assistant", "tool_calls": [call]}]} for call in (CALL, other)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    pairs = pairs_by(settings(), tmp_path / "data.parquet").pairs
    assert pairs == [(chat(U, CALLS | {"tool_calls": [call]}), "") for call in (CALL, other)]


def test_judged_completions_are_no_answers(tmp_path: Path) -> None:
    file = lines(tmp_path / "kto.jsonl", *({"prompt": "p", "completion": "c", "label": good} for good in (True, False)))
    with pytest.raises(DataError, match=r"line 1 holds a judged completion \(label\)"):
        pairs_by(settings(("prompt",), "completion"), file)


@pytest.mark.parametrize(
    ("label", "classes", "expected"),
    [
        (1, ("0", "1"), "1"),
        (True, ("true", "false"), "true"),
        (False, ("False", "True"), "False"),
        (1, ("negative", "positive"), "'answer' is 1, and nothing in the file says which of task.classes that is"),
        (True, ("yes", "no"), "'answer' is True, and nothing in the file says which"),
        (1.0, ("0", "1"), "'answer' must be a text that is not empty, got 1.0"),
        (None, ("0", "1"), "'answer' must be a text that is not empty, got None"),
        ("yess", ("yes", "no"), "'yess' is none of task.classes (did you mean 'yes'?)"),
    ],
)
def test_numbers_are_classes_only_if_the_run_file_spells_them(
    tmp_path: Path, label: Any, classes: tuple[str, ...], expected: str
) -> None:
    file = lines(tmp_path / "data.jsonl", *[{"question": "q", "answer": label}] * 2)
    asked = settings(kind="classification", classes=classes)
    if expected in classes:
        assert pairs_by(asked, file).pairs == [("q", expected)] * 2
    else:
        with pytest.raises(DataError) as caught:
            pairs_by(asked, file)
        assert str(caught.value).startswith(f"{file}, line 1: {expected}")


def test_bad_lines_are_skipped_and_counted_if_the_run_file_says_so(tmp_path: Path) -> None:
    good = [json.dumps({"question": f"q{n}", "answer": f"a{n}"}).encode() for n in range(4)]
    bad = [
        b'{"question": "q", "answer": "half \\ud83d"}',
        b"no JSON",
        b'{"question": "q"}',
        b'{"question": "\xe9"}',
        b"[1]",
    ]
    file = tmp_path / "data.jsonl"
    file.write_bytes(b"\n".join([good[0], *bad, *good[1:]]))
    with pytest.raises(DataError, match="line 2 holds half of a character"):
        device_pairs(file, settings())
    found = device_pairs(file, settings(bad_lines="skip"))
    assert found.bad == tuple(f"line {number}" for number in range(2, 7))
    assert sorted([*found.training, *found.held_out]) == [(f"q{n}", f"a{n}") for n in range(4)]
    file.write_bytes(b"\n".join(bad))
    with pytest.raises(DataError, match=r"none of the 5 examples can be used; the first: .*line 1 holds half"):
        device_pairs(file, settings(bad_lines="skip"))
    with pytest.raises(DataError, match="no data file at"):
        device_pairs(tmp_path / "none.jsonl", settings(bad_lines="skip"))


def test_fields_that_nothing_is_learned_from_are_named_without_their_values(tmp_path: Path) -> None:
    rows = [{"instruction": "Add.", "input": f"{n} and 1", "output": f"{n + 1}", "id": n} for n in range(3)]
    file = lines(tmp_path / "data.jsonl", *rows, {"instruction": "a", "output": "b", "a secret": 1})
    assert device_pairs(file, settings(("instruction",), "output")).unread == ("input", "id")
    assert device_pairs(file, settings(("instruction", "input"), "output")).unread == ("id",)
    with pytest.raises(DataError, match=r"no example of .* has the field 'inputs' \(did you mean 'input'\?\)"):
        device_pairs(file, settings(("instruction", "inputs"), "output"))


def test_every_prompt_of_a_data_set_with_one_instruction_is_its_own(tmp_path: Path) -> None:
    rows = [{"instruction": "Is the mood good?", "input": f"news {n}", "output": f"answer {n}"} for n in range(40)]
    file = lines(tmp_path / "data.jsonl", *rows)
    pairs = pairs_by(settings(("instruction", "input"), "output"), file).pairs
    assert len({prompt for prompt, _ in pairs}) == 40
