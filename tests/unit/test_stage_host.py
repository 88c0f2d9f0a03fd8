"""What a stage host takes on, refuses, attaches to and drops; tests/parity plays whole rounds."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgelam_fl.flower import from_record
from edgelam_fl.model import adapter as adapters
from edgelam_fl.model.source import ModelSource
from edgelam_fl.model.stage import load_stages
from edgelam_fl.node.daemon import listen_address
from edgelam_fl.node.examples import DeviceExamples
from edgelam_fl.node.play import NodeHooks
from edgelam_fl.node.profile.answer import VERSIONED
from edgelam_fl.node.service import StageHost, StageHostTiming
from edgelam_fl.plan.layout import make_layout
from edgelam_fl.plan.making import RoundFacts, make_plans, task_settings
from edgelam_fl.plan.reading import spans_of
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.split.group import RETRY_MS
from edgelam_fl.telemetry.events import DataRead, Event, JobDone, JobStarted, of_kind
from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb
from server.global_adapter import StartingPoints
from server.parcels import parcel_of
from server.state import Parcel
from tests.fleet import check_done, joined, memory_fleet, same_bits
from tests.support import WAIT_S, run_config


def a_plan(source: ModelSource, attempt: int = 1, **other: Any) -> pb.SubmitRequest:
    """An edge server's part for one device, which never comes."""
    config = run_config(source.name)
    spec = RunSpec(config, source)
    edge, device = pb.Profile(name="edge-1", role=pb.EDGE), pb.Profile(name="device-1", role=pb.DEVICE)
    layout = make_layout(spec, [device], [edge])
    profiles, tokens = {"edge-1": edge, "device-1": device}, {"device-1": b"secret"}
    plan = make_plans(spec, RoundFacts("run", 1, attempt, 0, 1), profiles, layout, {}, tokens)["edge-1"]
    start = adapters.initial_adapter(source, config.lora.targets, config.lora.rank, 1)
    tensors = adapters.slice_of(start, spans_of(plan))
    plan.adapter_digest = adapters.digest(tensors)
    for key, value in other.items():
        setattr(plan, key, value)
    return pb.SubmitRequest(plan=plan, adapter=adapters.to_bytes(tensors))


def edge(events: list[Event] | None = None, **options: Any) -> StageHost:
    emit = ([] if events is None else events).append
    return StageHost("edge-1", lambda *_: pytest.fail("a host dials nobody"), emit, **options)


def report(node: StageHost, attempt: int = 1, timeout_s: float = WAIT_S) -> pb.JobReport:
    return node.wait(pb.WaitRequest(job=f"run/1/{attempt}/edge-1", timeout_s=timeout_s))


def await_start(events: list[Event]) -> None:
    end = time.monotonic() + WAIT_S
    while not any(of_kind(events, JobStarted)):
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"protocol_version": 99}, f"a plan of protocol version 99; node edge-1 speaks {PROTOCOL_VERSION}"),
        ({"node": "edge-2"}, "a plan for EDGE 'edge-2'; this is EDGE 'edge-1'"),
        ({"role": pb.DEVICE}, "a plan for DEVICE 'edge-1'; this is EDGE 'edge-1'"),
        ({"window": 0}, "a plan without route, batch size, micro-batches, window or deadlines"),
        ({"micro_batches": 0}, "a plan without route, batch size, micro-batches, window or deadlines"),
    ],
)
def test_a_plan_that_cannot_be_this_nodes_is_refused(tiny: ModelSource, wrong: dict[str, Any], reason: str) -> None:
    assert edge().submit(a_plan(tiny, **wrong)) == pb.SubmitReply(accepted=False, reason=reason, code="mismatch")


def radio(plan: pb.Plan, **settings: Any) -> None:
    """Makes the plan one of channel prediction."""
    plan.task.kind = "channel-prediction"
    plan.task.radio.CopyFrom(pb.Radio(**settings))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda plan: setattr(plan.lora, "alpha", math.nan), "a plan whose lora.alpha holds a number that is not finite"),
        (lambda plan: plan.lora.own.add(modules=["q_proj"], alpha=math.inf), "a plan whose lora.own.alpha holds a number that is not finite"),
        (lambda plan: plan.optimizer.lrs.__setitem__(0, math.nan), "a plan whose optimizer.lrs holds a number that is not finite"),
        (lambda plan: setattr(plan.lora, "rank", 4096), "a plan with adapters of rank 4096; at most 1024 is allowed"),
        (lambda plan: plan.lora.own.add(modules=["q_proj"], rank=4096), "a plan with adapters of rank 4096; at most 1024 is allowed"),
        (lambda plan: radio(plan, history_slots=10**8, future_slots=1), "a plan with 200000011 values per token; 1 to 65536 are allowed"),
        (lambda plan: radio(plan, history_slots=16, future_slots=0), "a plan with 0 values per token; 1 to 65536 are allowed"),
    ],
)  # fmt: skip
def test_numbers_that_no_run_file_allows_are_refused(
    tiny: ModelSource, change: Callable[[pb.Plan], None], reason: str
) -> None:
    request = a_plan(tiny)
    change(request.plan)
    assert edge().submit(request) == pb.SubmitReply(accepted=False, reason=reason, code="mismatch")


