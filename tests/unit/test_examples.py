"""The run files under examples/: each is valid, for its model and strategies too, and is explained."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgelam_fl.bounds import Bounds
from edgelam_fl.cli.main import app
from edgelam_fl.config import parse_run_file, read_run_file
from edgelam_fl.federation.demo_text import RUN_FILE
from server.checks import check_config

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = sorted(file.name for file in EXAMPLES.glob("*.toml"))


@pytest.fixture(autouse=True)
def beside_the_strategies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES / "strategies"))


def test_these_are_here() -> None:
    kinds = {"demo", "two-machines", "pi-cluster", "classification", "wireless", "own-strategy"}
    assert kinds <= {name.removesuffix(".toml") for name in FILES}


@pytest.mark.real_model
@pytest.mark.parametrize("name", FILES)
def test_each_is_valid_and_explained(name: str) -> None:
    config = read_run_file(EXAMPLES / name)
    check_config(config, Bounds(folder=EXAMPLES / "strategies"))
    done = CliRunner().invoke(app, ["run", str(EXAMPLES / name), "--explain"])
    assert done.exit_code == 0, done.output
    assert "[federation]" in done.output
    assert "changed, default" in done.output


def test_the_demos_is_what_the_demo_runs() -> None:
    assert read_run_file(EXAMPLES / "demo.toml") == parse_run_file(RUN_FILE, source="the demo")
