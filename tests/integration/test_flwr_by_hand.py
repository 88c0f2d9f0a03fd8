"""`flwr run .` without `edgelam run`, with strategies of one's own that leave the result as it is; Flower's commands see it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from edgelam_fl.model.adapter import digest
from edgelam_fl.model.source import ModelSource
from edgelam_fl.telemetry.events import PlanMade
from tests.integration.federation import Federation, Run, small_settings

pytestmark = pytest.mark.processes


def test_flwr_run_by_hand_gives_the_same_adapter(averaged: Run, federation: Federation, tiny: ModelSource) -> None:
    run_id = ""

    def submit(out: Path) -> int:
        nonlocal run_id
        # These are in the directory that the SuperLink was started from, and its operator allows their package.
        own = [
            "strategy.selection=examples.strategies.my_selection:LargestFirst",
            "strategy.bandwidth=examples.strategies.my_bandwidth:ByRoot",
        ]
        one_by_one = ("federation.rounds=", "optimizer.lr=")  # as Flower's users type them
        small = small_settings(tiny.name)
        keys = " ".join(word for word in small if word.startswith(one_by_one))
        settings = " ".join([*(word for word in small if not word.startswith(one_by_one)), *own])
        said = federation.flwr("run", ".", "--run-config", f'set="{settings}" out="{out}" {keys}', "--format", "json")
        run_id = str(json.loads(said)["run-id"])
        return int(run_id)

    by_hand = federation.follow("by-hand", submit)
    ours, theirs = (load_file(run.path / "adapter/adapter_model.safetensors") for run in (averaged, by_hand))
    assert digest(ours) == digest(theirs)
    for device in averaged.summary.devices:
        same = by_hand.device(device.name)
        assert (same.perplexity_before, same.perplexity_after) == (device.perplexity_before, device.perplexity_after)
        assert same.examples == device.examples

    why = by_hand.of_kind(PlanMade)[0].why
    assert why == {f"device-{n}": f"has 15 examples, place {n}" for n in (1, 2, 3)}

    listed = federation.flwr("list")
    assert run_id[:6] in listed
    assert "edgelam" in listed
    (line,) = json.loads(federation.flwr("list", "--run-id", run_id, "--format", "json"))["runs"]
    assert line["status"] == "finished:completed"
    log = federation.flwr("log", run_id, "--show")
    assert f"run folder: {by_hand.path}" in log
    assert re.search(
        r"round 2 of 2 took .*; over 3 devices: train loss [0-9.]+, held-out perplexity [0-9.]+ at its", log
    )
    assert re.search(
        r"device-2: 15 examples, train loss [0-9.]+, held-out perplexity [0-9.]+ at its start, .* tokens/s", log
    )
    assert "last evaluation took" in log
