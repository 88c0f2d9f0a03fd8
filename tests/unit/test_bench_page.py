from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from edgelam_fl.bench import command, runner
from edgelam_fl.bench.datasets import Data
from edgelam_fl.bench.matrix import Matrix, read_matrix
from edgelam_fl.bench.page import page
from edgelam_fl.bench.tables import figures, markdown
from edgelam_fl.errors import RunFailed
from edgelam_fl.federation.submission import last_words
from tests.unit.test_matrix import GOOD, line, written
from tests.unit.test_report import EVIL, Page, figures_of
from tools.matrix_pages import published

TWO_AXES = GOOD.replace("[axes]\n", '[axes]\npartition = ["iid", "dirichlet:0.1"]\n')
COLOURED = "\x1b[91mERROR \x1b[0m: run failed"
FLOWERS_LOG = f"""\
\x1b[92mINFO \x1b[0m: starting
Traceback (most recent call last):
  File "server/app.py", line 3, in main
edgelam_fl.errors.RunFailed: node-3 did not answer within 120 s

The above exception was the direct cause of the following exception:
{"  File 'simulation.py', line 496, in _run_simulation" * 30}
Exit Code: 700
{COLOURED}
"""


def cells_of(matrix: Matrix, quality: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Returns a line per cell: the accuracy of its aggregation, less on uneven data, and a little by seed."""
    lines = {}
    for cell in matrix.cells():
        rule, seed = str(cell.values["aggregation"]), int(cell.values["seed"])
        accuracy = quality[rule] - 0.01 * seed - 0.2 * (cell.values["partition"] != "iid")
        curve = [
            {"round": number, "accuracy": accuracy * number / 2, "bytes": 1e6 * number * (1 + (rule == "ffa"))}
            for number in range(3)
        ]
        own = {"name": cell.name, "cell": dict(cell.values), "curve": curve, "bytes": curve[-1]["bytes"]}
        lines[cell.name] = line(rule, seed, accuracy) | own
    return lines


@pytest.fixture
def matrix(tmp_path: Path) -> Matrix:
    return read_matrix(written(tmp_path, TWO_AXES))


def test_plots_come_first_with_a_band_over_seeds(matrix: Matrix) -> None:
    text = page(matrix, cells_of(matrix, {"fedavg": 0.8, "ffa": 0.9}))
    found = figures_of(text)
    assert list(found) == ["round", "bytes", "pareto"]
    assert text.index('id="round"') < text.index("Leaderboard")
    curve = next(each for each in found["round"]["lines"] if each["name"] == "ffa iid")
    assert (curve["x"], curve["y"][-1]) == ([0, 1, 2], pytest.approx(0.9 - 0.015))
    assert curve["high"][-1] - curve["low"][-1] == pytest.approx(2 * 0.01 / 2**0.5, rel=1e-4)
    assert found["bytes"]["log_x"]
    assert found["bytes"]["lines"][0]["x"] == [0, 1, 2]


def test_colour_tells_the_strategy_and_dash_the_partition(matrix: Matrix) -> None:
    lines = figures_of(page(matrix, cells_of(matrix, {"fedavg": 0.8, "ffa": 0.9})))["round"]["lines"]
    looks = {each["name"]: (each["color"], each["dash"]) for each in lines}
    assert looks == {
        "fedavg iid": ("--c0", 0), "ffa iid": ("--c1", 0),
        "fedavg dirichlet:0.1": ("--c0", 1), "ffa dirichlet:0.1": ("--c1", 1),
    }  # fmt: skip
    assert {"aggregation": "ffa", "partition": "iid"} in [each["keys"] for each in lines]


def test_the_leaderboard_ranks_what_is_compared(matrix: Matrix) -> None:
    lines = cells_of(matrix, {"fedavg": 0.8, "ffa": 0.9})
    found = Page(page(matrix, lines))
    ranks = [row[:4] for row in found.rows if row[0] in ("1", "2")]
    assert ranks == [
        ["1", "ffa", "iid", "88.50"], ["2", "fedavg", "iid", "78.50"],
        ["1", "ffa", "dirichlet:0.1", "68.50"], ["2", "fedavg", "dirichlet:0.1", "58.50"],
    ]  # fmt: skip
    assert "Best: ffa (iid) 88.50 ± 0.71 %, ffa (dirichlet:0.1) 68.50 ± 0.71 %." in found.text
    assert any("82.15 to 94.85" in title for title in found.titles())  # t(1) at 97.5 % is 12.706
    assert {"aggregation=ffa", "partition=iid"} <= {str(attrs.get("data-key")) for _, attrs in found.tags}


def test_perplexity_is_better_the_lower_it_is(matrix: Matrix) -> None:
    lines = cells_of(matrix, {"fedavg": 0.8, "ffa": 0.9})
    for each in lines.values():
        each.update(perplexity=10 * each["accuracy"], accuracy=None)
        each["curve"] = [{**point, "perplexity": 10.0, "accuracy": None} for point in each["curve"]]
    text = page(matrix, lines)
    assert [row[1] for row in Page(text).rows if row[0] == "1"] == ["fedavg", "fedavg"]
    assert figures_of(text)["pareto"]["front"] == "min"


def test_a_failed_cell_says_why_and_where_its_logs_are(matrix: Matrix) -> None:
    name = matrix.cells()[0].name
    failed = {"name": name, "state": "failed", "reason": f"{COLOURED} {EVIL}", "logs": f"failed/{name}"}
    lines = {**cells_of(matrix, {"fedavg": 0.8, "ffa": 0.9}), name: failed}
    for text in (markdown(matrix, lines), command.summary_line(failed), Page(page(matrix, lines)).text):
        assert f"ERROR : run failed {EVIL}; logs: failed/{name}" in text
        assert "\x1b" not in text
    assert "1 cell failed" in page(matrix, lines)
    assert "<script>alert(1)" not in page(matrix, lines)


def test_a_page_without_a_finished_cell_is_a_page(matrix: Matrix) -> None:
    text = page(matrix, {})
    assert figures_of(text) == {}
    assert "0 of 8 cells" in Page(text).text


def test_the_first_error_of_a_log_is_its_cause_and_colours_are_left_out() -> None:
    said = last_words(FLOWERS_LOG)
    assert said.startswith("edgelam_fl.errors.RunFailed: node-3 did not answer within 120 s ... ")
    assert said.endswith("Exit Code: 700 ERROR : run failed")
    assert "\x1b" not in said
    assert last_words("one\n  two\n") == "one two"
    assert last_words("") == ""


class BrokenEngine:
    """Takes the place of the processes: its fabric has a log, and every cell fails."""

    def __init__(self, folder: Path) -> None:
        self.fabric_folder = folder / "fabric-1"
        folder.mkdir(parents=True)
        self.fabric_folder.with_suffix(".log").write_text("the fabric's last words\n")

    def fabric(self) -> Any:
        return contextlib.nullcontext(self.fabric_folder)

    def check(self) -> None:
        pass


def test_a_failed_cell_keeps_its_folder_and_its_logs(
    matrix: Matrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(engine: Any, fabric: Path, config: Any, folder: Path, nodes: int, feed: Any) -> None:
        (folder / "flower.log").write_text(FLOWERS_LOG)
        raise RunFailed("node-3 did not answer")

    monkeypatch.setattr(runner, "run_cell", fails)
    cell, out = matrix.cells()[0], tmp_path / "out"
    classes = ("noun", "verb")
    data = Data([(f"text {n}", classes[n % 2]) for n in range(400)], [("a", "noun")] * 20, classes)
    config = matrix.config(cell, classes)
    engine: Any = BrokenEngine(out / "work" / "engine")
    (found,) = runner.play(engine, matrix, [cell], config, data, out, lambda event: None)
    assert (found["state"], found["reason"], found["logs"]) == (
        "failed",
        "node-3 did not answer",
        f"failed/{cell.name}",
    )
    kept = out / found["logs"]
    assert (kept / "flower.log").read_text() == FLOWERS_LOG
    assert (kept / "fabric-1.log").read_text() == "the fabric's last words\n"
    assert not (out / "work" / cell.name).exists()


@pytest.mark.parametrize("folder", [folder.name for folder, _ in published()])
def test_published_results_have_their_page(folder: str) -> None:
    place, matrix = next(each for each in published() if each[0].name == folder)
    numbers = json.loads((place / "results.json").read_text(encoding="utf-8"))["figures"]
    found = Page((place / "results.html").read_text(encoding="utf-8"))
    shown = {cell for row in found.rows for cell in row}
    qualities = [each["value"] for each in numbers if each["name"].endswith(": quality")]
    assert {f"{value:.2f}" for value in qualities} <= shown
    lines = runner.Results(place, matrix).lines()
    assert {each["name"]: each["value"] for each in figures(matrix, lines)} == {
        each["name"]: each["value"] for each in numbers
    }
