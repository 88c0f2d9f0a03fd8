from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from edgelam_fl.cli.main import app
from edgelam_fl.errors import ConfigError, UsageError
from edgelam_fl.telemetry.comparison import (
    caution,
    comparison_json,
    comparison_table,
    facts,
    read_runs,
    unlike_settings,
)
from edgelam_fl.telemetry.report.compare_page import comparison_page
from tests.recorded import DEVICES, ROUNDS, STEPS, a_classification, a_run
from tests.unit.test_report import EVIL, Page, figures_of


def run_in(folder: Path, events: list[dict[str, Any]], **settings: dict[str, Any]) -> Path:
    """Writes a run's folder; settings: sections of its run file beside the recorded ones."""
    folder.mkdir(parents=True)
    events[0]["config"] = {**events[0]["config"], **settings}
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    return folder


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    """Returns two runs that differ in the learning rate; the second ends at perplexities that are 5 higher."""
    worse = a_run()
    for device in worse[-2]["devices"]:
        device["perplexity"] += 5
    return [
        run_in(tmp_path / "a", a_run(), optimizer={"lr": 1e-3}, run={"out": "a"}),
        run_in(tmp_path / "b", worse, optimizer={"lr": 1e-2}, run={"out": "b"}),
    ]


def test_what_two_runs_reached_and_cost_stands_side_by_side(two: list[Path]) -> None:
    runs = read_runs(two)
    found = dict(facts(runs))
    after, worse = (float(text.split()[0]) for text in found["held-out perplexity after"])
    assert worse - after == pytest.approx(5, abs=0.011)
    assert found["rounds"] == [f"{ROUNDS}"] * 2
    assert found["optimizer steps"] == [f"{ROUNDS * STEPS}"] * 2
    assert found["over links"][0] == found["over links"][1]
    assert "epsilon spent" not in found
    assert unlike_settings(runs) == [("optimizer.lr", ["0.001", "0.01"])]
    assert caution(runs) == ""


def test_the_table_names_runs_devices_and_settings(two: list[Path]) -> None:
    console = Console(width=120, record=True, file=StringIO())
    console.print(comparison_table(read_runs(two)))
    text = console.export_text()
    for word in ("held-out perplexity before", *DEVICES, "optimizer.lr", "0.01"):
        assert word in text


def test_the_numbers_are_there_for_machines(two: list[Path]) -> None:
    found = comparison_json(read_runs(two))
    first, second = found["runs"]
    assert second["after"]["mean"] - first["after"]["mean"] == pytest.approx(5)
    assert (first["before"]["count"], first["measure"], first["steps"]) == (3, "perplexity", ROUNDS * STEPS)
    assert found["settings"] == {"optimizer.lr": [1e-3, 1e-2]}


def test_the_page_draws_both_runs(two: list[Path]) -> None:
    text = comparison_page(read_runs(two))
    page, figures = Page(text), figures_of(text)
    assert {name: [line["name"] for line in figures[name]["lines"]] for name in figures} == {
        "quality": ["a", "b"], "over_bytes": ["a", "b"], "loss": ["a", "b"],
    }  # fmt: skip
    assert figures["over_bytes"]["lines"][0]["x"][:2] == [
        0,
        pytest.approx(3 * (4.700123 + 4.600321 + 2 * 0.24576), rel=1e-5),
    ]
    assert len(figures["loss"]["lines"][1]["y"]) == ROUNDS * STEPS
    assert ["optimizer.lr", "0.001", "0.01"] in page.rows
    assert page.text.count("Held-out perplexity fell from") == 2
    assert len(text) < 100_000


def test_text_from_outside_stays_text_on_the_page_too(tmp_path: Path) -> None:
    folders = [run_in(tmp_path / name, a_run(evil=EVIL)) for name in ("a", "b<i>")]
    text = comparison_page(read_runs(folders))
    assert "<img src=x" not in text
    assert "<script>alert(1)" not in text
    assert "b<i>" in Page(text).text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {"name": "other"}}, "different models"),
        ({"data": {"held_out": 0.2}}, "differ in data.held_out: they are not measured on the same texts"),
    ],
)
def test_what_cannot_be_compared_is_said(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    folders = [run_in(tmp_path / "a", a_run()), run_in(tmp_path / "b", a_run(), **changes)]
    assert said in caution(read_runs(folders))


def test_runs_of_other_tasks_or_devices_are_told_apart(tmp_path: Path) -> None:
    plain, classes = run_in(tmp_path / "a", a_run()), run_in(tmp_path / "b", a_classification())
    runs = read_runs([plain, classes])
    assert "different tasks" in caution(runs)
    assert dict(facts(runs))["held-out accuracy after"][0] == "-"
    fewer = a_run()
    for event in fewer:
        event["devices"] = event.get("devices", [])[:2]
    fewer = [event for event in fewer if event.get("node") != DEVICES[2]]
    assert "different devices" in caution(read_runs([plain, run_in(tmp_path / "c", fewer)]))


def test_a_run_that_never_began_can_be_compared(tmp_path: Path, two: list[Path]) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "events.jsonl").write_text('{"event": "run_failed", "time": 1.0, "reason": "no", "kept": ""}\n')
    text = comparison_page(read_runs([two[0], tmp_path / "c"]))
    assert [line["name"] for line in figures_of(text)["quality"]["lines"]] == ["a"]


def test_folders_of_one_name_are_told_apart_and_others_refused(tmp_path: Path, two: list[Path]) -> None:
    other = run_in(tmp_path / "more" / "a", a_run())
    assert [run.name for run in read_runs([two[0], other])] == [str(two[0]), str(other)]
    with pytest.raises(ConfigError, match="takes 2 to 8 different run folders; got 1"):
        read_runs([two[0], two[0]])
    with pytest.raises(UsageError, match=r"is not a run's folder: it has no events\.jsonl"):
        read_runs([two[0], tmp_path])


def test_the_command_prints_a_table_and_writes_a_page(two: list[Path], tmp_path: Path) -> None:
    page = tmp_path / "both.html"
    told = CliRunner().invoke(app, ["compare", *map(str, two), "--out", str(page)])
    assert told.exit_code == 0
    assert "optimizer.lr" in told.output
    assert f"page: {page}" in told.output.replace("\n", "")
    assert page.is_file()
    told = CliRunner().invoke(app, ["compare", *map(str, two), "--json"])
    assert json.loads(told.output)["settings"] == {"optimizer.lr": [1e-3, 1e-2]}
