"""Runs `edgelam bench`: the order of the work and its progress on the terminal. Knows neither Flower nor the fabric."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from edgelam_fl.bench import datasets
from edgelam_fl.bench.matrix import Cell, Matrix, read_matrix
from edgelam_fl.bench.reference import ONE_DEVICE, WHAT_ONE_DEVICE, one_device
from edgelam_fl.bench.results import write_results
from edgelam_fl.bench.runner import Results, check_cells, check_extra, engine, play
from edgelam_fl.bench.tables import cause, measure_of, value_of
from edgelam_fl.bench.tuning import held_back, tries, tuned
from edgelam_fl.config import RunConfig
from edgelam_fl.errors import INTERRUPTED
from edgelam_fl.telemetry.events import Event, PlanMade
from edgelam_fl.telemetry.measures import MEASURES
from edgelam_fl.telemetry.waiting import Reminder, SignTiming, waiting

_TICK_S = 1.0
ALONE = "alone"  # the folder of the reference with one device
REFERENCE_KEYS = ("accuracy", "perplexity", "bytes", "seconds")


def bench(console: Console, file: Path, out: Path | None, jobs: int) -> int:
    """Runs the cells of a matrix file that are not finished yet; returns 0, or 1 if a cell failed.

    out: folder of the results, new or to resume; None: runs/bench-<name>. jobs: cells at a time.
    """
    with waiting(console, f"reading {file.name}") as wait:
        matrix = read_matrix(file)
        check_extra()
        wait.update(f"reading {matrix.bench.dataset}")
        data = datasets.load(matrix.bench, matrix.folder)
        configs = check_cells(matrix, data.classes)
        datasets.check_fits(matrix.bench.dataset, data, next(iter(configs.values())).task.kind)
    out = (out or Path("runs") / f"bench-{matrix.name}").expanduser().absolute()
    if not matrix.tune.keys:
        return _finish(console, matrix, configs, data, out, Results(out, matrix), jobs)
    of_tries, results, beside = tries(matrix), Results(out, matrix), out / "tuning"
    tried, tried_configs = Results(beside, of_tries), check_cells(of_tries, data.classes)
    status = _finish(console, of_tries, tried_configs, held_back(data, matrix.tune), beside, tried, jobs)
    if status == INTERRUPTED:
        return status
    matrix = tuned(matrix, tried.lines())
    return _finish(console, matrix, check_cells(matrix, data.classes), data, out, results, jobs)


def _finish(
    console: Console,
    matrix: Matrix,
    configs: dict[str, RunConfig],
    data: datasets.Data,
    out: Path,
    results: Results,
    jobs: int,
) -> int:
    """Runs what is left of a matrix, and writes its results; returns 0, 1 if a cell failed, or INTERRUPTED."""
    cells = matrix.cells()
    left = [cell for cell in cells if results.lines().get(cell.name, {}).get("state") != "done"]
    if len(left) < len(cells):
        console.print(f"{len(cells) - len(left)} of {len(cells)} cells are finished in {results.path}", highlight=False)
    try:
        if matrix.bench.references:
            with waiting(console, "measuring the reference lines"):
                _references(results, matrix, data, configs)
        alone = _alone(matrix, data, results)
        if left or alone:
            _run(console, matrix, left, len(cells), configs, data, out, results, jobs, alone)
    except KeyboardInterrupt:
        done = sum(line["state"] == "done" for line in results.lines().values())
        console.print(
            f"interrupted; {done} of {len(cells)} cells are finished in {results.path}; the same command resumes"
        )
        return INTERRUPTED
    written = write_results(out, matrix, results.lines())
    states = Counter(results.lines()[cell.name]["state"] for cell in cells)
    console.print("\n".join(f"{path}" for path in written), highlight=False, soft_wrap=True)
    return 1 if states["failed"] else 0


def _run(
    console: Console, matrix: Matrix, left: list[Cell], total: int, configs: dict[str, RunConfig], data: datasets.Data,
    out: Path, results: Results, jobs: int, alone: list[Cell],
) -> None:  # fmt: skip
    """Runs `jobs` cells at a time, each with a fabric of its own, and draws the results again after each cell.

    alone: the cells of the reference with one device that are not finished yet.
    """
    trainings = matrix.trainings(left)
    jobs = min(jobs, len(trainings) + len(alone))
    # The pool is left last: once the processes have ended, the cells that wait for them end too.
    with ThreadPoolExecutor(jobs, "cell") as pool, ExitStack() as processes:
        with waiting(console, "starting Flower's simulation engine and the fabric"):
            shared = processes.enter_context(engine(out / "work" / "engine", jobs))
        counted = {cell.name for cell in matrix.cells()}
        with _progress(console) as progress:
            task = progress.add_task("", total=total, completed=total - len(left), what="")
            signs = Reminder(SignTiming(first_s=0.0))
            started = []
            for cell in alone:
                of_one = one_device(matrix)
                config, feed = of_one.config(cell, data.classes), _feed(progress, task, cell, 0)
                started.append(pool.submit(_as_reference, shared, of_one, [cell], config, data, out / ALONE, feed))
            for cells in trainings:
                config = configs[cells[0].name]
                feed = _feed(progress, task, cells[0], config.federation.rounds)
                started.append(pool.submit(play, shared, matrix, cells, config, data, out, feed))
            try:
                for finished in _as_they_end(started, lambda: _tick(progress, signs)):
                    for line in finished.result():
                        results.add(line)
                        progress.advance(task, line["name"] in counted)
                        progress.console.print(summary_line(line), highlight=False, markup=False)
                        signs.postpone()
                    progress.update(task, what="drawing the results")
                    write_results(out, matrix, results.lines())
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        with waiting(console, "ending the engine's processes"):
            processes.close()
    for folder in (out / "work", out / ALONE / "work"):
        shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # what it holds are the logs of references that failed
        (out / ALONE).rmdir()


def _as_they_end(cells: Sequence[Future[Any]], tick: Callable[[], None]) -> Iterator[Future[Any]]:
    """Yields the cells' results as they end; calls `tick` every second."""
    left = set(cells)
    while left:
        ended, left = wait(left, timeout=_TICK_S, return_when=FIRST_COMPLETED)
        yield from ended
        tick()


