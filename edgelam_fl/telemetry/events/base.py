"""The base class of all events. Knows no event."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened, written as one line of JSON. Names of fields end in their unit."""

    time: float | None = None
    """Unix seconds at which the line was written; None before that."""


@dataclass(frozen=True, kw_only=True)
class UnknownEvent(Event):
    """An event of a kind that this version does not know, as a newer version may write."""

    kind: str
    """Name of the kind in the file."""
    fields: Mapping[str, Any]
    """All fields of the line."""


Emit = Callable[[Event], None]  # takes an event as it happens
