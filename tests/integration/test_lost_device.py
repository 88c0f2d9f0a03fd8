"""A device whose stage host dies in the middle of a round costs its own part, never the run."""

from __future__ import annotations

import time

import pytest

from edgelam_fl.model.source import ModelSource
from edgelam_fl.telemetry.events import EventTail, LinkLost, NodeLost, RoundDone, RoundProgress, StepDone, of_kind
from server.attendance import Attendance, Presence
from tests.integration.federation import START_DEADLINE_S, Federation, config_of, kill
from tests.support import WAIT_S

pytestmark = pytest.mark.processes

STEPS = 40  # so many that a device is killed in the middle of them


def test_a_killed_stage_host_does_not_end_the_run(federation: Federation, tiny: ModelSource) -> None:
    victim = federation.nodes["device-2"]
    tail, hosts = EventTail(victim.state / "events.jsonl"), EventTail(federation.nodes["edge-1"].state / "events.jsonl")
    tail.poll(), hosts.poll()
    killed_at, attending = 0.0, dict[str, Presence]()
    assert federation.hub is not None
    lead = Attendance(federation.hub.state)
    watched: list[str] = []

    def kill_in_training() -> None:
        nonlocal killed_at
        if not killed_at and (late := [event for event in of_kind(tail.poll(), StepDone) if event.step >= 5]):
            attending.update(lead.look(late[0].job.rpartition("/")[0], "", {}))
            kill(victim.children["stage host"])
            killed_at = time.monotonic()
        elif killed_at:
            watched.append(victim.watch())  # as `edgelam client` does: it starts the stage host again

    settings = [f"federation.local_steps={STEPS}", "federation.min_nodes=2", "federation.batch_size=2"]
    try:
        run = federation.run("lost-device", config_of(tiny.name, *settings), kill_in_training)
    finally:
        federation.wait_for(victim.ready, START_DEADLINE_S, "device-2's new stage host")
    assert killed_at, "the run was over before its device could be killed"
    assert any("started again" in what for what in watched)
    assert {name: node.state for name, node in attending.items()} == dict.fromkeys(federation.nodes, "running")
    assert all(node.silent_s < WAIT_S for node in attending.values())

    told = run.of_kind(RoundProgress)
    assert any(one.steps == STEPS and one.nodes and set(one.nodes) <= set(federation.nodes) for one in told)
    summary = run.summary
    assert (summary.state, summary.rounds) == ("done", 2)
    (lost, *_) = run.of_kind(NodeLost)
    assert (lost.round, lost.node) == (1, "device-2")
    assert any(words in lost.reason for words in ("stage host", "silent for")), lost.reason  # what is heard first
    links = list(of_kind(hosts.poll(), LinkLost))
    assert [event.link for event in links][:1] == ["device-2"]
    assert all(event.reason for event in links)
    first, second, evaluation = run.of_kind(RoundDone)
    assert [device.name for device in first.devices] == ["device-1", "device-3"]
    assert all(not device.left_out for device in first.devices)
    back = "device-2" in [device.name for device in evaluation.devices]
    assert (run.device("device-2").perplexity_after is not None) == back
    for name in ("device-1", "device-3"):
        assert run.device(name).perplexity_after > 1
    assert second.seconds < 120, "a dead device must not hold up the next round"
