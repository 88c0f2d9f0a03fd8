"""Every benchmark runs, at its smallest, and ends with its one JSON line."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from benchmarks import common
from benchmarks.leakage import PARTS
from benchmarks.leakage.__main__ import main as leakage

ROOT = Path(__file__).parents[2]
# Those that need an emulated machine or a Docker engine have tests of their own: tests/unit/test_benchmark_boards.py,
# tests/unit/test_testbed_benchmarks.py. That of links runs on the federation that other tests share: test_benchmark_links.py;
# what the demo's run leaves is looked at in test_smollm2.py. gguf_answers needs llama.cpp: tests/contract/test_gguf_out.py compares
# small models where it is installed. series_networks holds what channel_learned compares with.
APART = (
    "__init__",
    "common",
    "demo",
    "gguf_answers",
    "hostile",
    "boards",
    "big_llama",
    "links",
    "links_tc",
    "testbed_memory",
    "planner_testbeds",
    "link_change",
    "series_networks",
)
NAMES = sorted(file.stem for file in (ROOT / "benchmarks").glob("*.py") if file.stem not in APART)


@pytest.mark.processes
@pytest.mark.real_model
@pytest.mark.parametrize("name", NAMES)
def test_smoke(name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """In this process, whose imports are done: `python -m benchmarks.NAME --smoke` calls the same."""
    monkeypatch.chdir(ROOT)
    module = importlib.import_module(f"benchmarks.{name}")
    common.main(name, module.measure, getattr(module, "add_options", None), ["--smoke"])
    check_result(name, capfd.readouterr().out)


@pytest.mark.real_model
@pytest.mark.parametrize("part", PARTS)
def test_smoke_of_a_part_of_leakage(
    part: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    leakage(["--part", part, "--smoke"])
    check_result(PARTS[part], capfd.readouterr().out)


def check_result(name: str, printed: str) -> None:
    result = json.loads(printed.splitlines()[-1])
    assert result["name"] == name
    assert result["figures"]
    assert all(set(figure) == {"name", "value", "unit", "bar", "holds"} for figure in result["figures"])
