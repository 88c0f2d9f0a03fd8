"""Makes a prompt and its answer out of one record, in each of the shapes that data sets have. Knows no files and no tokens.

| shape | fields of a record |
|---|---|
| question and answer | two texts, by the names in data.fields; the prompt may be joined from several (Alpaca's instruction and input) |
| chat | `messages` with role and content (OpenAI, transformers) or `conversations` with from and value (ShareGPT); `tools`, `system` |
| prompt and completion | as a question and an answer, but lists of messages (TRL) |
| passage | `text` alone, or the file is a plain text |
| classes | as a question and an answer; the answer may be a number or a boolean that is the name of a class |
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from edgelam_fl.errors import DataFault, nearest
from edgelam_fl.names import printable
from edgelam_fl.tasks.files import PASSAGE, parse_json

Message = Mapping[str, Any]
"""One message in the form of chat templates: role, content as a text, and tool_calls, name or tool_call_id if tools are used.
The content is None if the message only calls tools."""


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


class Unfit(ValueError):
    """What is wrong with a record, as the end of a sentence that begins with its place."""

    def __init__(self, words: str, fault: DataFault) -> None:
        super().__init__(words)
        self.fault = fault


@dataclass(frozen=True)
class Fields:
    """The names of fields by which records are read."""

    prompt: tuple[str, ...]
    """Texts that are joined by an empty line; only the first must be there."""
    answer: str
    classes: tuple[str, ...] = ()
    """The answers of a classification; empty: any."""


CHATS = ("messages", "conversations")
_ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "chatgpt": "assistant", "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool",
    "function_call": "assistant",
}  # fmt: skip
THOUGHTS = ("reasoning_content", "thinking")  # keys of what an answer thinks before its words
_KEPT = ("name", "tool_call_id", *THOUGHTS)  # keys that chat templates read, besides the main ones
_JOIN = "\n\n"
PREFERENCE = (
    " holds a preference (chosen, rejected), which this training does not learn; to learn the chosen answers alone, name "
    "them in the run file: data.fields = { prompt = ..., answer = 'chosen' }"
)


def pair_of(values: Mapping[str, Any], fields: Fields) -> tuple[Pair, Collection[str]]:
    """Makes a pair of a record. Returns it with the names of the fields that it was made of. Raises Unfit."""
    if PASSAGE in values and len(values) == 1:
        return ("", _text(values, PASSAGE)), (PASSAGE,)
    first, answer = fields.prompt[0], fields.answer
    if {"chosen", "rejected"} <= values.keys() and answer not in values:
        raise Unfit(PREFERENCE, "preference")
    if answer in values and answer == "completion" and isinstance(values.get("label"), bool) and not fields.classes:
        raise Unfit(
            " holds a judged completion (label), as preference methods learn it; keep the good ones and leave the label out",
            "preference",
        )
    if is_chat(values.get(first)) or (first in values and is_chat(values.get(answer))):
        return _asked_by_messages(values, fields)
    chat = next((name for name in CHATS if name in values), None)
    if chat and first not in values:
        return _chat(chat, values[chat], values)
    if first not in values and answer not in values and "text" in values and not fields.classes:
        return ("", _text(values, "text")), ("text",)
    return _texts(values, fields)


def _texts(values: Mapping[str, Any], fields: Fields) -> tuple[Pair, Collection[str]]:
    first, *others = fields.prompt
    prompt = [_text(values, first), *(_text(values, name) for name in others if not is_blank(values.get(name)))]
    answer = _label(values, fields) if fields.classes else _text(values, fields.answer)
    return (_JOIN.join(prompt), answer), (*fields.prompt, fields.answer)


def is_blank(value: Any) -> bool:
    """Whether a value is nothing, or a text without a mark."""
    return value is None or (isinstance(value, str) and not value.strip())


def _text(values: Mapping[str, Any], field: str) -> str:
    _require(values, field)
    value = values[field]
    if not isinstance(value, str) or not value.strip():
        raise Unfit(f": {field!r} must be a text that is not empty, got {shown(value)}", "empty-field")
    return value


def _require(values: Mapping[str, Any], field: str) -> None:
    if field not in values:
        raise Unfit(
            f" lacks the field {field!r} ({_nearest(field, values)}); data.fields in the run file names them",
            "missing-field",
        )


def _nearest(word: str, known: Iterable[str]) -> str:
    return printable(nearest(word, known), 200)


def _label(values: Mapping[str, Any], fields: Fields) -> str:
    """Returns the name of a class. A number or a boolean is one only if the run file spells it so."""
    _require(values, fields.answer)
    value = values[fields.answer]
    if isinstance(value, int):
        spelled = [name for name in fields.classes if name.casefold() == str(value).casefold()]
        if len(spelled) == 1:
            return spelled[0]
        raise Unfit(
            f": {fields.answer!r} is {value}, and nothing in the file says which of task.classes that is; write the classes' "
            f"names into the data, or give the numbers as task.classes, as in ['0', '1'] ({_nearest(str(value), fields.classes)})",
            "unknown-class",
        )
    name = _text(values, fields.answer)
    if name not in fields.classes:
        raise Unfit(f": {shown(name)} is none of task.classes ({_nearest(name, fields.classes)})", "unknown-class")
    return name


def shown(value: Any, most: int = 60) -> str:
    """Writes a value of a record for a message."""
    try:
        return f"{value!r:.{most}}"
    except (RecursionError, ValueError):
        return f"a value of the type {type(value).__name__}"


# ---------------------------------------------------------------- chats


def is_chat(value: Any) -> bool:
    """Whether a value is a list of messages."""
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        return False
    return "role" in value[0] or "from" in value[0]


def _asked_by_messages(values: Mapping[str, Any], fields: Fields) -> tuple[Pair, Collection[str]]:
    """Reads a prompt and a completion of which one at least is a list of messages, or a whole chat in the prompt's field."""
    if len(fields.prompt) > 1:
        raise Unfit(": messages cannot be joined with other fields; name one field as data.fields.prompt", "chat")
    (asked,) = fields.prompt
    if fields.answer not in values or asked in CHATS:
        return _chat(asked, values[asked], values)
    prompt, answer = values[asked], values[fields.answer]
    if not is_chat(prompt):
        prompt = [{"role": "user", "content": _text(values, asked)}]
    if not is_chat(answer):
        answer = [{"role": "assistant", "content": _text(values, fields.answer)}]
    elif _role(answer[0]) != "assistant":  # a whole chat, as preferences have it
        prompt = []
    pair, used = _chat(f"{asked} and {fields.answer}", [*prompt, *answer], values)
    return pair, (asked, fields.answer, *used)


