"""Loads a device's examples and the task of a plan. Knows files and tokens; knows nothing about rounds or links."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from edgelam_fl.errors import DataError
from edgelam_fl.files import Content, content_of
from edgelam_fl.tasks.base import Made, Task, template_refuses
from edgelam_fl.tasks.data import DevicePairs
from edgelam_fl.tasks.kinds import device_data, make_task
from edgelam_fl.telemetry.events import DataChanged, DataRead, EmitInJob
from edgelam_fl.wire import edgelam_pb2 as pb

# both raise DataError if the file does not fit the settings
ReadPairs = Callable[[Path, pb.TaskSettings], DevicePairs]
Tokenize = Callable[[Task, bytes, list[Any]], Made]  # the bytes say for what: equal ones, equal examples


_PLACES_SAID = 10


class Loaded(NamedTuple):
    """A device's examples, tokenized, and what is not used of its data."""

    training: list[Any]
    held_out: list[Any]
    counts: pb.DataCounts


class Counted(NamedTuple):
    """How many examples a device has, and what is not used of its data."""

    training: int
    held_out: int
    counts: pb.DataCounts


def task_of(plan: pb.Plan, tokenizer_folder: Path) -> Task:
    """Makes the task that a plan describes. Raises ConfigError for settings that fit no task."""
    return make_task(plan.task, tokenizer_folder)


def tokenize(task: Task, _: bytes, pairs: list[Any]) -> Made:
    """Turns pairs of prompt and answer, or samples of arrays, into examples."""
    return task.examples(pairs)


class DeviceExamples:
    """The examples in a device's file; the last ones that were tokenized stay in memory."""

    def __init__(
        self, file: Path, read: ReadPairs = device_data, tokenize: Tokenize = tokenize, beside: Sequence[Path] = ()
    ) -> None:
        """Reads nothing yet. `read`: splits the file into training and held-out pairs. `beside`: further files that it reads."""
        self._file, self._read, self._tokenize = file, read, tokenize
        self._contents: dict[Path, Content | None] = dict.fromkeys([file, *beside])
        self._key: tuple[bytes, bytes] | None = None
        self._loaded = Loaded([], [], pb.DataCounts())
        self._lock = threading.Lock()  # a profile may be asked for while a part begins

    def count(self, settings: pb.TaskSettings) -> Counted:
        """Counts the examples before anything is tokenized. Raises DataError if the file does not fit the task."""
        return _counted(self._read(self._file, settings))

    def count_tokenized(
        self, task: Task, settings: pb.TaskSettings, model: str, most: int, emit: EmitInJob = lambda event: None
    ) -> Counted:
        """Counts the examples as the tokenizer leaves them, and keeps them for `load`, whose arguments these are.

        If there are more than `most`, they are counted before it. Raises DataError as `count`.
        """
        with self._lock:
            key = self._key_of(settings, model)
            if key != self._key:
                found = self._read(self._file, settings)
                if len(found.training) + len(found.held_out) > most:
                    return _counted(found)
                self._take(found, task, settings, key, emit)
            return Counted(len(self._loaded.training), len(self._loaded.held_out), self._loaded.counts)

    def load(self, task: Task, settings: pb.TaskSettings, model: str, emit: EmitInJob = lambda event: None) -> Loaded:
        """Returns the examples, tokenized once for the same settings, model and content of the file.

        `model`: its identity, since two models number the same words unlike. `emit`: hears what was read, and that the content
        has changed since the last load. Raises DataError as `count`.
        """
        with self._lock:
            key = self._key_of(settings, model)
            if key != self._key:
                self._take(self._read(self._file, settings), task, settings, key, emit)
            return self._loaded

    def _key_of(self, settings: pb.TaskSettings, model: str) -> tuple[bytes, bytes]:
        """Returns what the examples are made for, and a digest of what they are made of."""
        return settings.SerializeToString(deterministic=True) + model.encode(), self._content()

    def _take(
        self, found: DevicePairs, task: Task, settings: pb.TaskSettings, key: tuple[bytes, bytes], emit: EmitInJob
    ) -> None:
        """Tokenizes what was read, in place of what was loaded before."""
        purpose, data = key
        has_changed = self._key is not None and self._key[1] != data
        learned, measured = (self._tokenize(task, purpose, pairs) for pairs in (found.training, found.held_out))
        counts = _unused(found)
        counts.bad += learned.refused + measured.refused
        counts.skipped, counts.cut = learned.skipped + measured.skipped, learned.cut + measured.cut
        counts.cut_answers = learned.cut_answers + measured.cut_answers
        self._loaded = Loaded(_some(learned, settings), measured.examples, counts)
        self._key = key
        if has_changed:
            emit(DataChanged(examples=len(learned.examples), held_out=len(measured.examples)))
        emit(_read_event(found, self._loaded, settings, (*learned.remarks, *measured.remarks)))

    def _content(self) -> bytes:
        """Returns a digest of all that is read; the files are looked at, and read only if something about them has changed."""
        try:
            self._contents = {file: content_of(file, known) for file, known in self._contents.items()}
        except OSError:
            return b""  # reading it says what is wrong
        return "".join(content.digest for content in self._contents.values() if content is not None).encode()


def _counted(found: DevicePairs) -> Counted:
    return Counted(len(found.training), len(found.held_out), _unused(found))


def _unused(found: DevicePairs) -> pb.DataCounts:
    return pb.DataCounts(bad=len(found.bad), unread=len(found.unread), unmeasured=found.unmeasured)


def _read_event(found: DevicePairs, loaded: Loaded, settings: pb.TaskSettings, remarks: tuple[str, ...]) -> DataRead:
    counts = loaded.counts
    return DataRead(
        examples=len(loaded.training), held_out=len(loaded.held_out), max_tokens=settings.max_tokens,
        bad=counts.bad, skipped=counts.skipped, cut=counts.cut, cut_answers=counts.cut_answers, unread_fields=counts.unread,
        unmeasured=counts.unmeasured, also_learned=found.also_learned,
        bad_places=found.bad[:_PLACES_SAID], unread_names=found.unread, remarks=remarks,
    )  # fmt: skip


def _some(made: Made, settings: pb.TaskSettings) -> list[Any]:
    """Returns the examples for training. Raises DataError if there are none."""
    if not made.examples:
        raise DataError(
            f"no example has an answer within task.max_tokens = {settings.max_tokens}; raise it{template_refuses(made)}",
            "no-answer-fits",
        )
    return made.examples
