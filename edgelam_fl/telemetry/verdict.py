"""What a run has come to, as one sentence and as a mean with its spread over devices. Knows summaries; knows no looks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean, stdev

from edgelam_fl.telemetry.measures import MEASURES, human_measure, measure_of
from edgelam_fl.telemetry.summary import ENDED, Summary, before_and_after
from edgelam_fl.telemetry.summary_words import best_in_words, metrics_in_words

OVER = (*ENDED, "killed")
"""The states of a run that does not go on by itself."""
_NAMED = 3  # devices that a sentence names


@dataclass(frozen=True)
class Spread:
    """Values of several devices, each of which counts once."""

    mean: float
    """Their mean."""
    spread: float
    """Their sample standard deviation; 0 for one value."""
    lowest: float
    """The lowest."""
    highest: float
    """The highest."""
    count: int
    """Number of devices that have a value."""


def spread_of(values: Iterable[float | None]) -> Spread | None:
    """Returns mean and spread of the values that are finite numbers; None without any."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return None
    return Spread(fmean(known), stdev(known) if len(known) > 1 else 0.0, min(known), max(known), len(known))


def with_spread(measure: str, found: Spread | None) -> str:
    """Writes a mean over devices with their sample standard deviation, as "15.00 ± 7.07"; of dB, which have none, with their range."""
    mean = human_measure(measure, found.mean if found else None)
    if found is None or found.count == 1:
        return mean
    if MEASURES[measure].decibels:
        return f"{mean} ({human_measure(measure, found.lowest)} to {human_measure(measure, found.highest)})"
    return f"{mean} ± {human_measure(measure, found.spread)}"


def before_after(summary: Summary) -> tuple[Spread | None, Spread | None]:
    """Returns the held-out measure at the start and at the end of a run, over its devices; None for what was not measured.

    If there are devices that were measured at both times, these alone count at both.
    """
    pairs = [before_and_after(device, measure_of(summary.task)) for device in summary.devices]
    both = [pair for pair in pairs if _is_known(pair[0]) and _is_known(pair[1])]
    return spread_of(before for before, _ in both or pairs), spread_of(after for _, after in both or pairs)


def _is_known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def verdict(summary: Summary) -> str:
    """Returns what says whether a run helped: the held-out measure before and after, and on how many devices.

    Behind it, which adapter is the result if it is not the last one by rule, and what task.metrics measured.
    """
    measure = measure_of(summary.task)
    before, after = before_after(summary)
    if before is None or after is None:
        return _unmeasured(summary, before)
    start, end = (human_measure(measure, spread.mean) for spread in (before, after))
    if after.mean == before.mean:
        went = f"stayed at {start}"
    else:
        went = f"{'rose' if after.mean > before.mean else 'fell'} from {start} to {end}"
    over = ""
    if after.count > 1:
        low, high = (human_measure(measure, value) for value in (after.lowest, after.highest))
        over = f", as a mean over {after.count} devices ({low} to {high} at the end)"
    sentences = [f"{_when(summary.state)}eld-out {measure} {went}{over}.", *_improved(summary, measure)]
    if (after.mean - before.mean) * _sign(measure) < 0:
        sentences.insert(1, "That is worse than what the run began with.")
    more = (*best_in_words(summary), *metrics_in_words(summary))
    return " ".join([*sentences, *(f"{words[0].upper()}{words[1:]}." for words in more)])


def _unmeasured(summary: Summary, before: Spread | None) -> str:
    measure, goes_on = measure_of(summary.task), summary.state not in OVER
    if before is None:
        return (
            "Nothing is measured yet." if goes_on else "Nothing was measured: it is not known what the run has changed."
        )
    over = f", as a mean over {before.count} devices" if before.count > 1 else ""
    after = "nothing is measured after it yet" if goes_on else "nothing could be measured after it"
    return f"Held-out {measure} was {human_measure(measure, before.mean)} before training{over}; {after}."


def _when(state: str) -> str:
    """Returns how the sentence begins, up to the letter after "H" of "Held-out"."""
    if state == "done":
        return "H"
    return "Before the run ended early, h" if state in OVER else "So far, h"


def _sign(measure: str) -> int:
    """Returns 1 if higher is better, else -1."""
    return 1 if MEASURES[measure].higher else -1


def _improved(summary: Summary, measure: str) -> list[str]:
    """Says on how many devices the measure improved, of those that were measured twice; nothing about a single device."""
    found = {device.name: before_and_after(device, measure) for device in summary.devices}
    gains = {
        name: (after - before) * _sign(measure)
        for name, (before, after) in found.items()
        if before is not None and after is not None and _is_known(before) and _is_known(after)
    }
    others = [name for name, gain in gains.items() if not gain > 0]
    if len(gains) < 2:
        return []
    if not others:
        return ["It improved on every device."]
    more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
    return [
        f"It improved on {len(gains) - len(others)} of {len(gains)} devices, not on {', '.join(others[:_NAMED])}{more}."
    ]
