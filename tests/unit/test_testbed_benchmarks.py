"""What the benchmarks on testbeds rest on, where it can be said without an engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from benchmarks import big_llama, link_change, links_tc, planner_testbeds, testbed_memory
from benchmarks.common import Figure
from edgelam_fl.config import parse_run_file
from edgelam_fl.model.source import find_model
from edgelam_fl.telemetry.events import RoundDone, of_kind
from tests.recorded import as_events

LLAMA = {**big_llama.CONFIG, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 300}


def test_the_large_llama_has_as_many_numbers_as_it_says() -> None:
    d, inner, layers, words, keys = 2048, 5632, 22, 32_000, 2048 // 32 * 4
    layer = 2 * d * d + 2 * keys * d + 3 * inner * d + 2 * d
    assert big_llama.parameters() == 2 * words * d + layers * layer + d
    assert 2 * big_llama.parameters() == pytest.approx(2.2e9, rel=0.01)


def test_its_files_are_seeded_sharded_and_found_as_a_model(tmp_path: Path) -> None:
    folders = [big_llama.write_llama(tmp_path / name, LLAMA) for name in ("first", "second")]
    source = find_model(str(folders[0]))
    assert (source.num_layers, source.hidden_size) == (2, 64)
    assert {entry.stored_type for entry in source.index.values()} == {"BF16"}
    assert len({entry.file for entry in source.index.values()}) == 2 + 2
    assert source.digest == find_model(str(folders[1])).digest
    with safe_open(folders[0] / "model-001.safetensors", "pt") as file:
        weight = file.get_tensor("model.layers.0.mlp.up_proj.weight").float()
    assert weight.std() == pytest.approx(LLAMA["initializer_range"], rel=0.05)


def test_a_step_behind_a_link_is_predicted_by_the_slower_of_link_and_compute() -> None:
    transfer_s = 2 * links_tc.TOKENS * links_tc.HIDDEN * 4 * 8 / 5e6
    slots = links_tc.MICRO_BATCHES + 2 - 1
    assert links_tc.predicted_s(5, transfer_s / 2) == pytest.approx(slots * transfer_s)
    assert links_tc.predicted_s(5, transfer_s * 2) == pytest.approx(slots * transfer_s * 2)


@pytest.mark.parametrize(("slower", "holds"), [(1.0, True), (1.14, True), (1.16, False), (0.84, False)])
def test_a_step_is_held_against_the_prediction(slower: float, holds: bool) -> None:
    steps, transfer_s = links_tc.STEPS, links_tc.micro_batch_bytes() * 8 / 20e6
    train_s = slower * (links_tc.MICRO_BATCHES + 1) * transfer_s * steps
    node = {"compute_seconds": 0.01}
    line = {"event": "round_done", "devices": [{**node, "train_seconds": train_s}], "hosts": [node]}
    (done,) = of_kind(as_events([line]), RoundDone)
    figures = links_tc.of_rate(20, done, bar=True)
    assert [figure.holds for figure in figures if figure.bar] == [holds]
    assert figures[-1].value == pytest.approx(100 * (slower - 1), abs=0.1)


@pytest.mark.parametrize("text", [testbed_memory.SMOL, testbed_memory.LLAMA, links_tc.run_text(5)])
def test_their_run_files_are_sound(text: str) -> None:
    assert parse_run_file(text, source="a benchmark", overrides=["split.hosts=4"])


@pytest.mark.parametrize("bed", [*planner_testbeds.BEDS, link_change.BED], ids=lambda bed: bed.name)
def test_the_planners_testbeds_are_within_the_cores_and_their_run_files_sound(bed: planner_testbeds.Bed) -> None:
    testbed = bed.testbed()
    assert sum(shape.cpus for _, shape in testbed.services()) <= 0.9 * 2 + 1e-9
    assert len(testbed.devices) == len(bed.devices)
    config = parse_run_file(bed.run_file, source="a benchmark")
    assert (config.split.hosts, config.split.cuts) == ("auto", "auto")
    assert config.federation.batch_size == bed.rows * bed.micro_batches


def test_the_planners_testbeds_are_unlike_and_the_first_is_the_one_that_was_asked_for() -> None:
    first = planner_testbeds.BEDS[0]
    machines = [(machine.cpus, machine.mbps) for machine in [*first.edges, *first.devices]]
    assert machines == [(1.0, 100), (0.4, 20), (0.2, 5)]
    assert len({str(bed) for bed in planner_testbeds.BEDS}) == len(planner_testbeds.BEDS) == 5


def test_a_changed_link_is_held_against_what_came_of_it(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    for number, (layers, step_s, attempt) in enumerate([(13, 9.0, 1), (13, 40.0, 1), (0, 18.0, 2)], 1):
        hosts = [
            {"node": "edge-1", "first": 1, "last": 1 + layers},
            {"node": "edge-2", "first": 1 + layers, "last": 21},
        ]
        events.append({"event": "placement", "round": number, "step_s": 17.0, "sites": [{"hosts": hosts}]})
        devices = [{"train_seconds": 2 * step_s, "step_losses": [2.0, 1.0]}]
        events.append({"event": "round_done", "round": number, "steps": 2, "devices": devices, "attempt": attempt})
    events.append({"event": "link_measured", "node": "edge-1", "link_up_bps": 3e5, "link_down_bps": 2e5})
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    figures = {figure.name: figure for figure in link_change.of_run(tmp_path)}
    assert figures["edge-1's link, found anew, down"].value == 0.2
    assert figures["layers of the slow node in the last plan"].holds
    assert figures["a step with the last plan, predicted over measured"].value == pytest.approx(17 / 18, abs=1e-3)
    assert figures["a step with the old plan over one with the last"].value == pytest.approx(2.222)
    assert figures["attempts that a round took, at most"].holds is False


def test_the_page_says_what_was_missed() -> None:
    figures = [
        Figure("a", 1.0, "MiB", "at most 2", True),
        Figure("b", 3.0, "MiB", "at most 2", False),
        Figure("c", 4.0, ""),
    ]
    text = testbed_memory.page(["| table |"], figures)
    assert "- holds: a = 1 MiB (at most 2)" in text
    assert "- MISSED: b = 3 MiB (at most 2)" in text
    assert "| table |" in text
