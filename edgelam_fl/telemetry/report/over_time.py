"""RUN/over_time.json: one channel over time, true, heard and predicted before and after a run, for its page. Knows no model.

Whoever wants it there puts it there by name: no channel of a device gets here by itself.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from edgelam_fl.errors import DataError
from edgelam_fl.files import write_atomically
from edgelam_fl.telemetry.records import as_json, read_record

OVER_TIME_FILE = "over_time.json"


@dataclass(frozen=True, kw_only=True)
class OverTime:
    """The strongest series of one held-out link, slot by slot: real parts, in units of its amplitude as it is heard."""

    speed_kmh: float
    """Speed of the link's user."""
    true: tuple[float, ...]
    """Without noise, in the slots that are heard and in those that are predicted."""
    heard: tuple[float, ...]
    """With noise, as a predictor sees it."""
    before: tuple[float, ...]
    """What the untrained model predicts of the slots after those."""
    after: tuple[float, ...]
    """What it predicts with the run's adapter."""


def write_over_time(folder: Path, shown: OverTime) -> None:
    write_atomically(folder / OVER_TIME_FILE, json.dumps(as_json(shown), indent=1) + "\n")


def read_over_time(folder: Path) -> OverTime | None:
    """Returns what is shown of the run in `folder`; None if nobody put it there. Raises DataError for a damaged file."""
    file = folder / OVER_TIME_FILE
    try:
        return read_record(OverTime, json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{file} does not hold a channel over time ({error!s:.100}): the file is damaged; remove it", "json"
        ) from error