def test_an_unknown_base_is_refused(tiny: ModelSource) -> None:
    request = a_plan(tiny)
    request.plan.model.base = "int2"
    assert (
        edge().submit(request).reason
        == "base 'int2'; node edge-1 has fp32, bf16, int8, nf4 (`edgelam doctor` there says why)"
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: setattr(r.plan.model, "digest", "0" * 64), "is not the server's: it is "),
        (lambda r: setattr(r.plan, "adapter_digest", "0" * 64), "the plan starts from 000000000000"),
        (lambda r: setattr(r, "adapter", b"garbage"), "adapter tensors cannot be read"),
        (lambda r: setattr(r.plan.model, "name", "/no/such/model"), "the model cannot be found, read or cut as asked (model); see stage-host.log on edge-1"),
    ],
)  # fmt: skip
def test_a_part_that_cannot_begin_is_reported_with_its_reason(tiny: ModelSource, change: Any, words: str) -> None:
    request = a_plan(tiny)
    change(request)
    node = edge()
    assert node.submit(request).accepted
    got = report(node)
    assert got.state == "failed"
    assert words in got.error


def test_the_same_part_again_attaches_to_it(tiny: ModelSource) -> None:
    events: list[Event] = []
    node, request = edge(events), a_plan(tiny)
    assert node.submit(request).accepted
    await_start(events)
    assert node.submit(request).accepted
    assert report(node, timeout_s=0).state == "running"
    node.stop()
    assert report(node).state == "failed"
    assert node.submit(request).accepted, "a finished part gives its stored report"
    assert report(node, timeout_s=0).error == "node edge-1 is shutting down"
    assert len(list(of_kind(events, JobDone))) == 1


def test_a_newer_attempt_cancels_the_older(tiny: ModelSource) -> None:
    events: list[Event] = []
    node = edge(events)
    node.submit(a_plan(tiny))
    await_start(events)
    assert node.submit(a_plan(tiny, attempt=2)).accepted
    assert report(node).error == "run/1/2/edge-1 takes its place"
    assert report(node, 2, timeout_s=0).state == "running"
    node.stop()


def test_a_newer_attempt_cancels_an_older_one_that_is_still_loading(tiny: ModelSource) -> None:
    loading, go_on = threading.Event(), threading.Event()

    def slowly(*arguments: Any, **options: Any) -> Any:
        loading.set()
        go_on.wait(WAIT_S)
        return load_stages(*arguments, **options)

    node = edge(hooks=NodeHooks(load=slowly))
    node.submit(a_plan(tiny))
    assert loading.wait(WAIT_S)
    assert node.submit(a_plan(tiny, attempt=2)).accepted
    go_on.set()
    first = report(node)
    node.stop()
    assert (first.state, first.error) == ("failed", "run/1/2/edge-1 takes its place")


def test_two_parts_reports_are_kept(tiny: ModelSource) -> None:
    node = edge()
    for attempt in (1, 2, 3):
        request = a_plan(tiny, attempt, adapter_digest="0" * 64)
        node.submit(request)
        assert report(node, attempt).state == "failed"
    assert "the plan starts from" in report(node, 2).error
    lost = report(node, 1)
    words = (
        "the stage host of edge-1 no longer has job run/1/1/edge-1: it was started again, or has had newer ones since"
    )
    assert (lost.state, lost.code, lost.error, lost.role) == ("failed", "restarted", words, pb.EDGE)


# ---------------------------------------------------------------- tensors that a part lacks


def without_tensors(source: ModelSource, attempt: int = 1) -> tuple[pb.SubmitRequest, bytes]:
    """A plan as it comes if the server takes all tensors to be here, and the tensors."""
    request = a_plan(source, attempt)
    tensors, request.adapter = request.adapter, b""
    return request, tensors


def test_a_part_that_lacks_tensors_says_which_it_holds_and_goes_on_with_what_comes(tiny: ModelSource) -> None:
    events: list[Event] = []
    node = edge(events)
    request, tensors = without_tensors(tiny)
    assert node.submit(request).accepted
    asks = report(node)
    assert (asks.state, asks.node, asks.role) == ("needs", "edge-1", pb.EDGE)
    assert not asks.held, "its slice is new here"
    assert node.admit(pb.Hello(job="run/1/1"), None) == pb.NotReady(retry_ms=RETRY_MS), "its peers wait"
    request.adapter = tensors
    assert node.submit(request).accepted
    await_start(events)
    assert report(node, timeout_s=0).state == "running"
    node.stop()


