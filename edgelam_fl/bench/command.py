"""`edgelam bench`: what it shows while it works, and in which order. Results are drawn again after each cell."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from edgelam_fl.bench import datasets
from edgelam_fl.bench.matrix import Cell, read_matrix
from edgelam_fl.bench.results import write_results
from edgelam_fl.bench.runner import Results, check_cells, check_extra, engine, play

INTERRUPTED = 130


def bench(console: Console, file: Path, out: Path | None) -> int:
    """Runs what is not finished yet. Returns 0, or 1 where a cell failed."""
    matrix = read_matrix(file)
    check_extra()
    with console.status(f"reading {matrix.bench.dataset}"):
        data = datasets.load(matrix.bench, matrix.folder)
        configs = check_cells(matrix, data.classes)
    out = (out or Path("runs") / f"bench-{matrix.name}").expanduser().absolute()
    results = Results(out, matrix)
    cells = matrix.cells()
    left = [cell for cell in cells if results.lines().get(cell.name, {}).get("state") != "done"]
    if len(left) < len(cells):
        console.print(f"{len(cells) - len(left)} of {len(cells)} cells are finished in {results.path}", highlight=False)
    try:
        if matrix.bench.references:
            with console.status("measuring the reference lines"):
                _references(results, matrix, data, configs)
        if left:
            with (
                console.status("starting Flower's simulation engine and the fabric"),
                engine(out / "work") as processes,
            ):
                with _progress(console) as progress:
                    task = progress.add_task("", total=len(cells), completed=len(cells) - len(left), what="")
                    for cell in left:
                        feed = _feed(progress, task, cell, configs[cell.name].federation.rounds)
                        line = play(processes, matrix, cell, configs[cell.name], data, out, feed)
                        results.add(line)
                        progress.advance(task)
                        progress.console.print(_told(line), highlight=False, markup=False)
                        write_results(out, matrix, results.lines())
    except KeyboardInterrupt:
        done = sum(line["state"] == "done" for line in results.lines().values())
        console.print(
            f"interrupted; {done} of {len(cells)} cells are finished in {results.path}; the same command goes on"
        )
        return INTERRUPTED
    written = write_results(out, matrix, results.lines())
    states = Counter(results.lines()[cell.name]["state"] for cell in cells)
    console.print("\n".join(f"{path}" for path in written), highlight=False, soft_wrap=True)
    return 1 if states["failed"] else 0


def _references(results: Results, matrix: Any, data: datasets.Data, configs: dict[str, Any]) -> None:
    from edgelam_fl.bench.reference import measure

    known = results.lines()
    for name, line in measure(matrix, data, configs, known):
        results.add({"name": name, "state": "reference", **line})


def _progress(console: Console) -> Progress:
    columns = (
        SpinnerColumn(),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[what]}"),
    )
    return Progress(*columns, console=console)


def _feed(progress: Progress, task: Any, cell: Cell, rounds: int) -> Any:
    began = time.monotonic()

    def feed(event: dict[str, Any]) -> None:
        if event["event"] == "plan":
            at = f"round {event['round']} of {rounds}" if event["round"] <= rounds else "measuring"
            progress.update(task, what=f"{cell.name}: {at}, {time.monotonic() - began:.0f} s")

    return feed


def _told(line: dict[str, Any]) -> str:
    if line["state"] == "failed":
        return f"{line['name']} failed: {line['reason']}"
    quality = (
        f"accuracy {line['accuracy']:.4f}" if line["accuracy"] is not None else f"perplexity {line['perplexity']:.2f}"
    )
    return f"{line['name']}: {quality}, {line['bytes'] / 1e6:.1f} MB, {line['seconds']:.0f} s"
