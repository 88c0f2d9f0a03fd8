"""Events in a file: one JSON object per line, appended as things happen. Knows nothing about what the fields mean."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from edgelam_fl.errors import DataError
from edgelam_fl.telemetry.events.base import Event, UnknownEvent
from edgelam_fl.telemetry.events.table import EVENTS, kind_of
from edgelam_fl.telemetry.records import as_json, read_record

_Kind = TypeVar("_Kind", bound=Event)


class EventLog:
    """Appends events to one file; safe to call from any thread.

    most_bytes: size at which the file is set aside as PATH.old, in place of an older one; 0: no limit.
    """

    def __init__(self, path: Path, most_bytes: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self.path, self._most_bytes = path, most_bytes
        self._lock = threading.Lock()
        self._closed = False

    def __call__(self, event: Event) -> None:
        """Writes one line, with the current time; the file is open only meanwhile."""
        line = {"time": round(time.time(), 3), "event": kind_of(event), **as_json(replace(event, time=None))}
        text = json.dumps(line, ensure_ascii=False)
        with self._lock:
            if self._closed:
                return
            if self._most_bytes and self.path.stat().st_size >= self._most_bytes:
                self.path.replace(self.path.with_name(f"{self.path.name}.old"))
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    def close(self) -> None:
        """Drops later events."""
        with self._lock:
            self._closed = True


def parse_event(line: Mapping[str, Any]) -> Event:
    """Makes an event of the JSON object of a line; an `UnknownEvent` if this version does not know the kind."""
    kind = line.get("event")
    if kind not in EVENTS:
        return UnknownEvent(time=line.get("time"), kind=str(kind), fields=line)
    return read_record(EVENTS[kind], line)


def read_events(path: Path) -> Iterator[Event]:
    """Yields the events of a file, oldest first. A half-written last line (a run in progress, a crash) is left out.

    Raises DataError with the line for one that is no event.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                yield _event(path, f"line {number}", line)


def _event(path: Path, place: str, line: bytes) -> Event:
    try:
        return parse_event(json.loads(line.decode()))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path}, {place} is not an event ({error!s:.100}): the file is damaged", "json", place
        ) from error


def of_kind(events: Iterable[Event], kind: type[_Kind]) -> Iterator[_Kind]:
    """Yields the events of one class, in their order."""
    return (event for event in events if isinstance(event, kind))


class EventTail:
    """Follows a file that another process is writing: each `poll` returns the events added since the last one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0

    def poll(self) -> list[Event]:
        """Returns the new events, oldest first; none while there is no file."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            if self.path.stat().st_size < self._offset:
                self._offset = 0  # its writer has started a new file
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        place = f"after byte {self._offset}"
        self._offset += len(whole)
        return [_event(self.path, place, line) for line in whole.splitlines()]
