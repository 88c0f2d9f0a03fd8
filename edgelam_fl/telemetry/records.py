"""Frozen dataclasses to JSON and back. Knows nothing about what the fields mean.

Reading does not fail if the JSON was written by another version. A field that the JSON lacks takes its default, else None
if its type allows None, else the empty value of its type (0, "", (), {}); a field that the class lacks is ignored.
Writing leaves out each field that has a default and holds it. A dataclass is an object in JSON, a NamedTuple an array.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from itertools import chain, repeat
from typing import Any, TypeVar

_Record = TypeVar("_Record")
_PLAIN = (str, bool, int, float)
_Reader = Callable[[Any], Any]  # takes None for a value that is missing


def read_record(cls: type[_Record], values: Mapping[str, Any]) -> _Record:
    """Makes a record of the dataclass `cls` from a JSON object."""
    record: _Record = _read_object(cls, values)
    return record


def _read_object(cls: Any, values: Mapping[str, Any]) -> Any:
    return cls(**{name: read(values.get(name)) for name, read in _field_readers(cls).items()})


def as_json(value: Any) -> Any:
    """Returns a record as JSON holds it; also mappings and sequences of records."""
    if value is None or isinstance(value, _PLAIN):
        return value
    if is_dataclass(value):
        held = [(name, default, getattr(value, name)) for name, default in _defaults(value.__class__)]
        return {name: as_json(item) for name, default, item in held if default is MISSING or item != default}
    if isinstance(value, Mapping):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return value


@cache
def _defaults(cls: Any) -> list[tuple[str, Any]]:
    """Returns the fields of a dataclass with their defaults."""
    return [(field.name, field.default) for field in fields(cls)]


@cache
def _field_readers(cls: Any) -> dict[str, _Reader]:
    hints = typing.get_type_hints(cls)
    if not is_dataclass(cls):
        return {name: _reader(hints[name]) for name in cls._fields}
    return {field.name: _with_default(_reader(hints[field.name]), field.default) for field in fields(cls)}


def _with_default(read: _Reader, default: Any) -> _Reader:
    return read if default is MISSING else lambda value: default if value is None else read(value)


@cache
def _reader(hint: Any) -> _Reader:
    """Returns the reader of one type: a scalar, a record, `X | None`, `Mapping[str, X]` or a tuple of X."""
    arguments = typing.get_args(hint)
    if type(None) in arguments:
        inner = _reader(next(argument for argument in arguments if argument is not type(None)))
        return lambda value: None if value is None else inner(value)
    if typing.get_origin(hint) is tuple:
        item = _reader(arguments[0])
        return lambda value: tuple(map(item, value)) if isinstance(value, list | tuple) else ()
    if typing.get_origin(hint) is not None:
        item = _reader(arguments[1])
        return lambda value: {key: item(v) for key, v in value.items()} if isinstance(value, Mapping) else {}
    if is_dataclass(hint):
        return lambda value: _read_object(hint, value if isinstance(value, Mapping) else {})
    if hasattr(hint, "_fields"):
        return lambda value: _read_array(hint, value if isinstance(value, list | tuple) else ())
    return lambda value: hint() if value is None and hint is not Any else value


def _read_array(cls: Any, values: typing.Sequence[Any]) -> Any:
    readers = _field_readers(cls).values()
    return cls(*(read(value) for read, value in zip(readers, chain(values, repeat(None)), strict=False)))
