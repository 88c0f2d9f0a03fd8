"""The page of `edgelam compare`: runs side by side, in the looks of a run's own page. The numbers are those of `comparison`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import Any

from edgelam_fl.files import write_atomically
from edgelam_fl.telemetry.comparison import ComparedRun, caution, devices_after, facts, unlike_settings
from edgelam_fl.telemetry.human import total
from edgelam_fl.telemetry.measures import MEASURES, shown_value, with_unit
from edgelam_fl.telemetry.report.figures import (
    held_out_by_device,
    losses_by_device,
    mean_line,
    smoothed,
    thinned,
    window_of,
)
from edgelam_fl.telemetry.report.frame import COLOURS, figure, framed, table
from edgelam_fl.telemetry.summary import ADAPTER_BYTES, LINK_BYTES
from edgelam_fl.telemetry.verdict import spread_of, verdict

_POINTS = 1_000  # per line


def write_comparison(runs: Sequence[ComparedRun], page: Path) -> None:
    """Writes the page in one move."""
    write_atomically(page, comparison_page(runs))


def comparison_page(runs: Sequence[ComparedRun]) -> str:
    """Returns the page's text."""
    names = [escape(run.name) for run in runs]
    swatches = [_swatch(at) + name for at, name in enumerate(names)]
    verdicts = "".join(
        f"<p><b>{head}</b><br>{escape(verdict(run.summary))}</p>" for head, run in zip(swatches, runs, strict=True)
    )
    note = f'<p class="card banner">{escape(said)}</p>' if (said := caution(runs)) else ""
    places, figures = "", {}
    for name, title, caption, drawn in _figures(runs):
        places += figure(name, title, caption)
        figures[name] = drawn
    heading = "|".join(["", *swatches])
    tables = [
        table("What they reached, and what it cost", heading, _rows(facts(runs))),
        table("Settings that differ", heading, _rows(unlike_settings(runs)), "words"),
        table("Held out at the end, per device", heading, _rows(devices_after(runs))),
    ]
    cards = "".join(f'<section class="card">{each}</section>' for each in tables if each)
    body = (
        f'<header><h1>{" and ".join(names)}</h1></header>{note}<section class="card verdict">{verdicts}</section>'
        f'<div class="pair">{places}</div>{cards}'
    )
    return framed(" and ".join(names), body, figures)


def _rows(rows: Sequence[tuple[str, list[str]]]) -> Iterator[list[str]]:
    return ([escape(what), *map(escape, values)] for what, values in rows)


def _swatch(at: int) -> str:
    return f'<span class="swatch" style="background: var({_colour(at)})"></span>'


def _colour(at: int) -> str:
    return f"--c{at % COLOURS}"


def _figures(runs: Sequence[ComparedRun]) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Yields id, title, caption and content of each figure: the mean over the devices of each run."""
    if not any(run.rounds for run in runs):
        return
    measure = runs[0].measure
    alike = [(at, run) for at, run in enumerate(runs) if run.measure == measure and run.rounds]
    looks = {
        "y": with_unit(measure),
        "share": MEASURES[measure].percent,
        "log_y": not MEASURES[measure].over,
        "dots": True,
    }
    over_rounds, over_bytes = [], []
    for at, run in alike:
        xs, values = held_out_by_device(run.rounds, measure)
        shown = [[shown_value(measure, value) for value in own] for own in values.values()]
        line = mean_line(shown, xs, run.name, _colour(at))
        over_rounds.append(line)
        over_bytes.append({**line, "x": list(_megabytes_before(run))})
    caption = "Mean over devices; the band is their spread (one standard deviation)."
    yield (
        "quality",
        f"Held-out {measure}",
        caption,
        {"x": "rounds of training", "whole": True, "lines": over_rounds, **looks},
    )
    yield (
        "over_bytes", f"Held-out {measure} over traffic", "Links and adapters of all devices, before the measurement.",
        {"x": "MB", "own_x": True, "lines": over_bytes, **looks},
    )  # fmt: skip
    losses = [_losses(run, _colour(at)) for at, run in enumerate(runs) if run.rounds]
    said = "Mean over devices, smoothed over a fortieth of the run's steps to each side."
    yield (
        "loss",
        "Training loss",
        said,
        {"x": "step", "y": "loss per label", "whole": True, "log_y": True, "lines": losses},
    )


def _megabytes_before(run: ComparedRun) -> Iterator[float]:
    """Yields the traffic of all devices before each round's measurement."""
    moved = 0.0
    for done in run.rounds:
        yield moved / 1e6
        moved += total(getattr(device, key) for device in done.devices for key in (*LINK_BYTES, *ADAPTER_BYTES)) or 0


def _losses(run: ComparedRun, colour: str) -> dict[str, Any]:
    losses, ends = losses_by_device(run.rounds)
    means = [found.mean if found else None for found in map(spread_of, zip_longest(*losses.values()))]
    every = max(1, -(-len(means) // _POINTS))
    smooth = thinned(smoothed(means, window_of(ends[-1])), every)
    return {"name": run.name, "color": colour, "x": thinned(range(1, len(means) + 1), every), "y": smooth}