def test_the_same_message_again_brings_nothing_and_the_part_asks_again(tiny: ModelSource) -> None:
    node = edge()
    request, tensors = without_tensors(tiny)
    for _ in range(3):
        assert node.submit(request).accepted
        assert report(node).state == "needs"
    node.submit(request)
    refused = report(node)
    assert (refused.state, refused.code) == ("failed", "refused")
    assert "node edge-1 holds adapter" in refused.error
    assert tensors


def test_a_part_whose_tensors_do_not_come_fails_by_itself(tiny: ModelSource) -> None:
    request, _ = without_tensors(tiny)
    request.plan.deadlines.ready_s = 0.0
    node = edge()
    node.submit(request)
    end = time.monotonic() + WAIT_S
    while (got := report(node)).state == "needs" and time.monotonic() < end:
        pass
    words = "the server did not send the tensors that were asked for within 0 s"
    assert (got.state, got.code, got.error) == ("failed", "peer-lost", words)


def test_a_part_that_waits_for_tensors_gives_way_to_a_newer_attempt(tiny: ModelSource) -> None:
    node = edge()
    node.submit(without_tensors(tiny)[0])
    assert report(node).state == "needs"
    assert node.submit(a_plan(tiny, attempt=2)).accepted
    assert report(node, 2, timeout_s=0).state == "running"
    assert report(node).error == "run/1/2/edge-1 takes its place"
    node.stop()


@pytest.mark.parametrize("is_private", [False, True])
def test_the_server_sends_what_differs_from_what_the_node_holds(tiny: ModelSource, is_private: bool) -> None:
    """Whatever it took the node to hold: the plan came without a tensor. A private run says nothing of what is held."""
    events: list[Event] = []
    node = edge(events)
    first = a_plan(tiny)
    node.submit(first)
    await_start(events)
    second, start = a_plan(tiny, attempt=2), adapters.from_bytes(first.adapter)
    changed = next(name for name in start if name.endswith("lora_B.weight"))
    start[changed] = start[changed] + 1
    second.plan.adapter_digest, second.adapter = adapters.digest(start), b""
    if is_private:
        second.plan.privacy.step_clip = 1.0
    node.submit(second)
    asks = report(node, 2)
    assert (asks.state, bool(asks.held)) == ("needs", not is_private)
    planned: Any = SimpleNamespace(
        plans={"edge-1": second.plan}, parcels={"edge-1": Parcel(None)}, starts=StartingPoints(start)
    )
    sent = parcel_of(planned, "edge-1", asks).adapter
    assert sent is not None
    assert set(from_record(sent)) == (set(start) if is_private else {changed})
    second.adapter = adapters.to_bytes(from_record(sent))
    node.submit(second)
    assert report(node, 2, timeout_s=0).state == "running"
    node.stop()


# ---------------------------------------------------------------- two runs


def test_a_node_that_plays_for_a_run_refuses_another(tiny: ModelSource) -> None:
    """A server lets one run after the other use its nodes; another server's code may not."""
    node = edge()
    node.submit(a_plan(tiny))
    second = a_plan(tiny, run="other")
    assert node.submit(second) == pb.SubmitReply(accepted=False, reason="node edge-1 is busy with run run", code="busy")
    assert report(node, timeout_s=0).state == "running"
    second.plan.alone = True  # the server knows that nobody leads the first any more
    assert node.submit(second).accepted
    assert report(node).error == "other/1/1/edge-1 takes its place"
    node.stop()
    assert node.submit(a_plan(tiny, attempt=2)).accepted, "a part that is over is in nobody's way"
    node.stop()


def test_a_link_to_a_job_that_is_not_here_is_put_off(tiny: ModelSource) -> None:
    node = edge(timing=StageHostTiming(retry_ms=7))
    answer = node.admit(pb.Hello(job="run/1/1", device_index=0), None)
    assert answer == pb.NotReady(retry_ms=7)


@pytest.mark.parametrize(
    ("listen", "is_device", "address"),
    [
        ("10.0.0.2:9000", True, ("10.0.0.2", 9000)),
        ("[::1]:9000", False, ("::1", 9000)),
        ("", False, ("127.0.0.1", 0)),
        ("", True, None),
        ("relay", False, None),
    ],
)
def test_where_a_stage_host_listens(listen: str, is_device: bool, address: tuple[str, int] | None) -> None:
    assert listen_address(listen, is_device=is_device) == address


# ---------------------------------------------------------------- profile


