"""A round that goes on from snapshots equals the round that nothing disturbed, to the bit."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from edgelam_fl.config import RunConfig
from edgelam_fl.hub.daemon import HubServer
from edgelam_fl.hub.passes import relay_key
from edgelam_fl.model.adapter import initial_adapter
from edgelam_fl.model.source import ModelSource
from edgelam_fl.plan.resuming import newest_common
from edgelam_fl.telemetry.events import Event, JobResumed, StepDone, of_kind
from edgelam_fl.wire import edgelam_pb2 as pb
from server.kept import HubKept
from tests.fleet import Fleet, check_done, joined, memory_fleet
from tests.support import WAIT_S, run_config

STEPS = 5
CUTS = ["split.hosts=2", "split.front=1", "split.back=1", "federation.snapshot_every=2"]


def learned(report: pb.JobReport) -> pb.JobReport:
    """All of a report that does not depend on the clock, the attempt or the transport."""
    kept = pb.JobReport(
        adapter_digest=report.adapter_digest, labels_trained=report.labels_trained, eval_loss_sum=report.eval_loss_sum,
        eval_labels=report.eval_labels, tokens_trained=report.tokens_trained, moments=report.moments,
        eval_sums=report.eval_sums, contributions=report.contributions, examples=report.examples,
    )  # fmt: skip
    kept.steps.extend(report.steps)
    for step in kept.steps:
        step.ClearField("seconds")
    kept.host.labels_trained = report.host.labels_trained
    kept.host.left_out.extend(report.host.left_out)
    return kept


def ends(fleet: Fleet, names: list[str], step: int, ready: Callable[[], object] = lambda: True) -> None:
    """Has nodes end in the second round once all devices have done a step; one that has just done it only loses its links.

    `ready`: is asked before, until it says something that is true.
    """
    done: dict[str, int] = {}
    ended: list[str] = []

    def watch(event: Event) -> None:
        if not isinstance(event, StepDone) or not event.job.startswith("test/2/1/"):
            return
        done[event.job] = event.step
        if len(done) < len(fleet.devices) or min(done.values()) < step or ended:
            return
        ended.append(event.job)
        deadline = time.monotonic() + WAIT_S
        while not ready() and time.monotonic() < deadline:
            time.sleep(0.01)
        for name in names:
            if not event.job.endswith(name):
                fleet.stop(name)

    fleet.watch = watch


@contextmanager
def closing_hub(hub: HubServer) -> Iterator[None]:
    try:
        yield
    finally:
        hub.stop()


def second_round(source: ModelSource, config: RunConfig, fleet: Fleet, **how: Any) -> dict[str, pb.JobReport]:
    """Makes the second of two rounds of a fleet, or another attempt of it."""
    start = initial_adapter(source, config.lora.targets, config.lora.rank, 1)
    if fleet.round == 0:
        first = fleet.run(start, STEPS)
        check_done(first)
        fleet.adapter = {**start, **joined(first)}
    return fleet.run(fleet.adapter, STEPS, step_offset=STEPS, **how)


@pytest.mark.parametrize(
    ("ended", "settings"),
    [
        (["edge-1"], ["split.host_mode=joint"]),
        (["edge-2"], ["split.host_mode=sequential", "wire.activation_codec=int8", "wire.gradient_codec=int4"]),
        (["edge-1"], ["split.host_mode=copies", "optimizer.name=sgd", "optimizer.momentum=0.9"]),
        (["edge-1", "edge-2", "device-2"], ["optimizer.clip=global", "optimizer.max_norm=0.1", "lora.dropout=0.1"]),
        (["edge-1"], ["wire.front_cache_mb=1", 'lora.train=["hosts", "back"]']),
        (["edge-1", "edge-2", "device-2"], ["split.host_mode=copies", "split.labels=last-stage", "split.back=0"]),
    ],
    ids=["joint", "sequential-codecs", "copies-sgd", "all-clip", "kept-fronts", "all-copies-last-stage"],
)
def test_a_round_goes_on_after_nodes_ended(
    tiny: ModelSource, data_files: list[Path], tmp_path: Path, ended: list[str], settings: list[str]
) -> None:
    """In the second round nodes end after a step, all of them or one, and begin anew; the others only lose their links."""
    config = run_config(tiny.name, *CUTS, *settings)
    with memory_fleet(tiny, config, data_files[:2], state=tmp_path / "undisturbed") as fleet:
        expected = second_round(tiny, config, fleet)
        check_done(expected)
    with memory_fleet(tiny, config, data_files[:2], state=tmp_path / "disturbed") as fleet:
        ends(fleet, ended, 2)
        broken = second_round(tiny, config, fleet)
        assert "failed" in {report.state for report in broken.values()}  # with copies a device may be done before
        for name in ended if len(ended) == 1 else broken:
            fleet.restart(name)
            node = fleet.devices.get(name) or fleet.hosts[name][0]
            lost = node.wait(pb.WaitRequest(job=f"test/2/1/{name}", timeout_s=0))
            assert (lost.code, list(lost.snapshots)) == ("restarted", list(broken[name].snapshots))
        common = newest_common(report.snapshots for report in broken.values())
        assert common is not None
        resumed = second_round(tiny, config, fleet, attempt=2, resumed=common)
        check_done(resumed)
        assert [event.steps for event in of_kind(fleet.events, JobResumed)] == [common.steps] * len(resumed)
    for name, report in expected.items():
        assert learned(resumed[name]) == learned(report), name


@pytest.mark.parametrize("mode", ["joint", "sequential", "copies"])
def test_a_round_that_is_done_at_all_nodes_is_not_trained_again(
    mode: str, tiny: ModelSource, data_files: list[Path], tmp_path: Path
) -> None:
    """As if the server had died before it heard of it."""
    config = run_config(tiny.name, *CUTS, f"split.host_mode={mode}", f"federation.snapshot_every={STEPS}")
    with memory_fleet(tiny, config, data_files[:2], state=tmp_path) as fleet:
        expected = second_round(tiny, config, fleet)
        check_done(expected)
        common = newest_common(report.snapshots for report in expected.values())
        assert common == pb.StepSnapshot(attempt=1, steps=STEPS)
        before = len(list(of_kind(fleet.events, StepDone)))
        resumed = second_round(tiny, config, fleet, attempt=2, resumed=common)
        check_done(resumed)
        assert len(list(of_kind(fleet.events, StepDone))) == before
    for name, report in expected.items():
        assert learned(resumed[name]) == learned(report), name


def test_a_host_is_replaced_from_what_the_hub_keeps(tiny: ModelSource, data_files: list[Path], tmp_path: Path) -> None:
    """A host is gone with its disk; the one in its place goes on from what the lost one left at the hub, over gRPC."""
    config = run_config(tiny.name, *CUTS)
    with memory_fleet(tiny, config, data_files[:2], state=tmp_path / "undisturbed") as fleet:
        expected = second_round(tiny, config, fleet)
        check_done(expected)
    hub, kept, lost = HubServer("127.0.0.1", 0, tmp_path / "hub"), HubKept(tmp_path / "hub"), pb.Plan(run="test", round=2, node="edge-1")  # fmt: skip
    with closing_hub(hub), memory_fleet(tiny, config, data_files[:2], state=tmp_path / "disturbed") as fleet:
        fleet.hub = hub.port, relay_key(tmp_path / "hub")
        ends(fleet, ["edge-1"], 2, lambda: kept.steps(lost))
        broken = second_round(tiny, config, fleet)
        shutil.rmtree(tmp_path / "disturbed" / "edge-1")
        fleet.restart("edge-1")
        others = [report.snapshots for name, report in broken.items() if name != "edge-1"]
        common = newest_common([*others, kept.steps(lost)])
        assert common is not None
        lent = {"edge-1": kept.states(lost, common)}
        resumed = second_round(tiny, config, fleet, attempt=2, resumed=common, snapshots=lent)
        check_done(resumed)
    for name, report in expected.items():
        assert learned(resumed[name]) == learned(report), name


def test_an_attempt_from_the_start_is_as_if_no_other_had_been(
    tiny: ModelSource, data_files: list[Path], tmp_path: Path
) -> None:
    """What a failed attempt did to gradients and moments is gone; a host that began anew in between has its moments."""
    config = run_config(tiny.name, "federation.snapshot_every=0", "split.host_mode=sequential")
    with memory_fleet(tiny, config, data_files[:1], state=tmp_path / "undisturbed") as fleet:
        expected = second_round(tiny, config, fleet)
        check_done(expected)
        assert {report.moments for report in expected.values()} == {"warm"}
    with memory_fleet(tiny, config, data_files[:1], state=tmp_path / "disturbed") as fleet:
        ends(fleet, ["edge-1"], 1)
        broken = second_round(tiny, config, fleet)
        assert {(report.state, len(report.snapshots)) for report in broken.values()} == {("failed", 0)}
        fleet.restart("edge-1")
        again = second_round(tiny, config, fleet, attempt=2)
        check_done(again)
    for name, report in expected.items():
        assert learned(again[name]) == learned(report), name
