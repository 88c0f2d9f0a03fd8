"""Draws a matrix as one page that needs no network: plots first, then a leaderboard, tables and the cells that failed.

The sister of a run's report: the same frame, looks and charts. Knows no processes; the numbers are those of `tables`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from edgelam_fl.bench.matrix import Matrix
from edgelam_fl.bench.plot import over_epsilon
from edgelam_fl.bench.tables import (
    COSTS,
    Compared,
    Group,
    Lines,
    about,
    beyond,
    cause,
    compared,
    differences,
    groups,
    is_accuracy,
    mean_and_spread,
    measure_in,
    measure_of,
    name_of,
    quality,
    references,
    sentences,
    tested,
    title_of,
    value_of,
    word,
)
from edgelam_fl.telemetry.measures import MEASURES, with_unit
from edgelam_fl.telemetry.report.figures import mean_line
from edgelam_fl.telemetry.report.frame import COLOURS, figure, framed

_OVER = {
    "round": ("rounds of training", 1.0),
    "bytes": ("MB sent and received", 1e6),
    "virtual_seconds": ("virtual seconds", 1.0),
    "joules": ("joules", 1.0),
}
_SCALE = {"bytes": 1e6, "virtual_seconds": 1.0, "joules": 1.0}
_SCRIPT = Path(__file__).with_name("matrix.js")
_DASHES, _SHOWN = 4, 24  # of more lines than the latter, one value of the dashed axis is shown at first
_WIDTH, _HEIGHT = 140, 22  # of an interval's picture, in pixels


@dataclass(frozen=True)
class _Look:
    """The look of one row of the table wherever it is drawn: colour and dash, by its values of the axes."""

    name: str
    colour: str
    dash: int
    keys: Mapping[str, str]


def page(matrix: Matrix, lines: Lines) -> str:
    """Returns the page as HTML. lines: the newest line of each cell and reference, by name."""
    found = groups(matrix, lines)
    looks = _looks(matrix, found)
    figures = _figures(matrix, found, looks, lines)
    wide = [name for name in figures if name == "pareto"]
    places = "".join(
        _place(matrix, name, has_references=bool(figures[name]["references"])) for name in figures if name not in wide
    )
    places = (f'<div class="pair">{places}</div>' if places else "") + "".join(_place(matrix, name) for name in wide)
    epsilon = over_epsilon(matrix, lines)
    body = "".join([
        f"<header><h1>{escape(matrix.name)}</h1>{_state(matrix, lines)}<p class='muted'>{escape(_subtitle(matrix))}</p></header>",
        f'<p class="verdict">{escape(_verdict(matrix, found))}</p>' if found else "",
        _chips(matrix, looks),
        places,
        f'<figure class="card paper"><h2>Quality over epsilon</h2>{epsilon}</figure>' if epsilon else "",
        _leaderboard(matrix, lines, found, looks),
        _card("Beyond the leaderboard", _html(beyond(matrix, lines))),
        _card("How it was measured", _html(about(matrix, lines))),
        _failed(lines),
    ])  # fmt: skip
    return framed(escape(matrix.name), body, figures, [_SCRIPT.read_text(encoding="utf-8")])


def _axes(matrix: Matrix) -> list[str]:
    return matrix.varied() or ["aggregation"]


def _coloured(matrix: Matrix) -> str:
    """Returns the axis that colours tell apart."""
    return matrix.compared if matrix.compared in _axes(matrix) else _axes(matrix)[0]


def _dashed(matrix: Matrix) -> str:
    """Returns the axis that dashes tell apart; "" if one axis alone varies."""
    return next((axis for axis in _axes(matrix) if axis != _coloured(matrix)), "")


def _looks(matrix: Matrix, found: Mapping[Group, Any]) -> dict[Group, _Look]:
    axes, coloured, dashed = _axes(matrix), _coloured(matrix), _dashed(matrix)
    looks = {}
    for group in found:
        values = dict(zip(axes, group, strict=True))
        colour = list(getattr(matrix.axes, coloured)).index(values[coloured])
        dash = list(getattr(matrix.axes, dashed)).index(values[dashed]) if dashed else 0
        keys = {axis: word(value) for axis, value in values.items()}
        looks[group] = _Look(name_of(group), f"--c{colour % COLOURS}", dash % _DASHES, keys)
    return looks


# ---------------------------------------------------------------- plots


def _figures(
    matrix: Matrix, found: Mapping[Group, Sequence[Mapping[str, Any]]], looks: Mapping[Group, _Look], lines: Lines
) -> dict[str, Any]:
    """Returns the figures by the id of their place: quality over each cost that the cells have, and at the end over bytes."""
    if not found:
        return {}
    accuracy, measure = is_accuracy(lines), measure_in(lines)
    lined = [{"y": fmean(values), "text": what.split(",")[0]} for what, values in references(lines).items()]
    common = {"y": with_unit(measure), "share": accuracy, "log_y": not MEASURES[measure].over, "legend": False}
    figures: dict[str, Any] = {}
    for cost, (what, scale) in _OVER.items():
        if cost == "round" or any(line.get(cost) for cells in found.values() for line in cells):
            drawn = [_curve(cells, cost, scale, measure, looks[group]) for group, cells in found.items()]
            over = {"x": what, "lines": drawn, "references": lined if accuracy else []}
            figures[cost] = {
                **common,
                **over,
                "whole": cost == "round",
                "own_x": cost != "round",
                "log_x": cost != "round",
            }
    points = [_point(cells, looks[group]) for group, cells in found.items()]
    figures["pareto"] = {
        **common,
        "x": _OVER["bytes"][0],
        "points": points,
        "log_x": True,
        "front": "max" if MEASURES[measure].higher else "min",
    }
    return figures


def _curve(cells: Sequence[Mapping[str, Any]], cost: str, scale: float, measure: str, look: _Look) -> dict[str, Any]:
    """Draws the mean over the seeds with their spread as a band."""
    columns = list(zip(*(cell["curve"] for cell in cells), strict=False))
    xs = [fmean(point[cost] for point in column) / scale for column in columns]
    seeds = [[column[at].get(measure) for column in columns] for at in range(len(cells))]
    line = mean_line(seeds, xs, look.name, look.colour)
    if len(cells) == 1:
        line = {key: value for key, value in line.items() if key not in ("low", "high")}
    return {**line, "strong": False, "dash": look.dash, "keys": look.keys}


def _point(cells: Sequence[Mapping[str, Any]], look: _Look) -> dict[str, Any]:
    mean, spread = mean_and_spread([value_of(cell) for cell in cells])
    whisker = {"low": mean - spread, "high": mean + spread} if len(cells) > 1 else {}
    x = fmean(cell["bytes"] for cell in cells) / 1e6
    return {
        "name": look.name,
        "color": look.colour,
        "shape": look.dash,
        "x": x,
        "y": mean,
        "keys": look.keys,
        **whisker,
    }


def _place(matrix: Matrix, name: str, *, has_references: bool = False) -> str:
    dashed = _dashed(matrix)
    by = f"Colour: {_coloured(matrix)}" + (f"; dash: {dashed}" if dashed else "")
    seeds = "; the mean of the seeds, with their spread (one standard deviation)" if len(matrix.axes.seed) > 1 else ""
    if name == "pareto":
        by = by.replace("; dash:", "; shape:")
        said = f"{by}{seeds}. Dashed line: what nothing else beats at fewer bytes."
        return figure(name, "Quality at the end against bytes", said, "tall")
    lined = " Dotted: reference lines." if has_references else ""
    beginning = " A logarithmic axis leaves out the measurement before training." if name != "round" else ""
    return figure(name, f"Quality over {_OVER[name][0]}", f"{by}{seeds}.{lined}{beginning}", "tall")


# ---------------------------------------------------------------- words and filters


def _state(matrix: Matrix, lines: Lines) -> str:
    done = sum(lines.get(cell.name, {}).get("state") == "done" for cell in matrix.cells())
    state = "done" if done == len(matrix.cells()) else "running"
    return f'<span class="state {state}">{done} of {len(matrix.cells())} cells</span>'


def _subtitle(matrix: Matrix) -> str:
    bench = matrix.bench
    seeds = "1 seed" if len(matrix.axes.seed) == 1 else f"{len(matrix.axes.seed)} seeds"
    return f"{bench.dataset}, {bench.examples or 'all'} examples, {bench.devices} devices, {seeds}"


def _verdict(matrix: Matrix, found: Mapping[Group, Sequence[Mapping[str, Any]]]) -> str:
    """Names the best of each block of rows that are compared with each other."""
    best: dict[tuple[str, str], list[str]] = {}
    blocks = _blocks(matrix, found)
    for rest, rows in blocks.items():
        best.setdefault((_compared_name(matrix, rows[0]), _shown(found[rows[0]])), []).append(", ".join(rest))
    said = [
        f"{name}{f' ({places})' if (places := '; '.join(rests)) and len(rests) < len(blocks) else ''} {value}"
        for (name, value), rests in best.items()
    ]
    return f"Best: {', '.join(said)}."


def _blocks(matrix: Matrix, found: Mapping[Group, Sequence[Mapping[str, Any]]]) -> dict[tuple[str, ...], list[Group]]:
    """Groups the rows that differ along the compared axis alone, best first, by their values of the other axes."""
    at = _axes(matrix).index(_coloured(matrix))
    blocks: dict[tuple[str, ...], list[Group]] = {}
    for group in found:
        blocks.setdefault(tuple(word(value) for i, value in enumerate(group) if i != at), []).append(group)
    return {
        rest: sorted(rows, key=lambda group: -fmean(quality(line) for line in found[group]))
        for rest, rows in blocks.items()
    }


def _compared_name(matrix: Matrix, group: Group) -> str:
    return word(group[_axes(matrix).index(_coloured(matrix))])


def _shown(cells: Sequence[Mapping[str, Any]]) -> str:
    measure = MEASURES[measure_of(cells[0])]
    mean, spread = mean_and_spread([value_of(cell) for cell in cells])
    scale, unit = (100, " %") if measure.percent else (1, f" {measure.unit}".rstrip())
    more = f" ± {scale * spread:.2f}" if len(cells) > 1 else ""
    return f"{scale * mean:.2f}{more}{unit}"


def _chips(matrix: Matrix, looks: Mapping[Group, _Look]) -> str:
    """Draws a button per value of each axis that varies, which hides its lines and rows; it is the legend too."""
    if len(looks) < 2:
        return ""
    coloured, dashed = _coloured(matrix), _dashed(matrix)
    parts = []
    for axis in _axes(matrix):
        buttons = ""
        for value in dict.fromkeys(look.keys[axis] for look in looks.values()):
            look = next(look for look in looks.values() if look.keys[axis] == value)
            mark = f'<span class="swatch" style="background: var({look.colour})"></span>' if axis == coloured else ""
            mark = _dash_mark(look.dash) if axis == dashed else mark
            off = axis == dashed and len(looks) > _SHOWN and value != word(getattr(matrix.axes, dashed)[0])
            key = escape(f"{axis}={value}", quote=True)
            buttons += f'<button data-key="{key}" class="{"off" if off else ""}">{mark}{escape(value)}</button>'
        parts.append(f'<div><span class="muted">{axis}</span>{buttons}</div>')
    hint = '<div class="muted">Click: hide or show. Double click: this one alone.</div>'
    return f'<div class="chips">{"".join(parts)}{hint}</div>'


def _dash_mark(dash: int) -> str:
    pattern = ("", "7 4", "2 3", "10 3 2 3")[dash]
    return f'<svg><line x1="0" x2="26" y1="5" y2="5" style="stroke: var(--ink)" stroke-width="2" stroke-dasharray="{pattern}"/></svg>'


# ---------------------------------------------------------------- the leaderboard


@dataclass(frozen=True)
class _Board:
    """The settings that all rows of the leaderboard are drawn with."""

    coloured: int
    """Place of the axis that colours tell apart."""
    apart: Mapping[Group, Compared]
    """The differences to the baseline."""
    means: Mapping[Group, Compared]
    """The means over seeds."""
    costs: Sequence[str]
    """The costs that some cell has."""
    scale: float
    """100 for accuracies, which are shown in per cent."""

    def ends(self) -> tuple[float, float]:
        """Returns the lowest and the highest end of all intervals."""
        found = [end for one in self.means.values() for end in (one.mean, one.low, one.high) if not math.isnan(end)]
        return min(found), max(found)

    def row(self, rank: int, group: Group, cells: Sequence[Mapping[str, Any]], look: _Look) -> str:
        """Draws one row of the table."""
        one = self.means[group]
        swatch = f'<span class="swatch" style="background: var({look.colour})"></span>'
        axes = [
            _cell(f"{swatch if at == self.coloured else ''}{escape(value)}", value, name=True)
            for at, value in enumerate(look.keys.values())
        ]
        errors = [line["aggregation_error"] for line in cells if line["aggregation_error"] is not None]
        texts = [
            _cell(str(rank), rank),
            *axes,
            _cell(f"{self.scale * one.mean:.2f}", one.mean),
            _interval(one, *self.ends(), look.colour, self.scale),
            _cell(str(len(cells)), len(cells)),
            *_difference(self.apart.get(group), self.scale),
            _cell(f"{fmean(errors):.3g}", fmean(errors)) if errors else _cell("", -1),
            *(_cost(cells, cost) for cost in self.costs),
        ]
        keys = escape(json.dumps(dict(look.keys)), quote=True)
        return f'<tr data-keys="{keys}">{"".join(texts)}</tr>'


def _leaderboard(
    matrix: Matrix, lines: Lines, found: Mapping[Group, Sequence[Mapping[str, Any]]], looks: Mapping[Group, _Look]
) -> str:
    """Draws all rows: best first among those that are compared with each other, with the 95 % interval of the mean over seeds."""
    if not found:
        return ""
    accuracy, axes = is_accuracy(lines), _axes(matrix)
    means = {group: tested([value_of(line) for line in cells]) for group, cells in found.items()}
    costs = [cost for cost in COSTS if any(line.get(cost) for cells in found.values() for line in cells)]
    apart = compared(differences(matrix, lines))
    board = _Board(axes.index(_coloured(matrix)), apart, means, costs, 100 if accuracy else 1)
    rows = "".join(
        board.row(rank, group, found[group], looks[group])
        for block in _blocks(matrix, found).values()
        for rank, group in enumerate(block, 1)
    )
    heads = [
        "rank", *axes, title_of(lines), "95 % interval", "n", f"less {matrix.bench.baseline}",
        "95 % interval", "p", "aggregation error", *(COSTS[cost] for cost in costs),
    ]  # fmt: skip
    head = "".join(f"<th{' class=name' if each in axes else ''}><button>{escape(each)}</button></th>" for each in heads)
    words = "".join(f'<p class="muted">{escape(text)}</p>' for text in sentences(matrix, lines).splitlines() if text)
    return (
        f'<section class="card"><h2>Leaderboard</h2><p class="muted">Best first among the rows that differ in the {_coloured(matrix)} '
        f'alone; a click on a heading sorts. Intervals: the mean over seeds, by the t distribution.</p><div class="scroll">'
        f'<table class="sorts"><tr>{head}</tr>{rows}</table></div>{words}</section>'
    )


def _cell(shown: str, value: Any, *, name: bool = False) -> str:
    return f'<td{" class=name" if name else ""} data-v="{escape(str(value), quote=True)}">{shown}</td>'


def _cost(cells: Sequence[Mapping[str, Any]], cost: str) -> str:
    mean = fmean(line[cost] for line in cells) / _SCALE[cost]
    return _cell(f"{mean:,.1f}", mean)


def _difference(one: Compared | None, scale: float) -> Iterator[str]:
    """Yields the difference to the baseline with its interval and p, in colour if the corrected test calls it one."""
    if one is None:
        yield from (_cell("", 0), _cell("", 0), _cell("", 2))
        return
    style = (' class="done"' if one.mean > 0 else ' class="failed"') if one.differs else ""
    yield _cell(f"<span{style}>{scale * one.mean:+.2f}</span>", one.mean)
    known = not math.isnan(one.p)
    yield _cell(f"{scale * one.low:+.2f} to {scale * one.high:+.2f}" if known else "", one.low if known else 0)
    yield _cell(f"{one.p:.2g}" if known else "", one.p if known else 2)


def _interval(one: Compared, low: float, high: float, colour: str, scale: float) -> str:
    """Draws a mean with its interval between the lowest and the highest end of all rows."""
    room = (high - low) or 1.0

    def place(value: float) -> str:
        return f"{6 + (_WIDTH - 12) * (value - low) / room:.1f}"

    known = not math.isnan(one.low)
    bar = ""
    if known:
        ends = f'x1="{place(one.low)}" x2="{place(one.high)}" y1="11" y2="11"'
        bar = f'<line {ends} stroke-width="3" stroke-linecap="round" opacity=".45"/>'
    said = f"{scale * one.low:.2f} to {scale * one.high:.2f}" if known else "one seed: no interval"
    picture = (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" style="stroke: var({colour}); fill: var({colour})">{bar}'
        f'<circle cx="{place(one.mean)}" cy="11" r="4"/></svg>'
    )
    return f'<td class="interval" data-v="{one.low if known else one.mean}" title="{said}">{picture}</td>'


# ---------------------------------------------------------------- the rest


def _failed(lines: Lines) -> str:
    """Lists the cells that failed, with their causes; empty if none did."""
    failed = {name: line for name, line in lines.items() if line["state"] == "failed"}
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(cause(line))}</dd>" for name, line in failed.items())
    number = "1 cell" if len(failed) == 1 else f"{len(failed)} cells"
    again = '<p class="muted">The same command runs them again.</p>'
    return (
        f'<section class="card banner"><h2 class="failed">{number} failed</h2>{again}<dl>{rows}</dl></section>'
        if rows
        else ""
    )


def _card(title: str, content: str) -> str:
    return f'<section class="card"><h2>{title}</h2>{content}</section>' if content else ""


def _html(text: str) -> str:
    """Translates the Markdown of `tables` to HTML: tables and paragraphs."""
    parts: list[str] = []
    rows: list[list[str]] = []
    for line in [*text.splitlines(), ""]:
        if line.startswith("| "):
            rows.append([escape(cell.strip()) for cell in line.strip("|").split("|")])
            continue
        if rows:
            parts.append(_table(rows))
            rows = []
        if line:
            parts.append(f"<p>{escape(line)}</p>")
    return "\n".join(parts)


def _table(rows: Sequence[Sequence[str]]) -> str:
    heads, _, *cells = rows
    head = "".join(f"<th>{cell}</th>" for cell in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in cells)
    return f'<div class="scroll"><table class="narrow"><tr>{head}</tr>{body}</table></div>'
