"""A device's examples: reading the file, setting some aside, the order of training. Knows fields of text, not tokens."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

from edgelam_fl.errors import DataError, nearest

Pair = tuple[str, str]  # prompt and answer; of a classification the text and its class's name


def read_pairs(path: Path, prompt_field: str, answer_field: str) -> list[Pair]:
    """(prompt, answer) of each line of a JSON-lines file. Raises DataError with the line and what it lacks."""
    return [
        (_text(path, number, record, prompt_field), _text(path, number, record, answer_field))
        for number, record in read_records(path)
    ]


def read_records(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line: all that can be checked before a run file names the fields."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(f"no data file at {path}; --data takes a JSON-lines file, one example a line") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 (byte {error.start} is {error.object[error.start]:#04x}); convert it first"
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    records = [(number, _record(path, number, line)) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if len(records) < 2:
        raise DataError(f"{path} holds {len(records)} examples; at least 2 are needed: one to learn, one to measure")
    return records


def _record(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {number} is not JSON: {error.msg}") from error
    if not isinstance(record, dict):
        raise DataError(f"{path}, line {number} must be an object with named fields, got {line:.60}")
    return record


def _text(path: Path, number: int, record: dict[str, Any], field: str) -> str:
    if field not in record:
        raise DataError(
            f"{path}, line {number} lacks the field {field!r} ({nearest(field, record)}); data.fields in the run file names them"
        )
    if not isinstance(record[field], str) or not record[field].strip():
        raise DataError(f"{path}, line {number}: {field!r} must be a text that is not empty, got {record[field]!r:.60}")
    return record[field]


def set_aside(pairs: list[Pair], held_out: float, kind: str = "causal-lm") -> tuple[list[Pair], list[Pair]]:
    """(training, held-out). Chosen by content, so the split is the same in every round, run and order of the file.

    Pairs with one and the same answer go to one side together; of a classification, those with the same text.
    """
    deciding, word = (0, "text") if kind == "classification" else (1, "answer")

    def rank(pair: Pair) -> str:
        return hashlib.sha256(pair[deciding].encode()).hexdigest()

    ranks = sorted({rank(pair) for pair in pairs})
    if len(ranks) < 2:
        raise DataError(
            f"all examples have the same {word}; nothing could be measured on {word}s that were not learned"
        )
    measured = set(ranks[: min(len(ranks) - 1, max(1, round(held_out * len(ranks))))])
    return [p for p in pairs if rank(p) not in measured], [p for p in pairs if rank(p) in measured]


def batch_indices(examples: int, batch_size: int, step: int, seed: int, node: str) -> list[int]:
    """Which examples a device takes at a global step: its own shuffle an epoch, drawn on across the epochs' borders.

    A function of its arguments only, so that a node that restarts or sits out a round needs no cursor.
    """
    wanted = range(step * batch_size, (step + 1) * batch_size)
    orders: dict[int, list[int]] = {}
    for epoch in {position // examples for position in wanted}:
        orders[epoch] = list(range(examples))
        random.Random(f"{seed}/{node}/{epoch}").shuffle(orders[epoch])
    return [orders[position // examples][position % examples] for position in wanted]
