"""A run goes on by itself after kill -9 of its ServerApp and of the SuperLink, over TLS, and comes to the very same adapter."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from edgelam_fl.files import is_held
from edgelam_fl.model.source import ModelSource
from edgelam_fl.telemetry.events import EventTail, PlanMade, RoundDone, RunInterrupted, RunResumed, of_kind
from tests.integration.federation import Federation, Run, config_of, kill

pytestmark = pytest.mark.processes


def test_a_run_goes_on_by_itself_and_comes_to_the_same_adapter(
    federation: Federation, averaged: Run, tiny: ModelSource
) -> None:
    tail, killed = EventTail(federation.folder / "runs" / "killed" / "events.jsonl"), list[str]()

    def kill_in_round_2() -> None:
        """Kills the ServerApp in the round's first attempt and the SuperLink in the second."""
        for plan in of_kind(tail.poll(), PlanMade):
            if (plan.round, plan.attempt) == (2, 1):
                os.kill(serverapp_of(federation.superlink.pid), 9)
                killed.append("ServerApp")
            elif (plan.round, plan.attempt) == (2, 2):
                kill(federation.superlink)
                federation.restart_superlink()
                killed.append("SuperLink")

    run = federation.run("killed", config_of(tiny.name), kill_in_round_2)
    assert killed == ["ServerApp", "SuperLink"]
    assert [event.reason for event in run.of_kind(RunInterrupted)] == [
        "its process ended with status -9",
        "the SuperLink ended",
    ]
    assert [event.round for event in run.of_kind(RunResumed)] == [1, 1]
    rounds = run.of_kind(RoundDone)
    assert [(done.round, done.attempt) for done in rounds] == [(1, 1), (2, 3), (3, 1)]
    assert all(len(done.devices) == 3 for done in rounds), "all nodes were back"
    assert [host.moments for host in rounds[1].hosts] == ["warm"]
    expected, found = (load_file(one.path / "adapter" / "adapter_model.safetensors") for one in (averaged, run))
    assert expected.keys() == found.keys()
    assert all((expected[name] == found[name]).all() for name in expected)
    assert is_held(run.path) is False


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
