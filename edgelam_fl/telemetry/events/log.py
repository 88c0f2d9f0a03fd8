"""Events in a file: one JSON object per line, appended as things happen. Knows nothing about what the fields mean."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from edgelam_fl.errors import DataError
from edgelam_fl.telemetry.events.base import Event, UnknownEvent
from edgelam_fl.telemetry.events.run import EventsDropped
from edgelam_fl.telemetry.events.table import EVENTS, kind_of
from edgelam_fl.telemetry.records import as_json, read_record

_Kind = TypeVar("_Kind", bound=Event)
EVENTS_FILE, TIMELINES_FILE = "events.jsonl", "timelines.jsonl"  # files of a run's folder
TIMELINES_BYTES = 2_000_000  # of the newest timelines, and as much of those before
_PIECE_BYTES = 1 << 16


class EventLog:
    """Appends events to one file; safe to call from any thread. A line that cannot be written fails nobody: it is dropped, and
    how many were is the next line that can be written.

    most_bytes: size at which the file is set aside as PATH.old, in place of an older one; 0: no limit.
    """

    def __init__(self, path: Path, most_bytes: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        _cut_torn_line(path)
        self.path, self._most_bytes = path, most_bytes
        self._lock = threading.Lock()
        self._closed = False
        self._dropped, self._reason = 0, ""

    def __call__(self, event: Event) -> None:
        """Writes one line, with the current time; the file is open only meanwhile."""
        with self._lock:
            if self._closed:
                return
            try:
                self._set_aside()
                dropped = [EventsDropped(count=self._dropped, reason=self._reason)] if self._dropped else []
                self._append([*dropped, event])
                self._dropped = 0
            except OSError as error:
                self._dropped, self._reason = self._dropped + 1, os.strerror(error.errno) if error.errno else str(error)

    def sync(self) -> int:
        """Brings all lines to the disk as far as it takes them; returns the file's size in bytes."""
        with self._lock, suppress(OSError):
            descriptor = os.open(self.path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                return os.fstat(descriptor).st_size
            finally:
                os.close(descriptor)
        return 0

    def close(self) -> None:
        """Drops later events."""
        with self._lock:
            self._closed = True

    def _append(self, events: Iterable[Event]) -> None:
        """Writes whole lines or nothing. Raises OSError for the latter."""
        now = round(time.time(), 3)
        lines = (json.dumps({"time": now, **as_line(event)}, ensure_ascii=False) + "\n" for event in events)
        rest = memoryview("".join(lines).encode())
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            before = os.fstat(descriptor).st_size
            try:
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
            except OSError:
                os.ftruncate(descriptor, before)
                raise
        finally:
            os.close(descriptor)

    def _set_aside(self) -> None:
        if self._most_bytes and self.path.exists() and self.path.stat().st_size >= self._most_bytes:
            self.path.replace(self.path.with_name(f"{self.path.name}.old"))


def _cut_torn_line(path: Path) -> None:
    """Removes a last line without its end, which a killed writer left: the next event would be a part of it."""
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            begin = max(0, end - _PIECE_BYTES)
            file.seek(begin)
            newline = file.read(end - begin).rfind(b"\n")
            if newline >= 0:
                end = begin + newline + 1
                break
            end = begin
        if end < file.seek(0, os.SEEK_END):
            file.truncate(end)


def mend_log(path: Path, good_bytes: int) -> None:
    """Cuts a file of events at the first line that is none: a power cut may leave bytes that were never written.

    good_bytes: up to there the lines are known to be on the disk; if the file has become shorter, nothing is known.
    """
    if not path.exists():
        return
    with path.open("rb+") as file:
        good = good_bytes if good_bytes <= file.seek(0, os.SEEK_END) else 0
        file.seek(good)
        for line in file:
            if not line.endswith(b"\n") or not _is_event(line):
                break
            good += len(line)
        file.truncate(good)


def _is_event(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def as_line(event: Event) -> dict[str, Any]:
    """Returns the JSON object of an event's line, without its time."""
    return {"event": kind_of(event), **as_json(replace(event, time=None))}


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
