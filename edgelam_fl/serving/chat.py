"""Holds a conversation with a run's result in a terminal. Knows lines of text; `generate` knows the model."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import TYPE_CHECKING, Protocol

from rich.console import Console

from edgelam_fl.config import RunConfig
from edgelam_fl.errors import ConfigError
from edgelam_fl.tasks.kinds import values_of
from edgelam_fl.telemetry.waiting import waiting

if TYPE_CHECKING:  # without torch a wrong command is refused at once
    from edgelam_fl.tasks.data import Message

QUIT = "/quit"
Write = Callable[[str], None]
Awaits = Callable[[], AbstractContextManager[object]]


class Says(Protocol):
    """Anything that answers in text, as `generate.Speaker` does, in this process or over a route."""

    @property
    def remembers(self) -> bool: ...

    @property
    def remark(self) -> str: ...

    @property
    def omitted(self) -> Sequence[str]: ...

    def say(self, conversation: Sequence[Message], max_tokens: int, *, tuned: bool = True) -> Iterator[str]: ...


def check_can_talk(config: RunConfig, prompt: str | None) -> None:
    """Raises ConfigError for a run whose model is not whole here or answers with a class, and for an empty question."""
    if config.privacy.private_front:
        raise ConfigError(
            "privacy.private_front = true: this run's adapter lacks the front, which stayed on the devices. There, "
            "`edgelam export --to peft --front FILE` writes the whole adapter for other tools"
        )
    if config.task.classes:
        raise ConfigError(f"task.kind = {config.task.kind!r}: this run's model answers with a class, not with text")
    if values_of(config.task.kind):
        raise ConfigError(f"task.kind = {config.task.kind!r}: this run's model takes and gives values, not text")
    if prompt is not None and not prompt.strip():
        raise ConfigError("--prompt is empty; without it, `edgelam chat` takes one question after the other")


def ask(speaker: Says, prompt: str, max_tokens: int, tuned: bool, write: Write, awaits: Awaits = nullcontext) -> None:
    """Asks one question and writes nothing but its answer. awaits: as for `talk`."""
    _answer(speaker, [_user(prompt)], max_tokens, tuned, write, awaits)


def talk(
    speaker: Says,
    lines: Iterator[str],
    max_tokens: int,
    tuned: bool,
    write: Write,
    tell: Write = lambda text: None,
    awaits: Awaits = nullcontext,
) -> None:
    """Holds a conversation until /quit or the end of `lines`. Writes the error for a question that is too long and drops it.

    tell: hears what was left out of an answer, or of what it was asked after. awaits: is entered while the first words of an answer are
    awaited.
    """
    conversation: list[Message] = []
    for line in lines:
        if line.strip() == QUIT:
            return
        if not line.strip():
            continue
        conversation.append(_user(line))
        try:
            said = _answer(speaker, conversation, max_tokens, tuned, write, awaits)
            conversation.append({"role": "assistant", "content": said})
            for text in speaker.omitted:
                tell(text)
        except ConfigError as error:
            conversation.pop()
            write(f"{error}\n")


def converse(speaker: Says, console: Console, prompt: str | None, max_tokens: int, *, tuned: bool) -> None:
    """Answers `prompt`, or holds a conversation in this terminal if it is None. console: for all but the answers."""
    if speaker.remark:
        console.print(speaker.remark, style="yellow", highlight=False, soft_wrap=True, markup=False)

    def tell(text: str) -> None:
        console.print(f"({text})", style="dim", highlight=False, markup=False, soft_wrap=True)

    def awaits() -> AbstractContextManager[object]:
        return waiting(console, "reading the question")

    if prompt is not None:
        ask(speaker, prompt, max_tokens, tuned, write_now, awaits)
        for text in speaker.omitted:
            tell(text)
        return
    turns = (
        ""
        if speaker.remembers
        else "; each question is answered without the earlier ones, since the run's task.template has no turns"
    )
    console.print(f"{QUIT} or Ctrl-D ends the conversation{turns}", style="dim", highlight=False, soft_wrap=True)
    talk(speaker, typed_lines(), max_tokens, tuned, write_now, tell, awaits)


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _answer(
    speaker: Says, conversation: Sequence[Message], max_tokens: int, tuned: bool, write: Write, awaits: Awaits
) -> str:
    """Writes the answer as it comes, without leading white space; returns the answer."""
    said, pieces = "", speaker.say(conversation, max_tokens, tuned=tuned)
    with awaits():
        first = next(pieces, "")
    for piece in chain([first], pieces):
        new = piece if said else piece.lstrip()
        said += new
        write(new)
    write("\n")
    return said


def typed_lines() -> Iterator[str]:
    """Yields the lines that the user types until Ctrl-D; at a terminal with line editing and a prompt."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - input() uses it
    with contextlib.suppress(EOFError):
        while True:
            yield input("> " if sys.stdin.isatty() else "")


def write_now(text: str) -> None:
    """Prints a piece of an answer at once."""
    print(text, end="", flush=True)
