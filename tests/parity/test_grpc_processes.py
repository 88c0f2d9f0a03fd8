"""Split equals whole, to the bit: stage-host daemons in processes of their own, over real gRPC, against peft alone."""

from __future__ import annotations

import math
import queue
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from benchmarks.hostile import dishonest, filled, on
from edgelam_fl.config import RunConfig
from edgelam_fl.model.adapter import Adapter, digest, initial_adapter, slice_of, to_bytes
from edgelam_fl.model.index import layer_number
from edgelam_fl.model.source import ModelSource
from edgelam_fl.model.stage import LoraSettings, load_stages
from edgelam_fl.node.examples import DeviceExamples
from edgelam_fl.node.service import StageHost
from edgelam_fl.plan.making import RoundFacts
from edgelam_fl.plan.reading import job_id, part_id, spans_of
from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.counters import ByteCounters
from edgelam_fl.wire.grpc.dial import dial
from edgelam_fl.wire.link import Frame
from tests.fleet import (
    Fleet,
    check_done,
    device_batches,
    forward,
    joined,
    plain_adapter,
    plain_evaluation,
    plain_model,
    plain_training,
    relative_distance,
    same_bits,
    union_batches,
)
from tests.links import make_terms
from tests.parity.daemons import Daemon
from tests.support import run_config

pytestmark = pytest.mark.processes

STEPS = 5  # each device begins its data for the second time
REAL_STEPS = 3  # of SmolLM2


def fleet_of(
    daemons: dict[str, Daemon], name: str, source: ModelSource, config: RunConfig, devices: int
) -> tuple[Fleet, Adapter]:
    """Returns a fleet of some of the daemons, under a job name of its own, and the adapter to start from."""
    chosen = {f"device-{number}": daemons[f"device-{number}"] for number in range(1, devices + 1)}
    names = [f"edge-{number}" for number in range(1, config.split.least_hosts + 1)]
    hosts: dict = {name: (daemons[name], daemons[name].address()) for name in names}
    fleet = Fleet(source, config, dict(chosen), hosts, name)
    return fleet, initial_adapter(source, config.lora.targets, config.lora.rank, config.run.seed)


def one_device_against_the_plain_loop(
    daemons: dict[str, Daemon], name: str, source: ModelSource, config: RunConfig, file: Path,
    steps: int = STEPS,
) -> None:  # fmt: skip
    fleet, start = fleet_of(daemons, name, source, config, 1)
    with ThreadPoolExecutor(1) as beside:  # the daemons train while this process computes the reference
        running = beside.submit(fleet.run, start, steps)
        model = plain_model(source, config, start)
        expected_loss = plain_evaluation(model, source, config, file)
        plain_training(model, config, [[units] for units in device_batches(source, config, file, "device-1", steps)])
        reports = running.result()
    check_done(reports)
    trained = plain_adapter(model)
    assert reports["device-1"].eval_loss_sum == expected_loss
    assert same_bits(joined(reports), trained)
    assert not same_bits(trained, start)

    # What was trained is also what the next round measures, to the bit.
    measured = fleet.run(trained, 0, step_offset=steps, send_to=[])
    check_done(measured)
    assert measured["device-1"].eval_loss_sum == plain_evaluation(model, source, config, file)


@pytest.mark.parametrize("base", ["fp32", "bf16"])
def test_one_device_trains_like_the_plain_loop(
    daemons: dict[str, Daemon], tiny: ModelSource, data_files: list[Path], base: str
) -> None:
    config = run_config(tiny.name, f"model.base={base}")
    steps = {"fp32": STEPS, "bf16": 4}[base]  # the CPU computes bf16 slowly
    one_device_against_the_plain_loop(daemons, f"tiny-{base}", tiny, config, data_files[0], steps)


def test_one_device_over_two_hosts_trains_like_the_plain_loop(
    daemons: dict[str, Daemon], tiny: ModelSource, data_files: list[Path]
) -> None:
    config = run_config(tiny.name, "split.hosts=2", "split.cuts=[4]", "split.back=1")
    one_device_against_the_plain_loop(daemons, "chain", tiny, config, data_files[0])


