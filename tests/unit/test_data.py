from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgelam_fl.errors import DataError
from edgelam_fl.tasks.data import Chat, batch_indices, device_pairs, read_pairs
from edgelam_fl.wire import edgelam_pb2 as pb

GOOD = '{"question": "q", "answer": "a"}\n'


def problem(tmp_path: Path, content: str | bytes) -> str:
    file = tmp_path / "data.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        read_pairs(file, "question", "answer")
    return str(caught.value).replace(str(file), "FILE")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "FILE holds no examples; at least 1 is needed"),
        ("\n  \n", "FILE holds no examples; at least 1 is needed"),
        (GOOD.encode() + b"\xe9", "FILE, line 2 is not UTF-8 (it holds the byte 0xe9); convert the file first (of Excel: iconv -f CP1252 -t UTF-8)"),
        (GOOD + "question,answer", "FILE, line 2 is not JSON: Expecting value"),
        (GOOD + "\n[1]", "FILE, line 3 must be an object with named fields, got [1]"),
        (
            GOOD + '{"question": "q", "anser": "a"}',
            "FILE, line 2 lacks the field 'answer' (did you mean 'anser'?); data.fields in the run file names them",
        ),
        (
            GOOD + '{"question": "q", "xyz": "a"}',
            "FILE, line 2 lacks the field 'answer' (known: question, xyz); data.fields in the run file names them",
        ),
        (GOOD + '{"question": "q", "answer": " "}', "FILE, line 2: 'answer' must be a text that is not empty, got ' '"),
        (GOOD + '{"question": "q", "answer": 7}', "FILE, line 2: 'answer' must be a text that is not empty, got 7"),
        (GOOD + '{"question": null, "answer": "a"}', "FILE, line 2: 'question' must be a text that is not empty, got None"),
    ],
)  # fmt: skip
def test_a_bad_file_is_named_with_line_and_reason(tmp_path: Path, content: str | bytes, expected: str) -> None:
    assert problem(tmp_path, content) == expected


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for name in ("none", "none.csv", "none.parquet"):
        with pytest.raises(DataError, match=rf"no data file at .*{name}; --data takes a \.jsonl, \.json, \.csv"):
            read_pairs(tmp_path / name, "question", "answer")
    with pytest.raises(DataError, match=r"the folder .* holds no \.parquet or \.arrow file"):
        read_pairs(tmp_path, "question", "answer")


def test_pairs_in_the_files_order_with_other_field_names(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"in": "q1", "out": "a1"}\r\n\n{"out": "a2", "in": "q2", "more": 3}', encoding="utf-8")
    assert read_pairs(file, "in", "out") == [("q1", "a1"), ("q2", "a2")]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085"])
def test_only_newlines_end_a_line(tmp_path: Path, separator: str) -> None:
    """JSON writers that keep non-ASCII text leave U+2028 and U+0085 as they are inside a string."""
    file = tmp_path / "data.jsonl"
    record = json.dumps({"question": "q", "answer": f"a{separator}b"}, ensure_ascii=False)
    file.write_text(f"{record}\n{record}\n", encoding="utf-8")
    assert read_pairs(file, "question", "answer") == [("q", f"a{separator}b")] * 2


@pytest.mark.parametrize(
    ("messages", "prompt", "answer"),
    [
        ([("user", "q"), ("assistant", "a")], [("user", "q")], "a"),
        ([("system", "s"), ("user", "q"), ("assistant", "a")], [("system", "s"), ("user", "q")], "a"),
        (
            [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b"), ("user", "thanks")],
            [("user", "q"), ("assistant", "a"), ("user", "r")],
            "b",
        ),
    ],
)
def test_of_a_chat_the_last_answer_is_learned(
    tmp_path: Path, messages: list[tuple[str, str]], prompt: list[tuple[str, str]], answer: str
) -> None:
    row = json.dumps({"messages": [{"role": role, "content": content} for role, content in messages]})
    file = tmp_path / "chats.jsonl"
    file.write_text(f"{row}\n{row}\n", encoding="utf-8")
    turns = [*prompt, ("assistant", answer)]
    chat = Chat(tuple({"role": role, "content": content} for role, content in turns))
    assert read_pairs(file, "question", "answer") == [(chat, answer)] * 2
    assert len({*read_pairs(file, "question", "answer"), (chat, answer)}) == 1


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ("hello", "'messages' must be a list with a turn of the assistant after others, got 'hello'"),
        ([{"role": "user", "content": "q"}], "'messages' must be a list with a turn of the assistant after others, got ["),
        ([{"role": "assistant", "content": "a"}], "'messages' must be a list with a turn of the assistant after others, got ["),
        ([{"role": "bot", "content": "q"}], "each of 'messages' must have a 'role' (system, user, assistant, tool) and a text as 'content', or 'from' and 'value', got {'role': 'bot'"),
        ([{"role": "user", "content": None}], "each of 'messages' must have a 'role' (system, user, assistant, tool) and a text as 'content', or 'from' and 'value', got {'role': 'user'"),
        (["q"], "each of 'messages' must have a 'role' (system, user, assistant, tool) and a text as 'content', or 'from' and 'value', got 'q'"),
    ],
)  # fmt: skip
def test_a_bad_chat_is_named_with_its_line(tmp_path: Path, messages: object, expected: str) -> None:
    assert problem(tmp_path, GOOD + json.dumps({"messages": messages}) + "\n").startswith(f"FILE, line 2: {expected}")


