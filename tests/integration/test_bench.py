"""`edgelam bench` through Flower's simulation engine, behind cells that are finished already."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgelam_fl.bench.matrix import read_matrix
from edgelam_fl.bench.runner import Results, outcome
from tests.integration.conftest import Edgelam

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
bandwidth = ["uniform", "equalise"]

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

[base.wireless]
bandwidth_hz = 1e5
"""


def test_a_matrix_goes_on_behind_its_finished_cells(edgelam: Edgelam, tmp_path: Path) -> None:
    file, out = tmp_path / "two.toml", tmp_path / "out"
    file.write_text(MATRIX, encoding="utf-8")
    matrix = read_matrix(file)
    *finished, uniform, equalise = matrix.cells()
    before = [
        {
            "name": cell.name, "cell": dict(cell.values), "state": "done", **outcome([]), "accuracy": 0.5, "seconds": 1.0,
        }
        for cell in finished
    ]  # fmt: skip
    for line in before:  # as a command that was interrupted after them would have left it
        Results(out, matrix).add(line)

    done = edgelam("bench", str(file), "--out", str(out), "--jobs", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 4 cells are finished" in done.stdout + done.stderr
    *kept, trained, replayed = [json.loads(line) for line in (out / "cells.jsonl").read_text("utf-8").splitlines()]
    assert kept == before
    assert [(line["name"], line["state"]) for line in (trained, replayed)] == [
        (uniform.name, "done"),
        (equalise.name, "done"),
    ]
    assert "trained" not in trained
    assert replayed["trained"] == uniform.name
    assert 0 <= trained["accuracy"] <= 1
    assert [replayed[same] for same in ("accuracy", "bytes")] == [trained[same] for same in ("accuracy", "bytes")]
    assert 0 < replayed["virtual_seconds"] != trained["virtual_seconds"] > 0
    assert "ffa" in (out / "results.md").read_text(encoding="utf-8")
