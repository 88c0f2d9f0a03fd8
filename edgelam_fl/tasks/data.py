"""Reads prompts and answers from a device's file, and orders those that are learned. Knows texts, not tokens."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edgelam_fl.errors import DataError, nearest
from edgelam_fl.tasks.files import PASSAGE, Record, read_records
from edgelam_fl.tasks.held_out import set_aside

Message = Mapping[str, Any]
"""One message in the form of chat templates: role, content as a text, and tool_calls, name or tool_call_id if tools are used."""


@dataclass(frozen=True)
class Chat:
    """A whole chat, whose last message is the assistant's answer. Its messages are never changed, so that it has a hash."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    """Descriptions of the functions that the assistant may call, in the form of chat templates."""

    def __hash__(self) -> int:
        return hash(json.dumps([self.messages, self.tools], sort_keys=True, default=str))


Prompt = str | Chat  # a text (empty for a passage), or the whole chat
Pair = tuple[Prompt, str]
"""Prompt and answer. In a classification the text and the name of its class; of a chat the answer is the text of its last
message, which is empty if the message only calls tools."""
_ROLES = ("system", "user", "assistant")


class TaskSettings(Protocol):
    """The settings of a task, as in a run file's [task] section and in a plan."""

    @property
    def kind(self) -> str: ...
    @property
    def classes(self) -> Sequence[str]: ...
    @property
    def max_tokens(self) -> int: ...
    @property
    def template(self) -> str: ...
    @property
    def loss_on(self) -> str: ...
    @property
    def weighting(self) -> str: ...


class DataSettings(TaskSettings, Protocol):
    """The settings for reading a device's file, as in a run file's [task] and [data] sections and in a plan."""

    @property
    def prompt_field(self) -> str: ...
    @property
    def answer_field(self) -> str: ...
    @property
    def held_out(self) -> float: ...


def device_pairs(path: Path, settings: DataSettings) -> tuple[list[Pair], list[Pair]]:
    """Reads (training, held-out) from a device's file, untokenized. Raises DataError if the file does not fit the task."""
    pairs = read_pairs(path, settings.prompt_field, settings.answer_field, settings.classes)
    _check_prompts(path, pairs, settings)
    return set_aside(pairs, settings.held_out, classes=bool(settings.classes))


def read_pairs(path: Path, prompt_field: str, answer_field: str, classes: Sequence[str] = ()) -> list[Pair]:
    """Reads the (prompt, answer) pair of each example.

    `classes`: the answers allowed; empty: any. Raises DataError with the place of an example and what it lacks.
    """
    return [_pair(path, record, prompt_field, answer_field, classes) for record in read_records(path)]


def _pair(path: Path, record: Record, prompt_field: str, answer_field: str, classes: Sequence[str]) -> Pair:
    place, values = record
    if path.suffix.lower() == ".txt":
        return "", values[PASSAGE]
    if "messages" in values and prompt_field not in values:
        return _chat(path, place, values["messages"])
    prompt, answer = _text(path, record, prompt_field), _text(path, record, answer_field)
    if classes and answer not in classes:
        raise DataError(
            f"{path}, {place}: {answer!r:.60} is none of task.classes ({nearest(answer, classes)})",
            "unknown-class",
            place,
        )
    return prompt, answer


def _text(path: Path, record: Record, field: str) -> str:
    place, values = record
    if field not in values:
        raise DataError(
            f"{path}, {place} lacks the field {field!r} ({nearest(field, values)}); data.fields in the run file names them",
            "missing-field",
            place,
        )
    if not isinstance(values[field], str) or not values[field].strip():
        raise DataError(
            f"{path}, {place}: {field!r} must be a text that is not empty, got {values[field]!r:.60}",
            "empty-field",
            place,
        )
    return values[field]


def _chat(path: Path, place: str, messages: Any) -> Pair:
    """Reads a chat up to the last message of the assistant, which is the answer; later messages are ignored."""
    turns = [_turn(path, place, message) for message in messages] if isinstance(messages, list) else []
    answers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not answers or answers[-1] == 0:
        raise DataError(
            f"{path}, {place}: 'messages' must be a list with a turn of the assistant after others, got {messages!r:.60}",
            "chat",
            place,
        )
    return Chat(tuple(turns[: answers[-1] + 1])), turns[answers[-1]]["content"]


def _turn(path: Path, place: str, message: Any) -> Message:
    role, content = (message.get(key) if isinstance(message, dict) else None for key in ("role", "content"))
    if role not in _ROLES or not isinstance(content, str) or not content.strip():
        raise DataError(
            f"{path}, {place}: each of 'messages' must have a 'role' ({', '.join(_ROLES)}) and a text as 'content', got {message!r:.80}",
            "turn",
            place,
        )
    return {"role": role, "content": content}


def _check_prompts(path: Path, pairs: list[Pair], settings: DataSettings) -> None:
    """Refuses passages, which have no prompt, and chats, whose prompt is not plain text, with settings that cannot learn from them."""
    passages = any(prompt == "" for prompt, _ in pairs)
    chats = any(isinstance(prompt, Chat) for prompt, _ in pairs)
    if settings.classes:
        if passages or chats:
            raise DataError(
                f"{path} holds {'passages' if passages else 'chats'}; a classification needs a text and a class",
                "passages" if passages else "chat",
            )
    elif passages and (settings.template, settings.loss_on) != ("plain", "all"):
        raise DataError(
            f"{path} holds passages without questions: they need task.template = 'plain' and task.loss_on = 'all', "
            f"got {settings.template!r} and {settings.loss_on!r}",
            "passages",
        )
    elif chats and settings.template != "chat":
        raise DataError(f"{path} holds chats: they need task.template = 'chat', got {settings.template!r}", "chat")


def batch_indices(examples: int, batch_size: int, step: int, seed: int, node: str) -> list[int]:
    """Returns the examples that a device takes at a global step: one shuffle per epoch, continued across epochs.

    Depends only on its arguments, so that a node that restarts or misses a round needs no cursor.
    """
    wanted = range(step * batch_size, (step + 1) * batch_size)
    orders: dict[int, list[int]] = {}
    for epoch in {position // examples for position in wanted}:
        orders[epoch] = list(range(examples))
        random.Random(f"{seed}/{node}/{epoch}").shuffle(orders[epoch])
    return [orders[position // examples][position % examples] for position in wanted]
