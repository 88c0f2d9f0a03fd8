"""Writes a Modelfile: how Ollama asks a GGUF file. Knows texts and templates, no weights.

Ollama's templates are those of Go. A chat template is a program, so its pieces are found by trying: the text before, between and
after the words of a chat's turns. Pieces that do not give the template's own text again are not used.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from edgelam_fl.config import TaskSection
from edgelam_fl.errors import DataError
from edgelam_fl.tasks.chat_template import ChatTemplate
from edgelam_fl.tasks.data import Message

_WORDS = (
    "Mark1f1Edgelam",
    "Mark2f2Edgelam",
    "Mark3f3Edgelam",
    "Mark4f4Edgelam",
)  # no template changes letters and digits
_UNWRITABLE = ('"""', "{{", "}}")


def modelfile(task: TaskSection, tokenizer: Any, stop_ids: Collection[int], penalty: float, model: str) -> str:
    """Returns a Modelfile. penalty: of repetitions, 1: none; model: name of the GGUF file beside it.

    Answers are greedy, as `edgelam chat` gives them.
    """
    stops = [stop for number in sorted(stop_ids) if (stop := tokenizer.convert_ids_to_tokens(number))]
    lines = [f"FROM ./{model}", *_template(task, tokenizer, stops)]
    lines += [f'PARAMETER stop "{_quoted(stop)}"' for stop in stops]
    lines += ["PARAMETER temperature 0", f"PARAMETER repeat_penalty {penalty:g}"]
    return "\n".join(lines) + "\n"


def _template(task: TaskSection, tokenizer: Any, stops: Sequence[str]) -> list[str]:
    found = _of_chat(tokenizer, stops) if task.template == "chat" else _of_text(task.template)
    if not found:
        return ["# No TEMPLATE: Ollama takes the form of a chat from the file's own chat template, if it knows it."]
    return [f'TEMPLATE """{found}"""']


def _of_text(template: str) -> str:
    text = "{prompt}\n{answer}" if template == "plain" else template
    before, _, after = text.removesuffix("{answer}").partition("{prompt}")
    pieces = before, after
    return "" if _unwritable(pieces) or "{prompt}" in after else f"{before}{{{{ .Prompt }}}}{after}"


# ---------------------------------------------------------------- a chat template


@dataclass(frozen=True)
class _Pieces:
    first: str
    """Before a first turn that is the user's."""
    user: str
    """Before the words of every turn of the user."""
    asked: str
    """After them: up to the words of the answer."""
    answered: str
    """After the words of an answer."""
    system: tuple[str, str] | None
    """Before and after the words of the system's turn; None: the template has no such turn."""

    def written(self, chat: Sequence[Message]) -> str:
        """Writes a chat whose last turn is the user's, as Ollama would."""
        text = ""
        for number, message in enumerate(chat):
            words = str(message["content"])
            if message["role"] == "system":
                before, after = self.system or ("", "")
                text += f"{before}{words}{after}"
                continue
            text += self.first if number == 0 else ""
            text += f"{self.user}{words}{self.asked}" if message["role"] == "user" else f"{words}{self.answered}"
        return text

    def in_go(self) -> str:
        user, answer = f"{self.user}{{{{ .Content }}}}{self.asked}", f"{{{{ .Content }}}}{self.answered}"
        turn = f'{{{{ if eq .Role "user" }}}}{user}{{{{ else }}}}{answer}{{{{ end }}}}'
        if self.first:
            turn = f"{{{{ if eq $number 0 }}}}{self.first}{{{{ end }}}}{turn}"
        if self.system:
            before, after = self.system
            turn = f'{{{{ if eq .Role "system" }}}}{before}{{{{ .Content }}}}{after}{{{{ else }}}}{turn}{{{{ end }}}}'
        return f"{{{{ range $number, $_ := .Messages }}}}{turn}{{{{ end }}}}"


def _of_chat(tokenizer: Any, stops: Sequence[str]) -> str:
    """Returns the chat template of a tokenizer in Go's words; "" if its pieces do not give its text."""
    chats = ChatTemplate(tokenizer)
    try:
        pieces = _pieces(chats, _begin(tokenizer), stops)
        trial: list[Message] = [_said("user", "one"), _said("assistant", "two"), _said("user", "three")]
        rounds = [trial, *([[_said("system", "zero"), *trial]] if pieces.system else [])]
        bare = [_without(_asked(chats, chat), _begin(tokenizer)) for chat in rounds]
    except (DataError, ValueError):
        return ""
    texts = [pieces.first, pieces.user, pieces.asked, pieces.answered, *(pieces.system or ())]
    return pieces.in_go() if bare == list(map(pieces.written, rounds)) and not _unwritable(texts) else ""


def _begin(tokenizer: Any) -> str:
    """Returns the token that llama.cpp puts before every text, which a template must then not write; "": it puts none."""
    bos = tokenizer.bos_token or ""
    ids = tokenizer("a")["input_ids"]
    return bos if bos and ids[:1] == [tokenizer.bos_token_id] else ""


def _pieces(chats: ChatTemplate, begin: str, stops: Sequence[str]) -> _Pieces:
    """Takes the text of chats apart at their words. Raises ValueError if some words are not in it.

    stops: texts that end a turn; with the white space after them they are the earlier turn's.
    """
    one, two, three, four = _WORDS
    before, asked = _apart(_without(_asked(chats, [_said("user", one)]), begin), one)
    chat = [_said("user", one), _said("assistant", two), _said("user", three)]
    _, _, between, _ = _apart(_asked(chats, chat), one, two, three)
    shared = [before, between]
    system = None
    try:
        head, middle, _ = _apart(_without(_asked(chats, [_said("system", four), _said("user", one)]), begin), four, one)
        system, shared = (head, middle), [*shared, middle]
    except (DataError, ValueError):
        pass
    user = _shared_end(shared)
    for stop in stops:
        user = user.removeprefix(stop).lstrip() if user.startswith(stop) else user
    cut = len(user)
    ends = (before[: len(before) - cut], between[: len(between) - cut])
    return _Pieces(ends[0], user, asked, ends[1], system and (system[0], system[1][: len(system[1]) - cut]))


def _shared_end(texts: Sequence[str]) -> str:
    """Returns the longest text that all of them end with."""
    count = 0
    for characters in zip(*(text[::-1] for text in texts), strict=False):
        if len(set(characters)) > 1:
            break
        count += 1
    return texts[0][len(texts[0]) - count :]


def _asked(chats: ChatTemplate, chat: Sequence[Message]) -> str:
    """Writes a chat up to the words of the next answer."""
    text, given = chats.prompt(chat)
    return text + given


def _said(role: str, words: str) -> Message:
    return {"role": role, "content": words}


def _without(text: str, begin: str) -> str:
    return text.removeprefix(begin) if begin else text


def _apart(text: str, *words: str) -> list[str]:
    """Returns the text before, between and after the words, which must be in it in this order."""
    parts = []
    for word in words:
        before, found, text = text.partition(word)
        if not found:
            raise ValueError(word)
        parts.append(before)
    return [*parts, text]


def _unwritable(texts: Sequence[str]) -> bool:
    return any(sign in text for text in texts for sign in _UNWRITABLE)


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
