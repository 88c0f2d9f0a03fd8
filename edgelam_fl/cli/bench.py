"""The command for matrices of strategies. Parses and prints; the work is done in edgelam_fl.bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgelam_fl.cli.options import console


def bench(
    file: Annotated[
        Path, typer.Argument(metavar="MATRIX.toml", help="The matrix: data, axes, what all cells have in common.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", help="Folder of the results, new or to resume; by default runs/bench-<name>."
        ),
    ] = None,
    jobs: Annotated[
        int, typer.Option("--jobs", min=1, max=16, help="Cells at a time, each with a process for its nodes.")
    ] = 2,
) -> None:
    """Ranks strategies: every combination of a matrix, each a federation on Flower's simulation engine.

    Finished cells are kept in cells.jsonl and never run again, so an interrupted matrix resumes. Leaves tables
    (results.md) and a page of plots (results.html). Needs the extra: pip install 'edgelam-fl\\[bench]'.
    """
    from edgelam_fl.files import keep_private
    from edgelam_fl.telemetry.waiting import waiting

    with waiting(console, "loading what matrices need"):
        from edgelam_fl.bench.command import bench as work

    keep_private()
    raise typer.Exit(work(console, file, out, jobs))
