"""Writes a matrix's results: tables, their numbers, one page of plots, and a plot over epsilon. Knows no processes."""

from __future__ import annotations

import json
from pathlib import Path

from edgelam_fl.bench.matrix import Matrix
from edgelam_fl.bench.page import page
from edgelam_fl.bench.plot import over_epsilon
from edgelam_fl.bench.tables import Lines, figures, markdown


def write_results(out: Path, matrix: Matrix, lines: Lines) -> list[Path]:
    """Writes results.md, results.json and results.html into `out`, and results.svg if epsilon varies; returns their paths."""
    numbers = {"name": matrix.name, "settings": matrix.bench.model_dump(mode="json"), "figures": figures(matrix, lines)}
    written = [out / "results.md", out / "results.json", out / "results.html"]
    written[0].write_text(markdown(matrix, lines), encoding="utf-8")
    written[1].write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    written[2].write_text(page(matrix, lines), encoding="utf-8")
    plot = over_epsilon(matrix, lines)
    if plot:
        written.append(out / "results.svg")
        written[-1].write_text(plot, encoding="utf-8")
    return written
