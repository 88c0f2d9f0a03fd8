"""Writes a matrix's results: tables in Markdown, one page of plots, and a plot over epsilon. Knows no processes."""

from __future__ import annotations

from pathlib import Path

from edgelam_fl.bench.matrix import Matrix
from edgelam_fl.bench.plot import over_epsilon
from edgelam_fl.bench.tables import Lines, markdown


def write_results(out: Path, matrix: Matrix, lines: Lines) -> list[Path]:
    """Writes results.md and results.html into `out`, and results.svg if epsilon varies; returns their paths."""
    from edgelam_fl.bench.page import page  # brings plotly

    written = [out / "results.md", out / "results.html"]
    written[0].write_text(markdown(matrix, lines), encoding="utf-8")
    written[1].write_text(page(matrix, lines), encoding="utf-8")
    plot = over_epsilon(matrix, lines)
    if plot:
        written.append(out / "results.svg")
        written[-1].write_text(plot, encoding="utf-8")
    return written
