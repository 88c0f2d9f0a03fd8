"""What a benchmark's comparison rests on, where it can be said without running it."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.classification import DEVICES, RUN_FILE, in_choosing_order, write
from benchmarks.data.wordnet import SAMPLE
from edgelam_fl.config import parse_run_file
from edgelam_fl.tasks.data import device_pairs
from edgelam_fl.wire import edgelam_pb2 as pb


def test_three_devices_and_one_are_measured_on_the_same_definitions(tmp_path: Path) -> None:
    rows = in_choosing_order([json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()])
    classes = sorted({row["domain"] for row in rows})
    config = parse_run_file(RUN_FILE.format(classes=json.dumps(classes)), source="classification")
    settings = pb.TaskSettings(
        kind=config.task.kind, classes=classes, prompt_field=config.data.fields.prompt,
        answer_field=config.data.fields.answer, held_out=config.data.held_out,
    )  # fmt: skip

    def held_out(name: str, part: list[dict[str, str]]) -> list:
        return device_pairs(write(tmp_path / name, part), settings)[1]

    apart = [held_out(f"{n}.jsonl", rows[n::DEVICES]) for n in range(DEVICES)]
    assert sorted(pair for part in apart for pair in part) == sorted(held_out("all.jsonl", rows))
    assert [len(part) for part in apart] == [len(rows) * config.data.held_out / DEVICES] * DEVICES
