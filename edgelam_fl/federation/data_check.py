"""Checks the files of a local run's devices before their processes start: whether an example of each can be learned.

A device would find the same faults a minute later, and say them in a code alone: its messages may quote the data. Knows no
processes but the one that tokenizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgelam_fl.config import RunConfig
from edgelam_fl.errors import DataError
from edgelam_fl.federation.template import in_fork
from edgelam_fl.model.source import find_model
from edgelam_fl.plan.making import task_settings
from edgelam_fl.tasks.data import Pair, device_pairs, place_of
from edgelam_fl.tasks.kinds import make_task
from edgelam_fl.wire import edgelam_pb2 as pb

if TYPE_CHECKING:
    from edgelam_fl.tasks.base import Task


def check_files(config: RunConfig, data: Sequence[Path]) -> None:
    """Raises DataError for the first file that cannot be read as the run file says; takes no model."""
    for file in data:
        device_pairs(file, task_settings(config))


def check_tokens(config: RunConfig, data: Sequence[Path]) -> None:
    """Raises DataError for the first file that the run's model and settings cannot learn from; PyTorch is imported for it."""
    settings, folder = task_settings(config), find_model(config.model.name).folder
    in_fork(check_tokenized, [file.absolute() for file in data], settings.SerializeToString(), folder)


def check_tokenized(files: Sequence[Path], settings: bytes, tokenizer_folder: Path) -> None:
    """Raises DataError for the first file of whose training examples none can be learned, or one cannot be written as a text.

    `settings`: a serialized TaskSettings. `tokenizer_folder`: with the model's tokenizer.
    """
    from edgelam_fl.tasks.base import template_refuses  # brings torch, which the fork has

    parsed = pb.TaskSettings.FromString(settings)
    task = make_task(parsed, tokenizer_folder)
    for file in files:
        found = device_pairs(file, parsed)
        try:
            made = task.examples(found.training)
            task.examples(found.held_out)
        except DataError as error:
            raise _placed(error, task, file, [*found.training, *found.held_out], parsed) from error
        if not made.examples:
            raise DataError(
                f"{file}: no example for training has an answer within task.max_tokens = {parsed.max_tokens}; raise it"
                f"{template_refuses(made)}",
                "no-answer-fits",
            )


def _placed(error: DataError, task: Task, file: Path, pairs: Sequence[Pair], settings: pb.TaskSettings) -> DataError:
    """Returns the error of an example that cannot be written as a text, with the file, its place and the way out."""
    for pair in pairs:
        try:
            task.examples([pair])
        except DataError:
            place = place_of(file, pair, settings)
            words = f"{file}, {place}: {error} (data.bad_lines = 'skip' leaves such examples out)"
            return DataError(words, error.fault, place)
    return error
