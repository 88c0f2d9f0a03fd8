"""Ten faults in one run: processes that are killed or stand still, and connections that break, in a seeded order.

The long form, with the seconds that it takes, is `python -m benchmarks.chaos`.
"""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import numpy as np
import pytest
from safetensors.numpy import load_file

from edgelam_fl.federation.child import Child
from edgelam_fl.model.source import ModelSource
from edgelam_fl.telemetry.events import EventTail, PlanMade, RoundDone, of_kind
from tests.integration.federation import START_DEADLINE_S, Federation, config_of, kill

pytestmark = pytest.mark.processes

SEED, ROUNDS, AT_ONCE = 19, 4, 4
STANDSTILL_S = 1.0
UNTOUCHED = "device-2"


def faults_of(federation: Federation) -> list[Callable[[], object]]:
    """Returns the ten faults, none of which strikes `UNTOUCHED` alone."""

    def process(node: str, kind: str) -> Child:
        return federation.nodes[node].children[kind]

    def hub() -> Child:
        assert federation.hub is not None
        assert federation.hub.child is not None
        return federation.hub.child

    data_plane, control_plane = federation.wires
    return [
        lambda: kill(process("device-1", "stage host")),
        lambda: kill(process("device-3", "SuperNode")),
        lambda: kill(process("edge-1", "stage host")),
        lambda: kill(hub()),
        lambda: stand_still(process("device-3", "stage host")),
        lambda: stand_still(process("edge-1", "stage host")),
        lambda: stand_still(process("edge-1", "SuperNode")),
        lambda: stand_still(federation.superlink),
        data_plane.cut,
        control_plane.cut,
    ]


def stand_still(child: Child) -> None:
    """Stops a process; it goes on after `STANDSTILL_S`."""
    with suppress(ProcessLookupError):
        os.kill(child.pid, signal.SIGSTOP)
        threading.Timer(STANDSTILL_S, partial(_go_on, child.pid)).start()


def _go_on(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def mend(federation: Federation) -> None:
    """Starts again what has ended, as `edgelam client` and `edgelam server` do."""
    for node in federation.nodes.values():
        node.watch()
    assert federation.hub is not None
    if federation.hub.watch():
        assert federation.hub.child is not None
        federation.children[0] = federation.hub.child


def test_ten_faults_cost_a_run_nothing_but_time(federation: Federation, tiny: ModelSource) -> None:
    chance = random.Random(SEED)
    waiting = chance.sample(faults_of(federation), 10)
    tail, in_turn = EventTail(federation.folder / "runs" / "chaos" / "events.jsonl"), list[Callable[[], object]]()

    def strike() -> None:
        """Begins some faults in each round from the second on, one after the other."""
        mend(federation)
        for plan in of_kind(tail.poll(), PlanMade):
            if plan.round > 1 and plan.attempt == 1:
                in_turn.extend(waiting[:AT_ONCE])
                del waiting[:AT_ONCE]
        if in_turn and chance.random() < 0.5:  # a look is a fifth of a second: so faults are at any place of a round
            in_turn.pop(0)()

    settings = [
        f"federation.rounds={ROUNDS}",
        "federation.local_steps=8",
        "federation.min_nodes=2",
        f"federation.evaluate_every={ROUNDS}",
    ]
    try:
        run = federation.run("chaos", config_of(tiny.name, *settings), strike)
    finally:
        for node in federation.nodes.values():
            node.watch()
            federation.wait_for(node.ready, START_DEADLINE_S, f"{node.name}'s stage host")
    assert not waiting
    assert not in_turn
    rounds = run.of_kind(RoundDone)
    assert [done.round for done in rounds] == list(range(1, ROUNDS + 2)), (
        "each round is done once, and then the evaluation"
    )
    for done in rounds:
        whole = {device.name for device in done.devices if not device.left_out}
        assert UNTOUCHED in whole, f"round {done.round} cost a device that no fault struck its work"
        assert len(done.devices) >= 2
    adapter = load_file(run.path / "adapter" / "adapter_model.safetensors")
    assert all(np.isfinite(tensor).all() for tensor in adapter.values())
