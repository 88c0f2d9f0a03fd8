"""Writes docs/events.md from the dataclasses of events and of summary.json: `python -m tools.events_page`."""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from edgelam_fl.telemetry import summary
from edgelam_fl.telemetry.events import Event, nodes, plans, progress, rounds, run
from edgelam_fl.telemetry.events.table import EVENTS

PAGE = Path(__file__).parents[1] / "docs" / "events.md"
HEAD = """\
<!-- Written by `python -m tools.events_page`. Do not edit: change the docstrings in edgelam_fl/telemetry/. -->

# Events and the summary

A run writes `events.jsonl` into its folder while it goes on, and `summary.json` at its end; a node's stage host writes an
`events.jsonl` of its own. Each line of `events.jsonl` is a JSON object that begins with `time` (Unix seconds) and `event`
(the kind). Names of fields end in their unit; rates are bits per second, sizes bytes.

A round takes at most 3 kB per device: what each node did at which moment is in `timelines.jsonl`, which keeps the newest rounds. A
run's file of 16 MB is packed beside the others (`events-000001.jsonl.gz`), and `read_events` of `events.jsonl` reads them first; a
node's file is set aside as `events.jsonl.old` at 8 MB, in place of an older one. A line that cannot be written, as on a full disk, is
left out and counted (`events_dropped`).

A field marked "optional" is left out of the line while it has the value given there. A reader of files of several versions
takes a missing field for null, 0 or empty, and ignores fields and kinds that it does not know: `read_events` in
`edgelam_fl.telemetry.events` does both and returns an object per line, of the class named beside the kind.
"""
WORDS = {str: "string", int: "integer", float: "number", bool: "boolean", Any: "any value"}


def page() -> str:
    """Returns the page's text. Raises KeyError if a field has no docstring."""
    parts = [HEAD]
    for module in (run, plans, rounds, progress, nodes):
        title, _, rest = inspect.cleandoc(module.__doc__ or "").partition(". ")
        kinds = {kind: cls for kind, cls in EVENTS.items() if cls.__module__ == module.__name__}
        parts += [
            f"## {title}\n\n{rest}\n",
            *(_section(f"`{kind}`: {cls.__name__}", cls) for kind, cls in kinds.items()),
        ]
        parts += [_section(cls.__name__, cls) for cls in _inside(kinds.values())]
    parts += ["## summary.json\n", _section("Summary", summary.Summary)]
    parts += [_section(cls.__name__, cls) for cls in _inside([summary.Summary])]
    return "\n".join(parts)


def _section(title: str, cls: type) -> str:
    lines = "".join(f"| `{name}` | {kind} | {meaning} |\n" for name, kind, meaning in rows(cls))
    table = f"\n| field | value | meaning |\n|---|---|---|\n{lines}" if lines else ""
    return f"### {title}\n\n{inspect.cleandoc(cls.__doc__ or '')}\n{table}"


def rows(cls: type) -> Iterator[tuple[str, str, str]]:
    hints, meanings = typing.get_type_hints(cls), _meanings(cls)
    defaults = {field.name: field.default for field in fields(cls)} if is_dataclass(cls) else {}
    for name in defaults or cls._fields:  # type: ignore[attr-defined]
        if name == "time" and issubclass(cls, Event):
            continue
        default = defaults.get(name, MISSING)
        note = "" if default is MISSING else f"; optional: {_json(default)}"
        yield name, _words(hints[name]) + note, re.sub(r"\bNone\b", "null", meanings[name]).replace("|", "\\|")


def _json(value: Any) -> str:
    return {None: "null", (): "[]"}[value] if value in (None, ()) else json.dumps(value)


def _words(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return f"{_words(arguments[0])} or null"
    if origin is tuple:
        return f"array of {_words(arguments[0])}"
    if origin is not None and issubclass(origin, Mapping):
        return f"object of {_words(arguments[1])}"
    return WORDS.get(hint) or f"[{hint.__name__}](#{hint.__name__.lower()})"


def _meanings(cls: type) -> dict[str, str]:
    """Returns the string below each field, of base classes too."""
    found: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        if not (is_dataclass(each) or hasattr(each, "_fields")):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(each))).body[0].body  # type: ignore[attr-defined]
        for field, below in pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                found[ast.unparse(field.target)] = " ".join(ast.literal_eval(below.value).split())
    return found


def _inside(classes: Any) -> list[type]:
    """Returns the records in the fields of classes, each once, in the order of their first use."""
    found: dict[type, None] = {}
    for cls in classes:
        for hint in typing.get_type_hints(cls).values():
            for record in _records(hint):
                found |= dict.fromkeys([record, *_inside([record])])
    return list(found)


def _records(hint: Any) -> list[type]:
    if is_dataclass(hint) or hasattr(hint, "_fields"):
        return [hint]
    return [record for argument in typing.get_args(hint) for record in _records(argument)]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
