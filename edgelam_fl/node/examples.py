"""Loads a device's examples and the task of a plan. Knows files and tokens; knows nothing about rounds or links."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from edgelam_fl.errors import DataError
from edgelam_fl.files import Content, content_of
from edgelam_fl.tasks.base import Example, Made, Task
from edgelam_fl.tasks.data import DevicePairs, Pair, device_pairs
from edgelam_fl.tasks.kinds import make_task
from edgelam_fl.telemetry.events import DataChanged, EmitInJob
from edgelam_fl.wire import edgelam_pb2 as pb

# both raise DataError if the file does not fit the settings
ReadPairs = Callable[[Path, pb.TaskSettings], DevicePairs]
Tokenize = Callable[[Task, bytes, list[Pair]], Made]  # the bytes say for what: equal ones, equal examples


def task_of(plan: pb.Plan, tokenizer_folder: Path) -> Task:
    """Makes the task that a plan describes. Raises ConfigError for settings that fit no task."""
    return make_task(plan.task, tokenizer_folder)


def tokenize(task: Task, _: bytes, pairs: list[Pair]) -> Made:
    """Turns pairs of prompt and answer into examples."""
    return task.examples(pairs)


class DeviceExamples:
    """The examples in a device's file; the last ones that were tokenized stay in memory."""

    def __init__(
        self, file: Path, read: ReadPairs = device_pairs, tokenize: Tokenize = tokenize, beside: Sequence[Path] = ()
    ) -> None:
        """Reads nothing yet. `read`: splits the file into training and held-out pairs. `beside`: further files that it reads."""
        self._file, self._read, self._tokenize = file, read, tokenize
        self._contents: dict[Path, Content | None] = dict.fromkeys([file, *beside])
        self._key: tuple[bytes, bytes] | None = None
        self._loaded: tuple[list[Example], list[Example]] = [], []

    def count(self, settings: pb.TaskSettings) -> tuple[int, int]:
        """Counts the examples for training and those held out. Raises DataError if the file does not fit the task."""
        found = self._read(self._file, settings)
        return len(found.training), len(found.held_out)

    def load(
        self, task: Task, settings: pb.TaskSettings, model: str, emit: EmitInJob = lambda event: None
    ) -> tuple[list[Example], list[Example]]:
        """Returns (training, held-out), tokenized once for the same settings, model and content of the file.

        `model`: its identity, since two models number the same words unlike. `emit`: hears that the content has changed since
        the last load. Raises DataError as `count`.
        """
        purpose, data = settings.SerializeToString(deterministic=True) + model.encode(), self._content()
        if (purpose, data) != self._key:
            has_changed = self._key is not None and self._key[1] != data
            found = self._read(self._file, settings)
            made = self._tokenize(task, purpose, found.training), self._tokenize(task, purpose, found.held_out)
            self._loaded = _some(made[0], settings), made[1].examples
            self._key = purpose, data
            if has_changed:
                emit(DataChanged(examples=len(self._loaded[0]), held_out=len(self._loaded[1])))
        return self._loaded

    def _content(self) -> bytes:
        """Returns a digest of all that is read; the files are looked at, and read only if something about them has changed."""
        try:
            self._contents = {file: content_of(file, known) for file, known in self._contents.items()}
        except OSError:
            return b""  # reading it says what is wrong
        return "".join(content.digest for content in self._contents.values() if content is not None).encode()


def _some(made: Made, settings: pb.TaskSettings) -> list[Example]:
    """Returns the examples for training. Raises DataError if there are none."""
    if not made.examples:
        raise DataError(
            f"no example has an answer within task.max_tokens = {settings.max_tokens}; raise it", "no-answer-fits"
        )
    return made.examples