def _tick(progress: Progress, signs: Reminder) -> None:
    """Without a terminal, which has a bar, says now and then how far the cells are."""
    if progress.console.is_terminal:
        return
    (task,) = progress.tasks
    text = f"{task.completed:.0f} of {task.total:.0f} cells have ended; {task.fields['what'] or 'starting'}"
    if signs.is_due(text):
        progress.console.print(text, highlight=False, markup=False, soft_wrap=True)


def _alone(matrix: Matrix, data: datasets.Data, results: Results) -> list[Cell]:
    """Returns the cells of the reference with one device that are not finished yet; none for a causal language model."""
    if not (matrix.bench.references and data.classes):
        return []
    known = results.lines()
    return [cell for cell in one_device(matrix).cells() if known.get(_alone_name(cell), {}).get("state") != "reference"]


def _alone_name(cell: Cell) -> str:
    return f"{ONE_DEVICE}{cell.values['seed']}"


def _as_reference(*arguments: Any) -> list[dict[str, Any]]:
    (line,), (cell,) = play(*arguments), arguments[2]
    if line["state"] == "failed":
        return [{**line, "name": _alone_name(cell), "logs": f"{ALONE}/{line['logs']}"}]
    kept = {key: line[key] for key in REFERENCE_KEYS}
    return [{"name": _alone_name(cell), "state": "reference", "what": WHAT_ONE_DEVICE, **kept}]


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

    def feed(event: Event) -> None:
        if isinstance(event, PlanMade):
            at = f"round {event.round} of {rounds}" if event.round <= rounds else "measuring"
            progress.update(task, what=f"{cell.name}: {at}, {time.monotonic() - began:.0f} s")

    return feed


def summary_line(line: dict[str, Any]) -> str:
    """Formats a cell's or a reference's line for the terminal."""
    if line["state"] == "failed":
        return f"{line['name']} failed: {cause(line)}"
    measure = measure_of(line)
    quality = f"{measure} {value_of(line):.{4 if MEASURES[measure].percent else 2}f}"
    virtual = f", {line['virtual_seconds']:.0f} virtual s" if line.get("virtual_seconds") else ""
    real = f"time replayed from {line['trained']}" if "trained" in line else f"{line['seconds']:.0f} s"
    return f"{line['name']}: {quality}, {line['bytes'] / 1e6:.1f} MB{virtual}, {real}"