def test_an_unknown_class_is_named_with_line_and_nearest(tmp_path: Path) -> None:
    file = tmp_path / "data.csv"
    file.write_text("text,topic\na,plant\nb,animals\n", encoding="utf-8")
    assert read_pairs(file, "text", "topic") == [("a", "plant"), ("b", "animals")]
    with pytest.raises(DataError) as caught:
        read_pairs(file, "text", "topic", ["plant", "animal"])
    assert str(caught.value) == f"{file}, line 3: 'animals' is none of task.classes (did you mean 'animal'?)"


def settings(**changes: Any) -> pb.TaskSettings:
    """What a plan tells a device."""
    usual = {"kind": "causal-lm", "template": "chat", "loss_on": "answer", "held_out": 0.5}
    return pb.TaskSettings(prompt_field="question", answer_field="answer", **{**usual, **changes})


PASSAGES = "One passage.\n\nAnother\none.\n"
CHATS = '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a%d"}]}\n'


@pytest.mark.parametrize(
    ("name", "content", "changes", "expected"),
    [
        ("p.txt", PASSAGES, {}, "holds passages without questions: they need task.template = 'plain' and task.loss_on = 'all', got 'chat' and 'answer'"),
        ("p.txt", PASSAGES, {"template": "plain"}, "holds passages without questions: they need task.template = 'plain' and task.loss_on = 'all', got 'plain' and 'answer'"),
        ("p.txt", PASSAGES, {"kind": "classification", "classes": ["b", "c"]}, "holds passages; a classification needs a text and a class"),
        ("c.jsonl", CHATS % 1 + CHATS % 2, {"template": "plain"}, "holds chats: they need task.template = 'chat', got 'plain'"),
        ("c.jsonl", CHATS % 1 + CHATS % 2, {"kind": "classification", "classes": ["b", "c"]}, "holds chats; a classification needs a text and a class"),
        ("q.jsonl", GOOD + GOOD, {"kind": "classification", "classes": ["b", "c"]}, ", line 1: 'a' is none of task.classes (known: b, c) (data.bad_lines = 'skip' leaves such examples out)"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_the_task_is_refused_before_it_is_tokenized(
    tmp_path: Path, name: str, content: str, changes: dict[str, object], expected: str
) -> None:
    file = tmp_path / name
    file.write_text(content, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        device_pairs(file, settings(**changes))
    assert str(caught.value).removeprefix(str(file)).strip() == expected


def test_files_that_fit_are_split(tmp_path: Path) -> None:
    passages, chats = tmp_path / "p.txt", tmp_path / "c.jsonl"
    passages.write_text(PASSAGES, encoding="utf-8")
    chats.write_text(CHATS % 1 + CHATS % 2, encoding="utf-8")
    sides = device_pairs(passages, settings(template="plain", loss_on="all"))
    assert sorted(sides[0] + sides[1]) == [("", "Another\none."), ("", "One passage.")]
    assert [len(side) for side in device_pairs(chats, settings())[:2]] == [1, 1]


@pytest.mark.parametrize(("examples", "batch"), [(12, 4), (10, 4), (3, 8), (1, 2)])
def test_batches_cover_each_epoch_exactly_once(examples: int, batch: int) -> None:
    epochs = 4
    steps = -(-epochs * examples // batch)
    drawn = [i for step in range(steps) for i in batch_indices(examples, batch, step, 1, "device-1")]
    for epoch in range(epochs):
        assert sorted(drawn[epoch * examples : (epoch + 1) * examples]) == list(range(examples))


def test_batches_differ_by_epoch_node_and_seed_and_repeat_otherwise() -> None:
    def first(step: int = 0, seed: int = 1, node: str = "a") -> list[int]:
        return batch_indices(50, 50, step, seed, node)

    assert first() == first()
    assert len({tuple(order) for order in (first(), first(step=1), first(seed=2), first(node="b"))}) == 4
