"""What a benchmark's comparison rests on, where it can be said without running it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import links
from benchmarks.classification import DEVICES, RUN_FILE, in_choosing_order, write
from benchmarks.data.wordnet import SAMPLE
from benchmarks.start import parts_of
from edgelam_fl.config import TaskSection, parse_run_file
from edgelam_fl.model.source import ModelSource
from edgelam_fl.tasks.causal_lm import CausalLm
from edgelam_fl.tasks.data import device_pairs, read_pairs
from edgelam_fl.telemetry.events import Event
from edgelam_fl.wire import edgelam_pb2 as pb
from strategies.api import Demand
from strategies.registry import load
from tests.recorded import as_events


def test_three_devices_and_one_are_measured_on_the_same_definitions(tmp_path: Path) -> None:
    rows = in_choosing_order([json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()])
    classes = sorted({row["domain"] for row in rows})
    config = parse_run_file(RUN_FILE.format(classes=json.dumps(classes)), source="classification")
    settings = pb.TaskSettings(
        kind=config.task.kind, classes=classes, prompt_field=config.data.fields.prompts[0],
        answer_field=config.data.fields.answer, held_out=config.data.held_out,
    )  # fmt: skip

    def held_out(name: str, part: list[dict[str, str]]) -> list:
        return device_pairs(write(tmp_path / name, part), settings)[1]

    apart = [held_out(f"{n}.jsonl", rows[n::DEVICES]) for n in range(DEVICES)]
    assert sorted(pair for part in apart for pair in part) == sorted(held_out("all.jsonl", rows))
    assert [len(part) for part in apart] == [len(rows) * config.data.held_out / DEVICES] * DEVICES


# ---------------------------------------------------------------- links

CAPACITY_BPS, SIZE, COMPUTE_S, MESSAGES_S = 8e6, 1_000_000, 2.0, 5.0


def run_under(rule: str) -> list[Event]:
    """Two rounds and the evaluation, as devices would have them that take what the formula says."""
    sizes = {name: SIZE * ratio for name, ratio in links.RATIOS.items()}
    shares = load("bandwidth", rule).rule.allocate([Demand(n, s, COMPUTE_S) for n, s in sizes.items()], CAPACITY_BPS)
    first = dict.fromkeys(sizes, 1 / 3)
    events: list[dict[str, Any]] = []
    for number, of_round in ((1, first), (2, shares), (3, shares)):
        devices: list[dict[str, Any]] = [
            {
                "name": name, "bytes_up": size / 4, "bytes_down": size * 3 / 4, "compute_seconds": COMPUTE_S,
                "eval_seconds": 1.0, "train_seconds": COMPUTE_S - 1.0 + 8 * size / (of_round[name] * CAPACITY_BPS),
                "step_losses": [0.5] if number < 3 else [],
            }
            for name, size in sizes.items()
        ]  # fmt: skip
        seconds = MESSAGES_S + max(d["eval_seconds"] + d["train_seconds"] for d in devices)
        kinds = {"ACT": 4 * SIZE, "GRAD": 5 * SIZE, "PING": len(rule)}
        events += [
            {"event": "plan", "round": number, "shares": dict(of_round)},
            {"event": "round_done", "round": number, "seconds": seconds, "devices": devices, "bytes_by_kind": kinds},
        ]
    return as_events(events)


def test_rounds_on_links_are_compared_without_the_first_and_the_evaluation() -> None:
    runs = {rule: run_under(rule) for rule in links.RULES}
    figures = {figure.name: figure for figure in links.compared(runs, CAPACITY_BPS)}
    uniform_s = COMPUTE_S + 8 * 6 * SIZE / (CAPACITY_BPS / 3)
    equal_s = COMPUTE_S + 8 * (1 + 2 + 6) * SIZE / CAPACITY_BPS
    expected = {
        "a round's tensors, most over least": 0.0,
        "equalise over uniform, a round": (MESSAGES_S + equal_s) / (MESSAGES_S + uniform_s),
        "equalise over uniform, the slowest device's part": equal_s / uniform_s,
        "equalise over uniform, by the formula": equal_s / uniform_s,
    }
    assert {name: figure.value for name, figure in figures.items()} == pytest.approx(expected, abs=1e-3)
    assert [figure.holds for figure in figures.values()] == [True, True, None, None]
    swapped = {"uniform": runs["equalise"], "equalise": runs["uniform"]}
    assert [figure.holds for figure in links.compared(swapped, CAPACITY_BPS)] == [True, False, None, None]
    of_rule = {figure.name: figure.value for figure in links.of_rule("equalise", runs["equalise"], CAPACITY_BPS)}
    assert of_rule["equalise, device-3 moves in a round, both ways"] == 6 * SIZE
    assert of_rule["equalise, share of device-3"] == pytest.approx(6 / 9, abs=1e-4)
    assert of_rule["equalise, the same by the formula"] == pytest.approx(equal_s, abs=0.01)


def test_examples_on_links_are_as_long_as_asked_for(tiny: ModelSource, tmp_path: Path) -> None:
    task = CausalLm(tiny.folder, TaskSection(max_tokens=512))
    pairs = read_pairs(links.write_pairs(tmp_path / "pairs.jsonl", 48), "question", "answer")
    assert {len(example.ids) for example in task.examples(pairs).examples} == {48}
    assert len(set(pairs)) == links.EXAMPLES


def test_the_parts_of_a_demo_are_told_by_its_events(tmp_path: Path) -> None:
    """A command from 100 to 190: nodes join at 108, one round, and the evaluation of the result."""
    run = [
        {"event": "run_started", "time": 105.0}, {"event": "node_joined", "time": 107.0}, {"event": "node_joined", "time": 108.0},
        {"event": "plan", "round": 1, "time": 108.5}, {"event": "round_done", "round": 1, "time": 142.0, "devices": []},
        {"event": "plan", "round": 2, "time": 142.5},
        {"event": "round_done", "round": 2, "time": 151.0, "devices": [{"name": "a", "perplexity": 12.5}]},
    ]  # fmt: skip
    node = [
        {"event": "job_started", "job": "r/1/1", "time": 109.5}, {"event": "evaluated", "job": "r/1/1", "time": 115.5},
        {"event": "step", "job": "r/1/1", "time": 120.0, "seconds": 4.0}, {"event": "job_done", "job": "r/1/1", "time": 140.0},
        {"event": "job_started", "job": "r/2/1", "time": 143.0}, {"event": "evaluated", "job": "r/2/1", "time": 149.0},
        {"event": "job_done", "job": "r/2/1", "time": 149.5},
    ]  # fmt: skip
    for file, events in ((tmp_path / "events.jsonl", run), (tmp_path / "nodes" / "a" / "events.jsonl", node)):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    assert parts_of(tmp_path, 100.0, 190.0) == {
        "until the ServerApp starts": 5.0, "until all nodes have joined": 8.0, "first training step": 16.0, "training": 24.5,
        "evaluation": 12.0, "messages per round": 2.5, "after the last round": 39.0, "a perplexity after": 12.5,
    }  # fmt: skip
