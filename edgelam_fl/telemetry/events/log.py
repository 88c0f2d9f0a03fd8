"""Events in a file: one JSON object per line, appended as things happen. Knows nothing about what the fields mean."""

from __future__ import annotations

import glob
import gzip
import json
import os
import re
import threading
import time
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, TypeVar

from edgelam_fl.errors import DataError
from edgelam_fl.files import write_atomically
from edgelam_fl.telemetry.events.base import Event, UnknownEvent
from edgelam_fl.telemetry.events.run import EventsDropped
from edgelam_fl.telemetry.events.table import EVENTS, kind_of
from edgelam_fl.telemetry.records import as_json, read_record

_Kind = TypeVar("_Kind", bound=Event)
EVENTS_FILE, TIMELINES_FILE = "events.jsonl", "timelines.jsonl"  # files of a run's folder
TIMELINES_BYTES = 2_000_000  # of the newest timelines, and as much of those before
EVENTS_BYTES = 16_000_000  # of a run, until they are packed: thousands of rounds
_PACKED = ".gz"
_PIECE_BYTES = 1 << 16
_MOST_PIECE_BYTES = 1 << 20
_KIND, _KIND_WITHIN = re.compile(rb'"event": ?"(\w+)"'), 80  # of a line, at its beginning


class EventLog:
    """Appends events to one file; safe to call from any thread. A line that cannot be written fails nobody: it is dropped, and
    how many were is the next line that can be written.

    most_bytes: size at which the file is set aside as PATH.old, in place of an older one; 0: no limit. keeps_all: it is then
    packed beside the others, as NAME-000001.jsonl.gz, where `read_events` finds it.
    """

    def __init__(self, path: Path, most_bytes: int = 0, *, keeps_all: bool = False) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self._most_bytes, self._keeps_all = path, most_bytes, keeps_all
        self._open_file()
        _cut_torn_line(path)
        self._lock = threading.Lock()
        self._closed = False
        self._dropped, self._reason = 0, ""

    def __call__(self, event: Event) -> None:
        """Writes one line, with the current time, straight to the system: a process that is killed has lost none."""
        with self._lock:
            if self._closed:
                return
            with suppress(OSError):  # on a full disk the file stays as long as it is
                self._set_aside()
            try:
                dropped = [EventsDropped(count=self._dropped, reason=self._reason)] if self._dropped else []
                self._append([*dropped, event])
                self._dropped = 0
            except OSError as error:
                self._dropped, self._reason = self._dropped + 1, os.strerror(error.errno) if error.errno else str(error)

    def sync(self) -> int:
        """Brings all lines to the disk as far as it takes them; returns the file's size in bytes, 0 for a closed log."""
        with self._lock, suppress(OSError):
            if not self._closed:
                os.fsync(self._file())
                return os.fstat(self._descriptor).st_size
        return 0

    def close(self) -> None:
        """Drops later events."""
        with self._lock:
            self._closed = True
            self._release()

    def _open_file(self) -> None:
        """Opens the file, and makes it if it is not there. It is released by `_release`, or with this log."""
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._release = weakref.finalize(self, os.close, self._descriptor)

    def _file(self) -> int:
        """Returns the descriptor of the file, which is opened again if it was set aside, or removed by somebody."""
        if self._release.alive and os.fstat(self._descriptor).st_nlink:
            return self._descriptor
        self._release()
        self._open_file()
        return self._descriptor

    def _append(self, events: Iterable[Event]) -> None:
        """Writes whole lines or nothing. Raises OSError for the latter."""
        now = round(time.time(), 3)
        lines = (json.dumps({"time": now, **as_line(event)}, ensure_ascii=False) + "\n" for event in events)
        rest = memoryview("".join(lines).encode())
        descriptor = self._file()
        before = os.fstat(descriptor).st_size
        try:
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        except OSError:
            os.ftruncate(descriptor, before)
            raise

    def _set_aside(self) -> None:
        if not (self._most_bytes and os.fstat(self._file()).st_size >= self._most_bytes):
            return
        self._release()
        if not self._keeps_all:
            self.path.replace(self.path.with_name(f"{self.path.name}.old"))
            return
        number = max(_set_aside(self.path), default=0) + 1
        self.path.replace(self.path.with_name(f"{self.path.stem}-{number:06d}{self.path.suffix}"))
        for file in _set_aside(self.path).values():
            if file.suffix != _PACKED:
                write_atomically(file.with_name(file.name + _PACKED), gzip.compress(file.read_bytes()))
                file.unlink()


def _set_aside(path: Path) -> dict[int, Path]:
    """Returns the files of events that came before those in `path`, by their numbers."""
    found = sorted(path.parent.glob(f"{glob.escape(path.stem)}-*"))  # the packed file after the plain one
    name = re.compile(rf"{re.escape(path.stem)}-(\d{{6,}}){re.escape(path.suffix)}({re.escape(_PACKED)})?")
    return {int(match[1]): file for file in found if (match := name.fullmatch(file.name))}


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
        good = good_bytes if 0 < good_bytes <= file.seek(0, os.SEEK_END) else 0
        if good:
            file.seek(good - 1)
            good *= file.read(1) == b"\n"  # if it is another file by now
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


