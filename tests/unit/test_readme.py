"""README.md quotes only what stands in benchmarks/results, and names only commands that there are."""

from __future__ import annotations

import json
import re
from pathlib import Path

from typer.main import get_command

from edgelam_fl.cli import app
from edgelam_fl.config import parse_run_file

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_demos_output_is_the_recorded_one() -> None:
    assert (ROOT / "benchmarks" / "results" / "demo.txt").read_text(encoding="utf-8").strip() in README


def test_its_commands_exist() -> None:
    named = set(re.findall(r"^(?:\S*/)?edgelam (\w+)", README, flags=re.MULTILINE))
    assert {"run", "server", "client"} <= named <= set(get_command(app).commands)  # type: ignore[attr-defined]


def test_its_run_file_is_valid() -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", README, flags=re.DOTALL)
    assert parse_run_file(text, source="README.md").lora.rank == 8


def test_every_result_has_the_agreed_shape() -> None:
    files = list((ROOT / "benchmarks" / "results").glob("*.json"))
    assert files
    for file in files:
        result = json.loads(file.read_text(encoding="utf-8"))
        assert set(result) == {"name", "command", "machine", "versions", "settings", "figures"}
        for figure in result["figures"]:
            assert set(figure) == {"name", "value", "unit", "bar", "holds"}, file
