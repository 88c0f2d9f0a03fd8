"""Writes chats as text by a model's own chat template, and finds the assistant's turns in that text.

The template is a program out of the model's folder: transformers runs it in jinja's sandbox. Knows no token ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from edgelam_fl.errors import ConfigError, DataError
from edgelam_fl.tasks.data import Chat, Message
from edgelam_fl.tasks.shapes import THOUGHTS

_MARK = "Mark0f1Edgelam2Words3"  # no template changes letters and digits, and no text holds these
_MARKERS = re.compile(r"{%-?\s*generation\s*-?%}")  # of transformers' templates, around what the assistant generates
_CAUGHT = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


@dataclass(frozen=True)
class Stretch:
    """The place of one turn of the assistant in a whole text, in characters."""

    start: int  # behind what comes before every answer
    words_end: int  # end of the answer's own words
    end: int | None  # behind what the template writes after the words; None: it is found by the end token


class ChatTemplate:
    """The chat template of a tokenizer. Its methods raise DataError for a chat that the template refuses or does not write whole."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def whole(self, chat: Chat) -> str:
        """Writes a whole chat."""
        text = self._render(chat.messages, chat.tools)
        _check_written(chat, text)
        return text

    def prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> tuple[str, str]:
        """Writes the messages before an answer as a whole chat has them.

        Returns the text, and what the template itself writes between it and the words of an answer.
        """
        before = self._render(messages, tools, add_generation_prompt=True)
        whole = self._try([*messages, {"role": "assistant", "content": _MARK}], tools)
        upto, found, _ = whole.partition(_MARK)
        if not found:
            return before, ""
        return (before, upto[len(before) :]) if upto.startswith(before) else (upto, "")

    def answers(self, chat: Chat, whole: str) -> list[Stretch]:
        """Finds the last turn alone in the whole text."""
        return [self._turn(chat, whole, len(chat.messages) - 1)]

    def turns(self, chat: Chat, whole: str) -> list[Stretch]:
        """Finds every turn of the assistant in the whole text, by the template's own marks if it has such."""
        (answer,) = self.answers(chat, whole)
        marks = self._marks(chat)
        own = [mark for mark in marks if mark[1] > answer.start]
        if own:
            earlier = [Stretch(start, end, end) for start, end in marks if end <= answer.start]
            return [*earlier, Stretch(own[0][0], answer.words_end, own[-1][1])]
        numbers = [number for number, message in enumerate(chat.messages[:-1]) if message["role"] == "assistant"]
        return [*(self._turn(chat, whole, number) for number in numbers), answer]

    def _marks(self, chat: Chat) -> list[tuple[int, int]]:
        """Returns the places that the template marks as generated; none without {% generation %} in it."""
        from transformers.utils.chat_template_utils import render_jinja_template

        messages = _in_parts(chat.messages) if self._takes_parts else chat.messages
        tools = [dict(tool) for tool in chat.tools] or None
        template = self._tokenizer.get_chat_template(tools=tools)
        if not _MARKERS.search(template):
            return []
        turns = [{key: value for key, value in message.items() if value is not None} for message in messages]
        _, marks = render_jinja_template(
            [turns],
            tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
        )
        return [(start, end) for start, end in marks[0] if start < end]

    def _turn(self, chat: Chat, whole: str, number: int) -> Stretch:
        """Finds the turn of message `number`, one of the assistant's, in the whole text.

        It begins where the template's text of the earlier messages with its generation prompt ends. A template that writes a
        whole chat differently has no such place there: then the turn begins with its own words.
        """
        last = number == len(chat.messages) - 1
        words = _words(chat.messages[number])
        before = self._try(chat.messages[:number], chat.tools, add_generation_prompt=True)
        start = len(before) if before and whole.startswith(before) else None
        found = whole.find(words, start) if start is not None else -1
        place = (found, found + len(words)) if found >= 0 else self._place(chat, whole, number)
        if place is None or (last and whole[slice(*place)].strip() != words):
            raise DataError(
                f"the model's chat template changes or leaves out an answer ({words!r:.60}), or its place in the whole chat is "
                "not clear; give a text with {prompt} and {answer} as task.template",
                "template",
            )
        calls = [_tool_name(call) for call in chat.messages[number].get("tool_calls") or ()]
        if not all(name in whole[place[0] if start is None else start :] for name in calls):
            raise DataError(
                f"the model's chat template does not write calls of tools ({', '.join(calls):.60})", "template"
            )
        upto = "" if last else self._try(chat.messages[: number + 1], chat.tools)
        end = len(whole) if last else len(upto) if len(upto) >= place[1] and whole.startswith(upto) else None
        return Stretch(place[0] if start is None else start, place[1], end)

    def _place(self, chat: Chat, whole: str, number: int) -> tuple[int, int] | None:
        """Returns where the template writes the words of a message, by a mark in their place, or by the words if they occur once."""
        marked = [dict(message) for message in chat.messages]
        marked[number]["content"] = _MARK
        before, found, after = self._try(marked, chat.tools).partition(_MARK)
        words = _words(chat.messages[number])
        if found and words and whole.startswith(before) and whole.endswith(after):
            place = len(before), len(whole) - len(after)
            return place if place[0] < place[1] else None
        return (whole.index(words), whole.index(words) + len(words)) if words and whole.count(words) == 1 else None

    def _try(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], **how: bool) -> str:
        """Writes messages that are a part of a chat; nothing if the template refuses them."""
        try:
            return self._render(messages, tools, **how)
        except DataError:
            return ""

    def _render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], **how: bool) -> str:
        return self._apply(_in_parts(messages) if self._takes_parts else messages, tools, **how)

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the template wants contents as lists of parts: it writes nothing, or fails, for a content that is a text."""
        asked = [{"role": "user", "content": _MARK}]
        for messages in (asked, _in_parts(asked)):
            try:
                if _MARK in self._apply(messages, ()):
                    return messages is not asked
            except DataError:
                continue
        return False

    def _apply(self, messages: Iterable[Message], tools: Sequence[Mapping[str, Any]], **how: bool) -> str:
        template = self._tokenizer.chat_template
        if not template:
            raise ConfigError("task.template = 'chat', but the model has no chat template; set 'plain' or a text")
        if isinstance(template, dict) and "default" not in template and not (tools and "tool_use" in template):
            raise ConfigError(
                f"task.template = 'chat': the model has several chat templates ({', '.join(sorted(template)):.80}) and none is "
                "named 'default'; keep one in a copy of its folder, or set 'plain' or a text"
            )
        turns = [dict(message) for message in messages]
        given = [dict(tool) for tool in tools] or None
        try:
            text: str = self._tokenizer.apply_chat_template(turns, tools=given, tokenize=False, **how)
        except TemplateSyntaxError as error:
            raise ConfigError(f"task.template = 'chat': the model's chat template is not readable: {error}") from error
        except _CAUGHT as error:
            roles = ", ".join(str(turn.get("role")) for turn in turns)
            raise DataError(f"the model's chat template refuses a chat of {roles:.80}: {error}", "template") from error
        return text


def without_oldest(messages: Sequence[Message], turns: int) -> list[Message]:
    """Leaves out the oldest turns of a chat, each a message of the user with all up to the user's next; the system's stay."""
    head = next((n for n, message in enumerate(messages) if message["role"] != "system"), len(messages))
    return [*messages[:head], *messages[_turns(messages)[turns] :]] if turns else list(messages)


def count_turns(messages: Sequence[Message]) -> int:
    """Counts the turns of a chat."""
    return len(_turns(messages))


def _turns(messages: Sequence[Message]) -> list[int]:
    return [number for number, message in enumerate(messages) if message["role"] == "user"]


def _tool_name(tool: Mapping[str, Any]) -> str:
    return str(tool.get("function", tool).get("name", ""))


def _words(message: Message) -> str:
    return str(message.get("content") or "").strip()


def _in_parts(messages: Iterable[Message]) -> list[Message]:
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]} if message.get("content") else message
        for message in messages
    ]


def _check_written(chat: Chat, text: str) -> None:
    """Raises DataError if a message or a tool of a chat is not in its text; an earlier answer may lose its thinking part."""
    for message in chat.messages[:-1]:
        words = _words(message)
        forms = words, json.dumps(words)[1:-1], json.dumps(words, ensure_ascii=False)[1:-1]
        thought = message["role"] == "assistant" and words.rpartition("</think>")[2].strip() in text
        if not thought and not any(form in text for form in forms):
            raise DataError(
                f"the model's chat template leaves out or changes a message of {message['role']!r:.20} ({words!r:.60}); put it "
                "into the user's message, or give a text with {prompt} and {answer} as task.template",
                "template",
            )
    thoughts = [(key, chat.messages[-1].get(key)) for key in THOUGHTS]
    for key, thought in thoughts:
        if thought and thought.strip() not in text:
            raise DataError(
                f"the model's chat template leaves out the thought of an answer ({key!r}), which so would not be learned; write it "
                "into the content, or leave the key out",
                "template",
            )
    calls = [call for message in chat.messages for call in message.get("tool_calls") or ()]
    for tool in [*chat.tools, *calls]:
        if _tool_name(tool) not in text:
            raise DataError(f"the model's chat template does not write tools, as {_tool_name(tool)!r:.60}", "template")