def read_events(path: Path, kinds: Collection[type[Event]] = ()) -> Iterator[Event]:
    """Yields the events of a file, oldest first, after those of the files that were set aside before it. A half-written last line (a run
    in progress, a crash) is left out.

    kinds: the only ones that are read; (): all. Raises DataError with the line for one that is no event.
    """
    names = {name.encode() for name, kind in EVENTS.items() if kind in kinds}
    for place in [*_before(path), path]:
        yield from _events_in(place, names)


def _open(path: Path) -> IO[bytes] | gzip.GzipFile:
    """Opens a file of events, which its writer may be packing."""
    if path.suffix != _PACKED:
        try:
            return path.open("rb")
        except FileNotFoundError:
            path = path.with_name(path.name + _PACKED)
    return gzip.open(path)


def _events_in(path: Path, names: Collection[bytes]) -> Iterator[Event]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            kind = _KIND.search(line, 0, _KIND_WITHIN) if names else None
            if line.endswith(b"\n") and (kind is None or kind[1] in names):
                yield _event(path, f"line {number}", line)


def _before(path: Path) -> list[Path]:
    older = _set_aside(path)
    return [older[number] for number in sorted(older)]


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


@dataclass(frozen=True, kw_only=True)
class EventPiece:
    """Whole lines out of the files of a run's events, and where the lines after them begin."""

    lines: str
    """The lines as they are in the file; "": there are none yet."""
    part: int
    """Number of the file: those that were set aside count from 1, and the one that is being written is the next."""
    offset: int
    """Byte of that file, once unpacked."""


def read_piece(path: Path, part: int = 1, offset: int = 0, most_bytes: int = _MOST_PIECE_BYTES) -> EventPiece:
    """Reads up to `most_bytes` of whole lines, at least one if there is one, from a place that an earlier piece named.

    For a reader elsewhere, which keeps the place: `EventTail` follows a file of this machine. A place that is none gives the rest
    from the nearest one.
    """
    aside = _set_aside(path)
    part = max(1, part)
    file = aside.get(part, path)
    try:
        with _open(file) as stream:
            stream.seek(max(0, offset))
            data = stream.read(most_bytes)
            while b"\n" not in data and (more := stream.read(most_bytes)):
                data += more
    except FileNotFoundError:
        return EventPiece(lines="", part=part, offset=offset)
    whole = data[: data.rfind(b"\n") + 1]
    if not data and part in aside:
        return EventPiece(lines="", part=part + 1, offset=0)
    return EventPiece(lines=whole.decode(errors="replace"), part=part, offset=max(0, offset) + len(whole))


class EventTail:
    """Follows a file that another process is writing: each `poll` returns the events added since the last one, also if its writer
    set the file aside meanwhile.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._inode, self._offset = 0, 0  # of the file at the last look, and how much of it was read
        self._aside = 0  # the newest file that was set aside before it

    def poll(self) -> list[Event]:
        """Returns the new events, oldest first, at first with those of files that were set aside; none while there is no file."""
        while True:
            aside = _set_aside(self.path)
            try:
                with self.path.open("rb") as file:
                    status = os.fstat(file.fileno())
                    is_new = (status.st_ino, max(aside, default=0)) != (self._inode, self._aside)
                    if status.st_size < self._offset and not is_new:
                        self._offset = 0  # its writer has emptied it
                    begin = 0 if is_new else self._offset
                    file.seek(begin)
                    data = file.read()
            except FileNotFoundError:
                return []
            if _set_aside(self.path).keys() == aside.keys():
                break
        found = self._left_behind(aside) if is_new else []
        self._inode, self._aside = status.st_ino, max(aside, default=0)
        events, size = _whole_lines(self.path, data, begin)
        self._offset = begin + size
        return found + events

    def _left_behind(self, aside: Mapping[int, Path]) -> list[Event]:
        """Returns what was not read of the files that were written before the newest."""
        found: list[Event] = []
        before = [aside[number] for number in sorted(aside) if number > self._aside]
        old = self.path.with_name(f"{self.path.name}.old")
        if not before and self._inode and old.exists() and old.stat().st_ino == self._inode:
            before = [old]
        for place in before:
            with _open(place) as file:
                data = file.read()
            found += _whole_lines(place, data[self._offset :], self._offset)[0]
            self._offset = 0
        return found


def _whole_lines(path: Path, data: bytes, begin: int) -> tuple[list[Event], int]:
    """Returns the events of the whole lines in `data`, which begins at this byte of the file, and the size of these lines."""
    whole = data[: data.rfind(b"\n") + 1]
    place = f"after byte {begin}"
    return [_event(path, place, line) for line in whole.splitlines()], len(whole)
