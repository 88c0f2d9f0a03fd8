"""Training over links whose streams break, within tensors too, is bit for bit what it is over links that hold."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from edgelam_fl.config import RunConfig
from edgelam_fl.model.adapter import initial_adapter
from edgelam_fl.model.source import ModelSource
from edgelam_fl.node.examples import DeviceExamples
from edgelam_fl.node.service import StageHost
from edgelam_fl.telemetry.events import LinkLost, LinkResumed, of_kind
from edgelam_fl.wire.grpc.dial import dial
from edgelam_fl.wire.grpc.options import LinkTiming
from edgelam_fl.wire.grpc.serve import DataPlaneServer
from tests.fleet import Fleet, check_done, joined, memory_fleet, same_bits
from tests.integration.proxy import CuttingProxy
from tests.support import run_config

TIMING = LinkTiming(redial_s=0.01)
STEPS = 4


@contextmanager
def cut_fleet(source: ModelSource, config: RunConfig, data: list[Path], seed: int) -> Iterator[Fleet]:
    """Yields a fleet over gRPC; every connection to a host but the last ones breaks after a random number of bytes."""
    chance = random.Random(seed)
    fleet = Fleet(source, config, {}, {})
    gone: list[CuttingProxy | DataPlaneServer] = []
    dial_soon = partial(dial, timing=TIMING)
    for number in range(1, config.split.least_hosts + 1):
        name = f"edge-{number}"
        host = StageHost(name, dial_soon, fleet.emit)
        server = DataPlaneServer("127.0.0.1", 0, host.admit, TIMING)
        budgets = [chance.randint(1_000, 60_000) for _ in range(8)]
        proxy = CuttingProxy(f"127.0.0.1:{server.port}", budgets)
        fleet.hosts[name] = (host, proxy.address)
        gone += [proxy, server]
    for number, file in enumerate(data, 1):
        name = f"device-{number}"
        fleet.devices[name] = StageHost(name, dial_soon, fleet.emit, examples=DeviceExamples(file))
    yield fleet
    for node in [*fleet.devices.values(), *(host for host, _ in fleet.hosts.values())]:
        node.stop()  # type: ignore[attr-defined]
    for one in gone:
        one.close() if isinstance(one, CuttingProxy) else one.stop()


@pytest.mark.parametrize(("hosts", "mode"), [(1, "joint"), (2, "sequential")])
def test_a_round_over_streams_that_break_is_bit_equal(
    tiny: ModelSource, data_files: list[Path], hosts: int, mode: str
) -> None:
    config = run_config(tiny.name, f"split.hosts={hosts}", f"split.host_mode={mode}", "task.max_tokens=32")
    start = initial_adapter(tiny, config.lora.targets, config.lora.rank, config.run.seed)
    with memory_fleet(tiny, config, data_files[:2]) as whole:
        expected = whole.run(start, STEPS)
    check_done(expected)
    with cut_fleet(tiny, config, data_files[:2], seed=hosts) as fleet:
        reports = fleet.run(start, STEPS)
    check_done(reports)
    assert same_bits(joined(reports), joined(expected))
    for name in ("device-1", "device-2"):
        assert reports[name].eval_loss_sum == expected[name].eval_loss_sum
        assert all(step.counted for step in reports[name].steps)
    assert len(list(of_kind(fleet.events, LinkResumed))) >= 4, "streams have to break for this to say anything"
    assert not list(of_kind(fleet.events, LinkLost))
