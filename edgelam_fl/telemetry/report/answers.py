"""RUN/answers.json: answers to a few questions before and after a run, for its page. Knows no model.

Whoever wants them there asks for them by name: no text of a device's data gets here by itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from edgelam_fl.errors import DataError
from edgelam_fl.files import write_atomically
from edgelam_fl.telemetry.records import as_json, read_record

ANSWERS_FILE = "answers.json"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One question and what is answered."""

    question: str
    """The question."""
    before: str
    """What the base model answers."""
    after: str
    """What it answers with the run's adapter."""
    truth: str = ""
    """The right answer; "" if it is not known."""


def write_answers(folder: Path, answers: Iterable[Answer]) -> None:
    """Adds answers to those of the run in `folder`; a newer one to the same question takes the older one's place."""
    found = {answer.question: answer for answer in (*read_answers(folder), *answers)}
    text = json.dumps([as_json(answer) for answer in found.values()], indent=1, ensure_ascii=False)
    write_atomically(folder / ANSWERS_FILE, text + "\n")


def read_answers(folder: Path) -> list[Answer]:
    """Returns the answers of the run in `folder`; empty if nobody asked. Raises DataError for a damaged file."""
    file = folder / ANSWERS_FILE
    try:
        return [read_record(Answer, each) for each in json.loads(file.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{file} does not hold answers ({error!s:.100}): the file is damaged; remove it", "json"
        ) from error
