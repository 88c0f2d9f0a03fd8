"""`edgelam bench` through Flower's simulation engine, behind cells that are finished already."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from edgelam_fl.bench.matrix import read_matrix
from edgelam_fl.bench.runner import Results, outcome

pytestmark = [pytest.mark.processes, pytest.mark.real_model]

ROOT = Path(__file__).parents[2]
MATRIX = f"""
[bench]
dataset = "{ROOT}/benchmarks/data/wordnet_sample.jsonl"
examples = 60
devices = 2
references = false

[axes]
aggregation = ["fedavg", "ffa"]

[base.model]
name = "minilm-l6"

[base.split]
hosts = 0

[base.lora]
targets = ["5.attention.self.query", "5.attention.self.value"]

[base.federation]
rounds = 1
local_steps = 1
batch_size = 4
"""
DEADLINE_S = 240


def test_a_matrix_goes_on_behind_its_finished_cells(tmp_path: Path) -> None:
    file, out = tmp_path / "two.toml", tmp_path / "out"
    file.write_text(MATRIX, encoding="utf-8")
    matrix = read_matrix(file)
    first, second = matrix.cells()
    before = {
        "name": first.name,
        "cell": dict(first.values),
        "state": "done",
        **outcome([]),
        "accuracy": 0.5,
        "seconds": 1.0,
    }
    Results(out, matrix).add(before)  # as a command that was interrupted after it would have left it

    command = [str(Path(sys.executable).with_name("edgelam")), "bench", str(file), "--out", str(out), "--jobs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 2 cells are finished" in done.stdout + done.stderr
    kept, new = [json.loads(line) for line in (out / "cells.jsonl").read_text(encoding="utf-8").splitlines()]
    assert kept == before
    assert (new["name"], new["state"]) == (second.name, "done")
    assert 0 <= new["accuracy"] <= 1
    assert new["bytes"] > 0
    assert "ffa" in (out / "results.md").read_text(encoding="utf-8")
