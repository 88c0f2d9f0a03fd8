"""Deals one data set to the devices of a run on this machine, as files of their own. Knows no process and no model."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelam_fl.array_files import holds_arrays
from edgelam_fl.config import RunConfig
from edgelam_fl.errors import ConfigError, DataError
from edgelam_fl.federation.from_data import MOST_DEVICES
from edgelam_fl.plan.making import task_settings
from edgelam_fl.tasks.data import answer_of, pairs_by
from edgelam_fl.tasks.files import scan
from edgelam_fl.tasks.named import local_data
from edgelam_fl.tasks.partition import deal

_FORM = re.compile(r"(?P<devices>\d+)(?::(?P<kind>[a-z]+)(?:=(?P<value>[^=]+))?)?")
_KINDS = {"iid": False, "dirichlet": True, "size": True}  # whether it has a value
_LEAST = 2  # examples per device: one to learn, one to measure with
ALLOWED = (
    "N, N:iid (at random), N:dirichlet=ALPHA (other shares of each answer; 0.1 is strong, 10 weak) or N:size=SIGMA (other numbers of "
    "examples)"
)


@dataclass(frozen=True)
class Split:
    """Into how many devices' files a data set is dealt, and how."""

    devices: int
    partition: str

    def __str__(self) -> str:
        return f"{self.devices}:{self.partition.replace(':', '=')}"


def read_split(text: str) -> Split:
    """Reads what --split says. Raises ConfigError for anything but its forms."""
    found = _FORM.fullmatch(text.strip())
    kind = (found["kind"] or "iid") if found else ""
    fits = found is not None and kind in _KINDS and _KINDS[kind] == (found["value"] is not None)
    if found is None or not fits or not _is_positive(found["value"]):
        raise ConfigError(f"--split {text!r} must be {ALLOWED}")
    devices = int(found["devices"])
    if not 1 <= devices <= MOST_DEVICES:
        raise ConfigError(
            f"--split {text!r}: the number of devices must be 1 to {MOST_DEVICES}, which one machine plays at most"
        )
    return Split(devices, f"{kind}:{found['value']}" if found["value"] else kind)


def _is_positive(value: str | None) -> bool:
    try:
        return value is None or 0 < float(value) < float("inf")
    except ValueError:
        return False


def deal_file(file: Path, config: RunConfig, split: Split, folder: Path) -> list[Path]:
    """Writes folder/device-1.jsonl and so on with the examples of one data set, each of them once; returns the paths.

    Which device gets what follows from run.seed alone. Raises DataError for data that cannot be read, ConfigError if they are too few,
    or if a label skew has no labels.
    """
    asked = f"--split {split}"
    if holds_arrays(file):
        raise ConfigError(
            f"{asked} deals texts, and {file} holds arrays: give --data once per device, with its own samples"
        )
    records, answers = _read(local_data(file), config)
    if split.partition.startswith("dirichlet") and 2 * len(set(answers)) > len(answers):
        raise ConfigError(
            f"{asked} deals by answers, as classes are, and the {len(answers)} examples of {file} have {len(set(answers))} different "
            f"ones. Allowed: --split {split.devices} (at random), or --split {split.devices}:size=1.0 (other numbers of examples)"
        )
    dealt = deal(answers, split.devices, split.partition, config.run.seed, _LEAST, asked)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"device-{number}.jsonl" for number in range(1, split.devices + 1)]
    for device, rows in zip(files, dealt, strict=True):
        lines = (json.dumps(records[row], ensure_ascii=False, default=str) + "\n" for row in rows)
        device.write_text("".join(lines), encoding="utf-8")
    return files


def _read(file: Path, config: RunConfig) -> tuple[list[Any], Sequence[str]]:
    """Returns the records that can be read, and the answer of each."""
    settings = task_settings(config)
    pairs_by(settings, file)  # says what is wrong, as a run says it
    records, answers = list[Any](), list[str]()
    for row in scan(file):
        if isinstance(row, DataError):
            continue  # data.bad_lines = "skip"
        if (answer := answer_of(row[1], settings)) is not None:
            records.append(row[1])
            answers.append(answer)
    return records, answers
