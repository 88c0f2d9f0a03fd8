"""The held-out measure of each kind of task: its name, its unit, and which way is better. Knows names of tasks, no events."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgelam_fl.telemetry.human import NOTHING, human_number


@dataclass(frozen=True)
class Measure:
    """One held-out measure. Records hold its plain value; what people read is in its unit."""

    higher: bool = False
    """Whether a higher value is better."""
    percent: bool = False
    """Whether people read it in per cent."""
    decibels: bool = False
    """Whether records hold a mean ratio, of which people read the dB."""
    unit: str = ""
    """Unit of what people read; empty: none, or the number brings its own."""
    over: str = ""
    """What its points lie on, as an axis of a figure; empty: it is one number, and has no points."""


MEASURES = {
    "perplexity": Measure(),
    "accuracy": Measure(higher=True, percent=True),
    "sum rate": Measure(higher=True, unit="bit/s/Hz", over="SNR, dB"),
    "NMSE": Measure(decibels=True, unit="dB", over="speed, km/h"),
}
_OF_TASKS = {"classification": "accuracy", "beamforming": "sum rate", "channel-prediction": "NMSE"}


def measure_of(task: str | None) -> str:
    """Returns the name of the measure of an adapter's quality at a kind of task."""
    return _OF_TASKS.get(task or "", "perplexity")


def with_unit(measure: str) -> str:
    """Returns a measure's name and, behind a comma, its unit: the title of an axis."""
    unit = MEASURES[measure].unit
    return f"{measure}, {unit}" if unit else measure


def shown_value(measure: str, value: float | None) -> float | None:
    """Returns the number that people read for a value of a record: its dB if the measure has them; None for None, or without a dB."""
    if value is None or not MEASURES[measure].decibels:
        return value
    return 10 * math.log10(value) if value > 0 else None


def human_measure(measure: str, value: float | None) -> str:
    """Writes perplexity 15.501 as "15.50", accuracy 0.8125 as "81.2 %", an NMSE of 0.1 as "-10.00 dB"; a dash for None."""
    shown = shown_value(measure, value)
    if shown is None:
        return NOTHING
    if MEASURES[measure].percent:
        return f"{shown:.1%}".replace("%", " %")
    return human_number(shown, 2) + (" dB" if MEASURES[measure].decibels else "")