def profile(data: Path | None, source: ModelSource, version: int = PROTOCOL_VERSION) -> pb.Profile:
    node = StageHost(
        "n", lambda *_: pytest.fail("a profile needs no link"), lambda event: None,
        examples=DeviceExamples(data) if data else None, address="10.0.0.1:7000", tags=["gpu", "lab"],
    )  # fmt: skip
    return node.profile(pb.ProfileRequest(protocol_version=version, task=task_settings(run_config(source.name))))


def test_a_devices_profile_counts_its_examples(tiny: ModelSource, data_files: list[Path]) -> None:
    got = profile(data_files[0], tiny)
    assert (got.role, got.problem) == (pb.DEVICE, "")
    assert (got.held_out, got.examples + got.held_out) == (round(0.1 * 24), 24)
    assert (got.protocol_version, got.address) == (PROTOCOL_VERSION, "10.0.0.1:7000")
    assert list(got.bases) == ["fp32", "bf16", "int8", "nf4"]
    assert got.tags == ["gpu", "lab"]
    assert got.memory_available_bytes > 1 << 20
    assert set(got.versions) == set(VERSIONED)


def test_a_devices_profile_counts_what_the_models_tokenizer_leaves_of_its_data(
    tiny: ModelSource, tmp_path: Path
) -> None:
    """Counts alone: neither the names of fields nor the places of what cannot be read."""
    file, events = tmp_path / "data.jsonl", list[Event]()
    rows = [
        {"question": "long " * (40 if n % 4 == 0 else 1) + str(n), "answer": f"a{n}", "secret-field": 1}
        for n in range(20)
    ]
    file.write_text("\n".join([*map(json.dumps, rows), '{"secret-line']), encoding="utf-8")
    node = StageHost(
        "n", lambda *_: pytest.fail("a profile needs no link"), events.append, examples=DeviceExamples(file)
    )
    config = run_config(
        tiny.name, "task.max_tokens=24", "data.bad_lines=skip", "data.held_out=0.2", "task.template=plain"
    )
    request = pb.ProfileRequest(protocol_version=PROTOCOL_VERSION, task=task_settings(config))
    before = node.profile(request)
    assert (before.problem, before.examples, before.held_out) == ("", 16, 4)
    assert before.data == pb.DataCounts(bad=1, unread=1)
    request.model = tiny.name
    after = node.profile(request)
    assert after.data.cut + after.data.skipped == 5
    assert after.examples + after.held_out + after.data.skipped == 20
    assert (after.data.bad, after.data.unread) == (1, 1)
    assert b"secret" not in after.SerializeToString()
    assert b"line" not in after.data.SerializeToString()
    request.model = "not-here"
    assert (node.profile(request).problem, node.profile(request).examples) == ("", 16)
    (read,) = of_kind(events, DataRead)
    assert (read.unread_names, read.bad_places) == (("secret-field",), ("line 21",))


def test_a_profile_names_what_keeps_the_node_out(tiny: ModelSource, data_files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert profile(tmp_path / "empty", tiny).problem == "its data cannot be used: few-examples; see stage-host.log on n"
    assert profile(data_files[0], tiny, 99).problem == f"speaks protocol version {PROTOCOL_VERSION}, the server 99"
    assert profile(None, tiny).role == pb.EDGE


def test_a_device_that_holds_nothing_out_trains_beside_one_that_measures(
    tiny: ModelSource, data_files: list[Path], tmp_path: Path
) -> None:
    one = tmp_path / "one.jsonl"
    one.write_text('{"question": "Why?", "answer": "So."}\n', encoding="utf-8")
    config = run_config(tiny.name)
    start = adapters.initial_adapter(tiny, config.lora.targets, config.lora.rank, 1)
    with memory_fleet(tiny, config, [data_files[0], one]) as fleet:
        reports = fleet.run(start, 1)
    check_done(reports)
    measures, trains = reports["device-1"], reports["device-2"]
    assert (measures.eval_labels > 0, trains.eval_labels, trains.examples) == (True, 0, 1)
    assert trains.labels_trained > 0


# ---------------------------------------------------------------- between rounds


def test_moments_go_on_only_from_the_adapter_they_belong_to(tiny: ModelSource, data_files: list[Path]) -> None:
    config = run_config(tiny.name, "split.hosts=0")
    start = adapters.initial_adapter(tiny, config.lora.targets, config.lora.rank, 1)
    with memory_fleet(tiny, config, data_files[:1]) as fleet:
        first = fleet.run(start, 2)
        between = joined(first)
        warm = fleet.run(between, 2, step_offset=2, send_to=[])
        check_done(first | warm)
        cold = fleet.run(between, 2, step_offset=2)
    assert [r["device-1"].moments for r in (first, warm, cold)] == ["cold", "warm", "cold"]
    with memory_fleet(tiny, config, data_files[:1]) as fleet:
        at_once = fleet.run(start, 4)
    assert same_bits(joined(warm), joined(at_once))
    assert not same_bits(joined(cold), joined(at_once))
