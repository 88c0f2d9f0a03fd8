"""Draws a matrix as one page that needs no network: tables, and the quality over rounds, bytes and virtual time.

Knows no processes; the numbers and the tables are those of `tables`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from statistics import fmean
from typing import Any

from plotly.offline import get_plotlyjs

from edgelam_fl.bench.matrix import Matrix
from edgelam_fl.bench.plot import over_epsilon
from edgelam_fl.bench.tables import Lines, groups, markdown, references

_COSTS = {
    "round": "rounds",
    "bytes": "bytes sent and received",
    "virtual_seconds": "virtual seconds",
    "joules": "joules",
}
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:">
<link rel="icon" href="data:,"><title>{title} | EdgeLAM-FL</title>
<style>
body {{ font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; max-width: 1240px; margin: 0 auto; padding: 24px 20px; color: #1b2430; }}
table {{ border-collapse: collapse; margin: 12px 0; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 4px 10px; border-bottom: 1px solid #dde2e8; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }}
.plot {{ height: 460px; }}
</style></head><body>
{body}
<script>{plotly}</script>
<script>for (const [id, figure] of Object.entries({figures})) Plotly.newPlot(id, figure.data, figure.layout, {{displaylogo: false, responsive: true}});</script>
</body></html>
"""


def page(matrix: Matrix, lines: Lines) -> str:
    """Returns the page as HTML. lines: the newest line of each cell and reference, by name."""
    found = groups(matrix, lines)
    drawn = [
        cost for cost in _COSTS if cost == "round" or any(line.get(cost) for group in found.values() for line in group)
    ]
    figures = {cost: _figure(found, cost, lines) for cost in drawn} if found else {}
    plots = "".join(f'<div class="plot" id="{cost}"></div>' for cost in figures)
    figures_json = json.dumps(figures).replace("</", "<\\/")
    return _PAGE.format(
        title=escape(matrix.name),
        body=_html(markdown(matrix, lines)) + over_epsilon(matrix, lines) + plots,
        plotly=get_plotlyjs(),
        figures=figures_json,
    )


def _figure(found: Mapping[Any, Any], cost: str, lines: Lines) -> dict[str, Any]:
    data = []
    for group, cells in found.items():
        points = list(zip(*(cell["curve"] for cell in cells), strict=False))
        measure = "accuracy" if points and "accuracy" in points[0][0] else "perplexity"
        data.append({
            "name": " ".join(str(value) for value in group), "mode": "lines+markers",
            "x": [fmean(point[cost] for point in at) for at in points],
            "y": [fmean(point[measure] for point in at) for at in points],
        })  # fmt: skip
    shapes = [
        {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": fmean(values), "y1": fmean(values),
         "line": {"dash": "dot", "width": 1}, "label": {"text": escape(what), "textposition": "start"}}
        for what, values in references(lines).items()
    ]  # fmt: skip
    layout = {
        "title": {"text": f"over {_COSTS[cost]} (mean of the seeds)"}, "xaxis": {"title": {"text": _COSTS[cost]}},
        "yaxis": {"title": {"text": "on the test set"}}, "shapes": shapes, "template": "none",
    }  # fmt: skip
    return {"data": data, "layout": layout}


def _html(text: str) -> str:
    """Translates the Markdown of `tables` to HTML: headings, tables and paragraphs."""
    parts: list[str] = []
    rows: list[list[str]] = []
    for line in [*text.splitlines(), ""]:
        if line.startswith("| "):
            rows.append([escape(cell.strip()) for cell in line.strip("|").split("|")])
            continue
        if rows:
            parts.append(_table(rows))
            rows = []
        if line.startswith("# "):
            parts.append(f"<h1>{escape(line[2:])}</h1>")
        elif line:
            parts.append(f"<p>{escape(line)}</p>")
    return "\n".join(parts)


def _table(rows: list[list[str]]) -> str:
    heads, _, *cells = rows
    head = "".join(f"<th>{cell}</th>" for cell in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in cells)
    return f"<table><tr>{head}</tr>{body}</table>"
