from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from edgelam_fl.chat import ask, talk
from edgelam_fl.errors import ConfigError
from edgelam_fl.generate import Message


class Echo:
    """Answers with what it was last told, a word at a time; refuses the word "long"."""

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


def test_an_empty_question() -> None:
    with pytest.raises(ConfigError, match="--prompt is empty"):
        ask(Echo(), "  ", 8, True, print)


def test_a_conversation_is_told_from_its_beginning_until_quit() -> None:
    echo, written = Echo(), list[str]()
    talk(echo, iter(["one", "", "two", " /quit ", "three"]), 8, False, written.append)
    assert echo.told == [["user: one"], ["user: one", "assistant: one False", "user: two"]]
    assert "".join(written) == "one False\ntwo False\n"


def test_a_question_that_is_too_long_is_forgotten() -> None:
    echo, written = Echo(), list[str]()
    talk(echo, iter(["long", "one"]), 8, True, written.append)
    assert echo.told[-1] == ["user: one"]
    assert "".join(written) == "too long\none True\n"
