"""A run goes on by itself after kill -9 of its ServerApp and of the SuperLink, over TLS, and comes to the very same adapter."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from edgelam_fl.files import is_held
from edgelam_fl.model.source import ModelSource
from edgelam_fl.telemetry.events import EventTail, PlanMade, RoundDone, RunInterrupted, RunResumed, of_kind
from tests.integration.federation import Federation, config_of, kill

pytestmark = pytest.mark.processes
_ROUNDS = 3


def test_a_run_goes_on_by_itself_and_comes_to_the_same_adapter(federation: Federation, tiny: ModelSource) -> None:
    settings = [f"federation.rounds={_ROUNDS}", "federation.batch_size=2", "federation.evaluate_every=3"]
    calm = federation.run("calm", config_of(tiny.name, *settings))
    folder = federation.folder / "runs" / "killed"
    tail, plans = EventTail(folder / "events.jsonl"), list[PlanMade]()

    def kill_in_rounds_2_and_3() -> None:
        """Kills the ServerApp while round 2 is played, then the SuperLink while round 3 is."""
        new = [plan for plan in of_kind(tail.poll(), PlanMade) if plan.round in (2, 3) and plan.attempt == 1]
        plans.extend(new)
        for plan in new:
            if plan.round == 2:
                os.kill(serverapp_of(federation.superlink.pid), 9)
            else:
                kill(federation.superlink)
                federation.restart_superlink()

    killed = federation.run("killed", config_of(tiny.name, *settings), kill_in_rounds_2_and_3)
    assert [plan.round for plan in plans] == [2, 3]
    assert [event.reason for event in killed.of_kind(RunInterrupted)] == [
        "its process ended with status -9",
        "the SuperLink ended",
    ]
    assert [event.round for event in killed.of_kind(RunResumed)] == [1, 2]
    assert [done.round for done in killed.of_kind(RoundDone)] == list(range(1, _ROUNDS + 2))
    assert all(len(done.devices) == 3 for done in killed.of_kind(RoundDone)), "all nodes were back"
    expected, found = (load_file(run.path / "adapter" / "adapter_model.safetensors") for run in (calm, killed))
    assert expected.keys() == found.keys()
    assert all((expected[name] == found[name]).all() for name in expected)
    assert is_held(killed.path) is False


def serverapp_of(superlink: int) -> int:
    """Returns the process of the newest task that a SuperLink has started."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if parent == superlink and b"task_process" in command:
            found.append(int(process.name))
    return max(found)
