"""Every benchmark runs, at its smallest, and ends with its one JSON line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import WAIT_S

ROOT = Path(__file__).parents[2]
# Those that need an emulated machine or a Docker engine have tests of their own: tests/unit/test_benchmark_boards.py,
# tests/unit/test_testbed_benchmarks.py.
APART = ("__init__", "common", "boards", "big_llama", "links_tc", "testbed_memory", "planner_testbeds", "link_change")
NAMES = sorted(file.stem for file in (ROOT / "benchmarks").glob("*.py") if file.stem not in APART)


@pytest.mark.processes
@pytest.mark.real_model
@pytest.mark.parametrize("name", NAMES)
def test_smoke(name: str) -> None:
    command = [sys.executable, "-m", f"benchmarks.{name}", "--smoke"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["name"] == name
    assert result["figures"]
    assert all(set(figure) == {"name", "value", "unit", "bar", "holds"} for figure in result["figures"])
