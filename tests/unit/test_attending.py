"""A node that plays a part attends at the hub: it shows that it lives, and obeys what the server decides meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from edgelam_fl.addresses import free_port
from edgelam_fl.config import RunConfig
from edgelam_fl.hub.daemon import HubServer
from edgelam_fl.hub.passes import relay_key
from edgelam_fl.model import adapter as adapters
from edgelam_fl.model.source import ModelSource
from edgelam_fl.node.examples import DeviceExamples
from edgelam_fl.node.play import NodeHooks
from edgelam_fl.node.service import StageHost
from edgelam_fl.plan.making import RoundFacts
from edgelam_fl.plan.reading import part_id, spans_of
from edgelam_fl.split.route import memory_dial
from edgelam_fl.telemetry.events import NodeProgress, SliceComing, SliceReceived
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.attendance import ATTEND
from edgelam_fl.wire.grpc.attending import Attending
from edgelam_fl.wire.relay import make_token
from server.attendance import Attendance, Presence
from tests.fleet import Fleet
from tests.support import WAIT_S, run_config

JOB = "test/1/1"
EVERY_S = 0.02
RECEIVED = SliceReceived(model="m", base="fp32", tensors=2, bytes=120, slice_bytes=120, seconds=3.0)


def seen(server: Attendance, node: str, until: Callable[[Presence], bool], out: Mapping[str, str] = {}, cancelled: str = "") -> Presence:  # fmt: skip
    """Looks until a node is as it is wanted."""
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        found = server.look(JOB, cancelled, out).get(node)
        if found is not None and until(found):
            return found
        time.sleep(EVERY_S)
    raise AssertionError(f"{node}: {server.look(JOB, cancelled, out)}")


# ---------------------------------------------------------------- the thread that attends


def test_a_node_attends_until_its_last_word_also_at_a_hub_that_was_started_again(tmp_path: Path) -> None:
    state, port = tmp_path / "hub", free_port()
    hub, server = HubServer("127.0.0.1", port, state), Attendance(state)
    said, heard = pb.Beat(epoch=5, state="running", step=1), list[pb.Notice]()
    token = make_token(relay_key(state), ATTEND, f"{JOB}/edge-1", "edge-1")
    attending = Attending(f"127.0.0.1:{port}", token, lambda: said, heard.append, EVERY_S)
    assert seen(server, "edge-1", lambda node: node.step == 1).epoch == 5
    hub.stop()
    hub = HubServer("127.0.0.1", port, state)
    said.step = 2
    seen(server, "edge-1", lambda node: node.step == 2, {"device-1": "gone"})
    end = time.monotonic() + WAIT_S
    while pb.Notice(out={"device-1": "gone"}) not in heard and time.monotonic() < end:
        time.sleep(EVERY_S)
    assert pb.Notice(out={"device-1": "gone"}) in heard
    said.state = "failed"
    attending.close()
    assert seen(server, "edge-1", lambda node: node.state == "failed")
    server.close()
    hub.stop()


def test_a_hub_that_refuses_or_is_not_there_does_not_end_the_thread_with_an_error(tmp_path: Path) -> None:
    hub, heard = HubServer("127.0.0.1", 0, tmp_path), list[pb.Notice]()
    failed: list[object] = []
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(threading, "excepthook", failed.append)
        for port in (hub.port, free_port()):
            Attending(f"127.0.0.1:{port}", b"no token", pb.Beat, heard.append, EVERY_S).close()
        for thread in threading.enumerate():
            if thread.name == "attendance":
                thread.join(WAIT_S)
    assert (failed, heard) == ([], [])
    hub.stop()


# ---------------------------------------------------------------- stage hosts that attend


class AttendedFleet(Fleet):
    """Stage hosts that attend at a real hub, and dial each other in memory."""

    def __init__(self, source: ModelSource, config: RunConfig, data: list[Path], hub: HubServer, state: Path) -> None:
        super().__init__(source, config, {}, {})
        nodes: dict[str, StageHost] = {}
        self.nodes, self.facts = nodes, RoundFacts("test", 1, 1, 0, 2, hub_port=hub.port, relay_key=relay_key(state))
        means: dict[str, Any] = {"server": "127.0.0.1", "attend": partial(Attending, every_s=EVERY_S)}
        for number in range(1, config.split.least_hosts + 1):
            name = f"edge-{number}"
            nodes[name] = StageHost(name, memory_dial(nodes), self.emit, address=name, **means)
            self.hosts[name] = nodes[name], name
        for number, file in enumerate(data, 1):
            name = f"device-{number}"
            nodes[name] = StageHost(name, memory_dial(nodes), self.emit, examples=DeviceExamples(file), **means)
            self.devices[name] = nodes[name]

    def hand_out(self, *names: str) -> None:
        """Gives these nodes their plans of a first round."""
        config = self.config
        start = adapters.initial_adapter(self.source, config.lora.targets, config.lora.rank, config.run.seed)
        for name, plan in self.plans(self.facts).items():
            if name in names:
                tensors = adapters.slice_of(start, spans_of(plan))
                plan.adapter_digest = adapters.digest(tensors)
                reply = self.nodes[name].submit(pb.SubmitRequest(plan=plan, adapter=adapters.to_bytes(tensors)))
                assert reply.accepted, reply.reason

    def report(self, name: str) -> pb.JobReport:
        plan = pb.Plan(run="test", round=1, attempt=1, node=name)
        report = self.nodes[name].wait(pb.WaitRequest(job=part_id(plan), timeout_s=WAIT_S))
        assert report.state != "running"
        return report


@contextmanager
def attended(
    tiny: ModelSource, data: list[Path], folder: Path, *overrides: str
) -> Iterator[tuple[AttendedFleet, Attendance]]:
    hub, server = HubServer("127.0.0.1", 0, folder / "hub"), Attendance(folder / "hub")
    config = run_config(tiny.name, "federation.min_nodes=1", "federation.join_deadline_s=600", *overrides)
    fleet = AttendedFleet(tiny, config, data, hub, folder / "hub")
    try:
        yield fleet, server
    finally:
        for node in fleet.nodes.values():
            node.stop()
        server.close()
        hub.stop()


@pytest.mark.parametrize("hosts", [1, 2])
def test_hosts_go_on_at_once_without_a_device_that_is_out(
    tiny: ModelSource, data_files: list[Path], tmp_path: Path, hosts: int
) -> None:
    """They would wait for the device until the deadline of the links, ten minutes here."""
    with attended(tiny, data_files[:2], tmp_path, f"split.hosts={hosts}") as (fleet, server):
        fleet.hand_out(*fleet.hosts, "device-1")
        assert seen(server, "edge-1", lambda node: node.state == "running").step == 0
        seen(server, "device-1", lambda node: node.state == "done", {"device-2": "its data cannot be read"})
        for name in fleet.hosts:
            assert seen(server, name, lambda node: node.state == "done").step == 2
            (left_out,) = fleet.report(name).host.left_out
            assert (left_out.device, left_out.out) == ("device-2", True)
            assert "its data cannot be read" in left_out.reason


def test_a_device_says_where_it_is_and_a_host_too(tiny: ModelSource, data_files: list[Path], tmp_path: Path) -> None:
    with attended(tiny, data_files[:1], tmp_path) as (fleet, server):
        fleet.hand_out("device-1")
        waits = seen(server, "device-1", lambda node: node.progress is not None and node.progress.doing == "connecting")
        assert waits.progress is not None
        assert (waits.progress.step, waits.progress.steps, waits.progress.loss) == (0, 2, None)
        fleet.hand_out("edge-1")
        device = seen(server, "device-1", lambda node: node.state == "done").progress
        host = seen(server, "edge-1", lambda node: node.state == "done").progress
        report = fleet.report("device-1")
    newest = report.steps[-1]
    assert device == NodeProgress(
        doing="reporting", step=2, steps=2, loss=newest.loss_sum / newest.labels, tokens=report.tokens_trained
    )
    assert host == NodeProgress(doing="reporting", step=2, steps=2)


def test_layers_that_come_from_the_hub_are_said_in_per_cent(
    tiny: ModelSource, data_files: list[Path], tmp_path: Path
) -> None:
    told, said = list[Callable[[], NodeProgress]](), list[str]()

    @contextmanager
    def fetches(plan: pb.Plan) -> Iterator[None]:
        for event in (SliceComing(model="m", bytes=30, of=120), SliceComing(model="m", bytes=90, of=120), RECEIVED):
            said.append(told[0]().words())
            node.hear_of_slices(event)
        said.append(told[0]().words())
        yield

    def tell(job: str, progress: Callable[[], NodeProgress]) -> ExitStack:
        told.append(progress)
        return ExitStack()

    hooks = NodeHooks(around_part=fetches)
    with attended(tiny, data_files[:1], tmp_path) as (fleet, _):
        node = StageHost("edge-1", memory_dial({}), lambda event: None, address="edge-1", tell=tell, hooks=hooks)
        fleet.nodes["edge-1"] = node
        fleet.hand_out("edge-1")
        node.stop()
    assert said == ["loading", "fetching layers, 25 %", "fetching layers, 75 %", "loading"]


def test_a_device_says_that_it_measures_answers_and_trains(
    tiny: ModelSource, data_files: list[Path], tmp_path: Path
) -> None:
    """Asked whenever its host computes."""
    told, said = list[Callable[[], NodeProgress]](), list[str]()

    @contextmanager
    def computes(header: pb.Header) -> Iterator[None]:
        said.append(told[0]().words())
        yield

    def tell(job: str, progress: Callable[[], NodeProgress]) -> ExitStack:
        told.append(progress)
        return ExitStack()

    keys = ('task.metrics=["exact_match"]', "task.metrics_tokens=4")
    with attended(tiny, data_files[:1], tmp_path, *keys) as (fleet, _):
        dial, examples = memory_dial(fleet.nodes), DeviceExamples(data_files[0])
        hooks = NodeHooks(around_pass=computes)
        fleet.nodes["edge-1"] = StageHost("edge-1", dial, fleet.emit, address="edge-1", hooks=hooks)
        fleet.nodes["device-1"] = StageHost("device-1", dial, fleet.emit, examples=examples, tell=tell)
        fleet.hand_out("edge-1", "device-1")
        assert fleet.report("device-1").state == "done"
    in_turn = [doing for doing, _ in groupby(words.split(",")[0] for words in said)]
    assert in_turn == ["measuring", "answering", "step 0 of 2", "step 1 of 2"]
    assert {"measuring, 0 %", "answering, 0 %", "answering, 25 %"} <= set(said)


@pytest.mark.parametrize("for_all", [True, False])
def test_a_part_ends_when_its_job_is_cancelled_or_its_node_is_out(
    tiny: ModelSource, data_files: list[Path], tmp_path: Path, for_all: bool
) -> None:
    with attended(tiny, data_files[:1], tmp_path) as (fleet, server):
        fleet.hand_out("edge-1")
        words = "edge-2 of its chain was lost"
        how: dict[str, Any] = {"cancelled": words} if for_all else {"out": {"edge-1": words}}
        seen(server, "edge-1", lambda node: node.state == "failed", **how)
        assert fleet.report("edge-1").error == words


def test_a_device_that_waits_for_a_host_ends_when_the_host_is_lost(
    tiny: ModelSource, data_files: list[Path], tmp_path: Path
) -> None:
    """The host has no such job, and would be asked again for ten minutes."""
    with attended(tiny, data_files[:1], tmp_path) as (fleet, server):
        fleet.hand_out("device-1")
        seen(server, "device-1", lambda node: node.state == "running")
        words = "host edge-1 is out: silent for 8 s"
        seen(server, "device-1", lambda node: node.state == "failed", {"device-1": words})
        assert fleet.report("device-1").error == words


# ---------------------------------------------------------------- epochs


def test_a_stage_host_that_was_started_again_says_so_to_who_dials_it(
    tiny: ModelSource, data_files: list[Path], tmp_path: Path
) -> None:
    means: dict[str, Any] = {"server": "127.0.0.1", "attend": partial(Attending, every_s=EVERY_S)}

    def node() -> StageHost:
        state = tmp_path / "edge-1"
        return StageHost("edge-1", memory_dial({}), lambda event: None, address="edge-1", state=state, **means)

    with attended(tiny, data_files[:1], tmp_path) as (fleet, server):
        before, hello = node(), pb.Hello(job=JOB, node="device-1")
        fleet.nodes["edge-1"] = before
        assert isinstance(before.admit(hello, None), pb.NotReady), "the job may still come"
        fleet.hand_out("edge-1")
        assert not seen(server, "edge-1", lambda node: node.state == "running").restarted
        before.stop()
        fleet.nodes["edge-1"] = after = node()
        answer = after.admit(hello, None)
        assert isinstance(answer, pb.Refuse)
        assert answer.reason == "node edge-1 was restarted; it no longer has its part of test/1/1"
        assert isinstance(after.admit(pb.Hello(job="test/1/2"), None), pb.NotReady)
        fleet.hand_out("edge-1")
        assert not isinstance(after.admit(hello, None), pb.Refuse), "it has been given the part again"
        seen(server, "edge-1", lambda node: node.restarted)


def test_a_note_that_cannot_be_read_or_written_costs_no_part(
    tiny: ModelSource, data_files: list[Path], tmp_path: Path
) -> None:
    state = tmp_path / "edge-1"
    (state / "accepted.json").mkdir(parents=True)
    with attended(tiny, data_files[:1], tmp_path) as (fleet, _):
        node = StageHost("edge-1", memory_dial({}), lambda event: None, address="edge-1", state=state)
        fleet.nodes["edge-1"] = node
        fleet.hand_out("edge-1")
        node.stop()