def _chat(name: str, raw: Any, values: Mapping[str, Any]) -> tuple[Pair, Collection[str]]:
    """Reads a chat up to the last message of the assistant, which is the answer; later messages are left out."""
    if isinstance(raw, str) and raw.lstrip().startswith("["):  # as tables and CSV files have it
        raw = _unpacked(name, raw)
    messages = [_message(name, message) for message in raw] if isinstance(raw, list) else []
    messages = [message for message in messages if message["content"] or message["role"] != "system"]
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers or answers[-1] == 0:
        raise Unfit(
            f": {name!r} must be a list with a turn of the assistant after others, got {shown(raw)}",
            "chat",
        )
    messages = messages[: answers[-1] + 1]
    used = [name]
    system = values.get("system")
    if isinstance(system, str) and messages[0]["role"] != "system":
        used.append("system")
        if system.strip():
            messages.insert(0, {"role": "system", "content": system})
    tools: list[Mapping[str, Any]] = []
    for field in ("tools", "functions"):
        if field in values:
            used.append(field)
            tools += [_tool(tool) for tool in _listed(field, values[field])]
    return (Chat(tuple(messages), tuple(tools)), messages[-1]["content"] or ""), used


def _role(message: Mapping[str, Any]) -> str:
    spelled = message.get("role", message.get("from"))
    return _ROLES.get(spelled.casefold().replace("-", "_"), "") if isinstance(spelled, str) else ""


