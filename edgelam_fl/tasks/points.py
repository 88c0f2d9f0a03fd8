"""Measures at places of an axis, as sums that add up over micro-batches: a sum rate by SNR, an error by speed.

A task's `loss` returns them among its sums, for the model and for the methods that it is compared with; the server makes means
of them. Knows names alone: no channels and no tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from edgelam_fl.names import printable
from edgelam_fl.telemetry.events import MeasuredPoint

MODEL = ""  # who: the model with its adapter
_NAME = re.compile(r"at/([^/]{1,24})/(count|sum/(.{0,40}))")


def sums_at(at: float, sums: Mapping[str, float], count: int) -> dict[str, float]:
    """Returns the sums of a measure over `count` values at one place, under the names of a report. `sums`: by who, see `MODEL`."""
    place = f"at/{at:g}"
    return {f"{place}/count": float(count)} | {f"{place}/sum/{who}": value for who, value in sums.items()}


def points_of(sums: Mapping[str, float]) -> tuple[MeasuredPoint, ...]:
    """Returns the means of a report's sums, the model's first, each by its place; what is no measure at a place is left out."""
    found, counts = dict[tuple[str, float], float](), dict[float, float]()
    for name, value in sums.items():
        match = _NAME.fullmatch(name)
        at = _number(match[1]) if match else math.nan
        if match and math.isfinite(at):
            if match[2] == "count":
                counts[at] = value
            else:
                found[printable(match[3], 40), at] = value
    return tuple(
        MeasuredPoint(who, at, value / counts[at] if math.isfinite(value) else None, int(counts[at]))
        for (who, at), value in sorted(found.items())
        if math.isfinite(counts.get(at, 0.0)) and counts.get(at, 0.0) >= 1
    )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
