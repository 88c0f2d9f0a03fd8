"""Draws the published results of all matrices again, from their cells: `python -m tools.matrix_pages`. Trains nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from edgelam_fl.bench.matrix import Matrix, read_matrix
from edgelam_fl.bench.results import write_results
from edgelam_fl.bench.runner import Results

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MATRICES = {"strategies": "default"}  # folders of results that are not named after their matrix


def published() -> Iterator[tuple[Path, Matrix]]:
    """Yields each folder of results that has cells, with its matrix."""
    for cells in sorted(BENCHMARKS.glob("results/*/cells.jsonl")):
        folder = cells.parent
        yield folder, read_matrix(BENCHMARKS / "matrices" / f"{MATRICES.get(folder.name, folder.name)}.toml")


def main() -> None:
    for folder, matrix in published():
        for written in write_results(folder, matrix, Results(folder, matrix).lines()):
            print(written)


if __name__ == "__main__":
    main()
