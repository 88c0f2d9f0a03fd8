"""Says in one line what is wrong with a command line. Knows click's errors, and no command by name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from edgelam_fl.errors import ConfigError

_NO_NUMBER = re.compile(r"is not a valid integer( range)?")
_ONE_HYPHEN = re.compile(r"No such option '?-\w'?\.?$")
_TWICE = re.compile(r"(?P<said>Did you mean [^?]+\?)\s+(?P=said)")


def check_values(command: Any, arguments: Sequence[str]) -> None:
    """Raises ConfigError for an option that needs a value and is followed by another option, which click would take for the value.

    command: click's, with its subcommands if it has any.
    """
    left = list(arguments)
    while left:
        word = left.pop(0)
        takers, options = _options(command)
        if word == "--":
            return
        if word in takers and left:
            if left[0] in options and left[0].startswith("--"):
                raise ConfigError(f"{word} needs a value ({takers[word]}), and {left[0]} stands in its place")
            left.pop(0)
        elif not word.startswith("-") and word in getattr(command, "commands", {}):
            command = command.commands[word]


def _options(command: Any) -> tuple[dict[str, str], set[str]]:
    """Returns the options of a command that take a value, with what it is, and all of its options."""
    found = [each for each in command.params if each.param_type_name == "option"]
    takers = {name: _value(each) for each in found if not (each.is_flag or each.count) for name in each.opts}
    return takers, {name for each in found for name in (*each.opts, *each.secondary_opts)} | {"--help"}


def _value(option: Any) -> str:
    return str(option.metavar or option.type.name.upper())


def usage_words(error: Exception) -> str | None:
    """Returns what click says of a command line, in one line, with the command that helps; None for any other error."""
    if not hasattr(error, "format_message"):
        return None
    said = _NO_NUMBER.sub("is not a whole number", error.format_message())
    said = _TWICE.sub(r"\g<said>", " ".join(said.split()))
    if _ONE_HYPHEN.match(said):
        said += " Options of one word begin with two hyphens."
    context = getattr(error, "ctx", None)
    helps = f" (`{context.command_path} --help` lists what it takes)" if context is not None else ""
    return f"{said[:1].lower()}{said[1:]}{helps}"