def _message(name: str, raw: Any) -> Message:
    role = _role(raw) if isinstance(raw, dict) else ""
    if not role:
        raise _bad_message(name, raw)
    if raw.get("weight") not in (None, 1):
        raise Unfit(
            f": a message has the weight {shown(raw['weight'])}, and weights are not read; leave the key out, or the message",
            "turn",
        )
    content = _content(name, raw.get("content", raw.get("value")), role)
    calls = []
    if str(raw.get("from", "")).casefold().replace("-", "_") == "function_call":
        content, calls = None, [_call(call) for call in _listed("function_call", content)]
    elif raw.get("tool_calls"):
        calls = [_call(call) for call in _listed("tool_calls", raw["tool_calls"])]
    elif raw.get("function_call"):
        calls = [_call(raw["function_call"])]
    if calls and role != "assistant":
        raise Unfit(f": a message of {role!r} calls tools, and only the assistant's may", "turn")
    if not (content and content.strip()) and not calls and role not in ("system", "tool"):
        raise _bad_message(name, raw)
    message: dict[str, Any] = {"role": role, "content": content or (None if calls else "")}
    if role == "system" and not message["content"].strip():
        message["content"] = ""
    message |= {key: raw[key] for key in _KEPT if isinstance(raw.get(key), str)}
    return message | ({"tool_calls": calls} if calls else {})


def _bad_message(name: str, raw: Any) -> Unfit:
    return Unfit(
        f": each of {name!r} must have a 'role' (system, user, assistant, tool) and a text as 'content', or 'from' and 'value', "
        f"got {shown(raw, 80)}",
        "turn",
    )


def _content(name: str, content: Any, role: str) -> str | None:
    """Returns a message's text: parts that are texts are joined by new lines, and the result of a tool is written as JSON."""
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, str) or "type" in _as_dict(part) for part in content):
        return "\n".join(_part(part) for part in content)
    if role == "tool" and isinstance(content, dict | list | int | float):
        return json.dumps(content, ensure_ascii=False, default=str)
    raise Unfit(
        f": a 'content' in {name!r} must be a text, or a list of parts with a type, got {shown(content)}",
        "turn",
    )


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if part["type"] in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
        return str(part["text"])
    raise Unfit(f": a message has a part of the type {shown(part['type'])}, and only texts are learned", "turn")


def _as_dict(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


# ---------------------------------------------------------------- tools


def _listed(field: str, raw: Any) -> list[Any]:
    """Returns a list that may be written as JSON in a text, as may each of its items."""
    value = _unpacked(field, raw)
    items = value if isinstance(value, list) else [] if value is None else [value]
    return [_unpacked(field, item) for item in items]


def _unpacked(field: str, raw: Any) -> Any:
    if not isinstance(raw, str):
        return raw
    if not raw.strip():
        return None
    try:
        return parse_json(raw)
    except ValueError as error:
        raise Unfit(f": {field!r} holds a text that is not JSON ({error}): {shown(raw)}", "tools") from error


def _call(raw: Any) -> Mapping[str, Any]:
    """Returns a tool call in the form of chat templates: a name, and arguments as an object."""
    call = _as_dict(raw)
    function = _as_dict(call.get("function", call))
    arguments = _unpacked("arguments", function.get("arguments", function.get("parameters"))) or {}
    if not isinstance(function.get("name"), str) or not isinstance(arguments, dict):
        raise Unfit(f": a tool call must have a 'name', and an object as 'arguments', got {shown(raw)}", "tools")
    marked = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**marked, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _tool(raw: Any) -> Mapping[str, Any]:
    """Returns the description of a tool in the form of chat templates: a function with its name inside."""
    tool = _as_dict(raw)
    function = tool if "function" not in tool and "name" in tool else _as_dict(tool.get("function"))
    if tool.get("type", "function") != "function" or not isinstance(function.get("name"), str):
        raise Unfit(f": a tool must be a function with a 'name', got {shown(raw)}", "tools")
    return tool if "function" in tool else {"type": "function", "function": dict(function)}
