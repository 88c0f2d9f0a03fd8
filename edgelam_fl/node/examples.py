"""Loads a device's examples and the task of a plan. Knows files and tokens; knows nothing about rounds or links."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edgelam_fl.errors import DataError
from edgelam_fl.tasks.base import Example, Made, Task
from edgelam_fl.tasks.data import Pair, device_pairs
from edgelam_fl.tasks.kinds import make_task
from edgelam_fl.wire import edgelam_pb2 as pb

# the first returns (training, held-out); both raise DataError if the file does not fit the settings
ReadPairs = Callable[[Path, pb.TaskSettings], tuple[list[Pair], list[Pair]]]
Tokenize = Callable[[Task, pb.TaskSettings, list[Pair]], Made]


def task_of(plan: pb.Plan, tokenizer_folder: Path) -> Task:
    """Makes the task that a plan describes. Raises ConfigError for settings that fit no task."""
    return make_task(plan.task, tokenizer_folder)


def tokenize(task: Task, _: pb.TaskSettings, pairs: list[Pair]) -> Made:
    """Turns pairs of prompt and answer into examples."""
    return task.examples(pairs)


class DeviceExamples:
    """The examples in a device's file; the last ones that were tokenized stay in memory."""

    def __init__(self, file: Path, read: ReadPairs = device_pairs, tokenize: Tokenize = tokenize) -> None:
        """Reads nothing yet. `read`: splits the file into training and held-out pairs."""
        self._file, self._read, self._tokenize = file, read, tokenize
        self._key = b""
        self._loaded: tuple[list[Example], list[Example]] = [], []

    def count(self, settings: pb.TaskSettings) -> tuple[int, int]:
        """Counts the examples for training and those held out. Raises DataError if the file does not fit the task."""
        training, held_out = self._read(self._file, settings)
        return len(training), len(held_out)

    def load(self, task: Task, settings: pb.TaskSettings) -> tuple[list[Example], list[Example]]:
        """Returns (training, held-out), tokenized once for the same file and settings. Raises DataError as `count`."""
        key = settings.SerializeToString(deterministic=True) + self._version()
        if key != self._key:
            training, held_out = self._read(self._file, settings)
            made = self._tokenize(task, settings, training), self._tokenize(task, settings, held_out)
            self._loaded = _some(made[0], settings), _some(made[1], settings)
            self._key = key
        return self._loaded

    def _version(self) -> bytes:
        """Returns what changes whenever the file is written; empty if there is no file."""
        try:
            return str(self._file.stat().st_mtime_ns).encode()
        except OSError:
            return b""


def _some(made: Made, settings: pb.TaskSettings) -> list[Example]:
    """Returns the examples. Raises DataError if there are none."""
    if not made.examples:
        raise DataError(
            f"no example has an answer within task.max_tokens = {settings.max_tokens}; raise it", "no-answer-fits"
        )
    return made.examples