@pytest.mark.parametrize(
    ("name", "base"),
    [("tiny", "fp32"), ("tiny", "bf16"), pytest.param("smollm", "fp32", marks=pytest.mark.real_model)],
)
def test_logits_over_a_host_process_are_the_models(
    daemons: dict[str, Daemon], name: str, base: str, data_files: list[Path], request: pytest.FixtureRequest
) -> None:
    """This process plays the device's ends by hand: front, one ACT over gRPC to the host's process and back, head."""
    source: ModelSource = request.getfixturevalue(name)
    config = run_config(source.name, f"model.base={base}", "task.max_tokens=64")
    start = initial_adapter(source, config.lora.targets, config.lora.rank, 7)
    start = {name: array + 0.01 for name, array in start.items()}  # a B of zeros would hide the adapter
    fleet, _ = fleet_of(daemons, f"logits-{name}-{base}", source, config, 1)
    plans = fleet.plans(RoundFacts(fleet.name, 1, 1, 0, 0))
    plan, (route,) = plans["edge-1"], plans["device-1"].routes
    tensors = slice_of(start, spans_of(plan))
    plan.adapter_digest = digest(tensors)
    assert daemons["edge-1"].submit(pb.SubmitRequest(plan=plan, adapter=to_bytes(tensors))).accepted

    lora = LoraSettings(config.lora.rank, config.lora.alpha, config.lora.targets)
    front, back = load_stages(source, spans_of(plans["device-1"]), base, lora)
    arrived: queue.Queue[Frame] = queue.Queue()
    terms = make_terms(on_frame=lambda link, frame: arrived.put(frame), most_bytes=1 << 24)
    links = []
    for side in (pb.ENTRY, pb.EXIT):
        hello = pb.Hello(
            version=PROTOCOL_VERSION, job=job_id(plan), node="device-1", link=side, route_token=route.token,
            model_digest=source.digest, window=1, codecs=["raw"],
        )  # fmt: skip
        links.append(
            dial(
                route.hops[0].node,
                route.hops[0].address,
                "by hand",
                hello,
                ByteCounters(),
                terms,
                plan.deadlines.ready_s,
            )
        )
    unit = device_batches(source, config, data_files[2], "device-1", 1)[0][1]
    with torch.no_grad():
        for stage in (front, back):
            stage.load_adapter(start)
        hidden = front(unit.inputs, unit.row_lengths)
        links[0].send(pb.Header(kind=pb.ACT, phase=pb.EVAL, row_lengths=unit.row_lengths), hidden)
        frame = arrived.get(timeout=60)
        logits = back(frame.tensor, unit.row_lengths)
        expected = forward(plain_model(source, config, start), unit)
    for link in links:
        link.send(pb.Header(kind=pb.DONE, done=pb.Done()))
        link.close()
    assert daemons["edge-1"].wait(pb.WaitRequest(job=part_id(plan), timeout_s=30)).state == "done"
    assert torch.equal(logits, expected)


def three_devices_against_the_plain_loop(
    daemons: dict[str, Daemon], name: str, source: ModelSource, config: RunConfig, files: list[Path],
    apart: float = 1e-5, steps: int = STEPS,
) -> None:  # fmt: skip
    """Trains bit for bit like the same pieces in device order, and within `apart` of the update over the union's one padded batch."""
    fleet, start = fleet_of(daemons, name, source, config, 3)
    devices = [device_batches(source, config, file, f"device-{n}", steps) for n, file in enumerate(files, 1)]
    reports = fleet.run(start, steps)
    check_done(reports)
    got = joined(reports)
    middle = range(config.split.front, source.num_layers - config.split.back)
    assert {layer_number(name) for name in got} == set(middle)

    def reference(batches: list) -> Adapter:
        model = plain_model(source, config, start)
        plain_training(model, config, batches, learns=lambda name: layer_number(name) in middle)
        return {name: array for name, array in plain_adapter(model).items() if name in got}

    assert same_bits(got, reference(list(zip(*devices, strict=True))))
    assert relative_distance(got, reference(union_batches(devices)), start) < apart


FROZEN_ENDS = ("lora.train=hosts", "federation.min_nodes=3")
SHORT = ("task.template=plain", "task.max_tokens=32", "federation.batch_size=2")


def test_three_devices_with_frozen_ends_train_like_the_plain_loop(
    daemons: dict[str, Daemon], tiny: ModelSource, data_files: list[Path]
) -> None:
    three_devices_against_the_plain_loop(daemons, "joint", tiny, run_config(tiny.name, *FROZEN_ENDS), data_files)


@pytest.mark.real_model
def test_smollm2_trains_like_the_plain_loop(
    daemons: dict[str, Daemon], smollm: ModelSource, data_files: list[Path]
) -> None:
    """The short form; `python -m benchmarks.exactness` does the same in bf16, with three devices, and for 20 steps."""
    config = run_config(smollm.name, *SHORT)
    one_device_against_the_plain_loop(daemons, "smollm2", smollm, config, data_files[0], REAL_STEPS)


def test_s7_s8_a_dishonest_device_costs_nobody_else_anything_over_grpc(
    daemons: dict[str, Daemon], tiny: ModelSource, data_files: list[Path]
) -> None:
    """The third device is in this process, and changes its frames: a gradient of NaN, then a micro-batch that nobody announced."""
    for change, reason in (
        (on(pb.GRAD, filled(math.nan)), "left out of 3 steps in a row: a gradient that is not finite"),
        (on(pb.ACT, micro_batch=9), "broke the protocol: micro-batch 9 of step 0 came twice, or was not announced"),
    ):
        config = run_config(str(tiny.folder))
        fleet, start = fleet_of(daemons, f"dishonest-{reason[:4]}", tiny, config, 3)
        bad = StageHost("device-3", dishonest(dial, change), lambda event: None, examples=DeviceExamples(data_files[2]))
        fleet.devices["device-3"] = bad
        reports = fleet.run(start, 4)
        bad.stop()
        assert [(left.device, left.reason, left.out) for left in reports["edge-1"].host.left_out] == [
            ("device-3", reason, True)
        ]
        for name in ("edge-1", "device-1", "device-2"):
            assert reports[name].state == "done", reports[name].error
            assert all(step.counted for step in reports[name].steps)
