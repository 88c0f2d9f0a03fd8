from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from edgelam_fl.config import RunConfig, parse_run_file
from edgelam_fl.errors import ConfigError
from edgelam_fl.serving.chat import ask, check_can_talk, talk
from edgelam_fl.tasks.data import Message


class Echo:
    """Answers with what it was last told, a word at a time; refuses the word "long"."""

    remembers = True
    remark = ""
    omitted: Sequence[str] = ()

    def __init__(self) -> None:
        self.told: list[list[str]] = []

    def say(self, conversation: Sequence[Message], max_tokens: int, *, tuned: bool = True) -> Iterator[str]:
        self.told.append([f"{message['role']}: {message['content']}" for message in conversation])
        if conversation[-1]["content"] == "long":
            raise ConfigError("too long")
        yield from (f" {word}" for word in [*conversation[-1]["content"].split()[:max_tokens], str(tuned)])


def test_one_question_writes_the_answer_only_as_it_comes() -> None:
    written: list[str] = []
    ask(Echo(), "two words", 8, True, written.append)
    assert written == ["two", " words", " True", "\n"]


@pytest.mark.parametrize(
    ("overrides", "prompt", "says"),
    [
        ([], "  ", "--prompt is empty"),
        (["task.kind=classification", "task.classes=['a', 'b']"], "Who?", "answers with a class, not with text"),
        (["task.kind=classification", "task.classes=['a', 'b']"], None, "answers with a class, not with text"),
    ],
)
def test_what_cannot_be_talked_to(overrides: list[str], prompt: str | None, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_can_talk(parse_run_file("", source="x", overrides=overrides), prompt)
    check_can_talk(RunConfig(), None)


def test_a_conversation_is_told_from_its_beginning_until_quit() -> None:
    echo, written = Echo(), list[str]()
    talk(echo, iter(["one", "", "two", " /quit ", "three"]), 8, False, written.append)
    assert echo.told == [["user: one"], ["user: one", "assistant: one False", "user: two"]]
    assert "".join(written) == "one False\ntwo False\n"


def test_what_was_left_out_is_said_after_the_answer() -> None:
    echo, written, remarks = Echo(), list[str](), list[str]()
    echo.omitted = ["the oldest turn was left out"]
    talk(echo, iter(["one"]), 8, True, written.append, remarks.append)
    assert ("".join(written), remarks) == ("one True\n", ["the oldest turn was left out"])


def test_a_question_that_is_too_long_is_forgotten() -> None:
    echo, written = Echo(), list[str]()
    talk(echo, iter(["long", "one"]), 8, True, written.append)
    assert echo.told[-1] == ["user: one"]
    assert "".join(written) == "too long\none True\n"
