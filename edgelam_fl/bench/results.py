"""Writes a matrix's results: tables in Markdown and one page of plots. Knows no processes."""

from __future__ import annotations

from pathlib import Path

from edgelam_fl.bench.matrix import Matrix
from edgelam_fl.bench.tables import Lines, markdown


def write_results(out: Path, matrix: Matrix, lines: Lines) -> list[Path]:
    """Writes results.md and results.html into `out`; returns their paths."""
    from edgelam_fl.bench.page import page  # brings plotly

    written = [out / "results.md", out / "results.html"]
    written[0].write_text(markdown(matrix, lines), encoding="utf-8")
    written[1].write_text(page(matrix, lines), encoding="utf-8")
    return written
