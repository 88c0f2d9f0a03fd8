"""One device of three changes its frames: nobody else pays for it, and the host names it. Over links in memory, one over gRPC.

Each attack runs through the same body, which knows only what must hold for the others.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.data.wordnet import SAMPLE
from benchmarks.dishonest import BAD as DISHONEST
from benchmarks.dishonest import Way, dealt, honest, play, way
from benchmarks.hostile import Change, both, dishonest, filled, on, with_a_dishonest_host
from edgelam_fl.model import adapter as adapters
from edgelam_fl.model.adapter import initial_adapter
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.telemetry.events import LinkLost, of_kind
from edgelam_fl.wire import edgelam_pb2 as pb
from tests.fleet import memory_fleet
from tests.support import run_config, write_tiny_llama

STEPS, BAD, HONEST = 4, "device-3", ("device-1", "device-2")
LAST_STAGE, GLOBAL, COPIES = "split.labels=last-stage", "optimizer.clip=global", "split.host_mode=copies"
INF, NAN = math.inf, math.nan
A_LAYER_EACH = ("split.front=1", "split.back=1")  # of a model of three


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """A random Llama of three layers: device, host and device hold one each."""
    return find_model(str(write_tiny_llama(tmp_path_factory.mktemp("small-llama"), layers=3)))


@dataclass(frozen=True)
class Attack:
    """What the device changes, and the word that the host must say about it; empty: the change harms nobody."""

    change: Change
    reason: str
    settings: tuple[str, ...] = ()


def table(**fields: int) -> Change:
    def change(header: pb.Header, tensor: torch.Tensor | None) -> tuple[pb.Header, torch.Tensor | None]:
        for row in header.table.steps:
            for name, value in fields.items():
                setattr(row, name, value)
        return header, tensor

    return change


def norm(value: float, finite: bool = True) -> Change:
    def change(header: pb.Header, tensor: torch.Tensor | None) -> tuple[pb.Header, torch.Tensor | None]:
        if header.kind == pb.STEP_READY:
            header.step_ready.squared_norm, header.step_ready.finite = value, finite
        return header, tensor

    return change


def of_a_host(header: pb.Header, tensor: torch.Tensor | None) -> tuple[pb.Header, torch.Tensor | None]:
    """A norm that pretends to come from the host before: sent with every gradient, on the entry link too."""
    if header.kind != pb.ACT or header.phase != pb.TRAIN:
        return header, tensor
    return pb.Header(kind=pb.STEP_READY, phase=pb.TRAIN, step_ready=pb.StepReady(squared_norm=1e30, finite=True)), None


def one_token_rows(header: pb.Header, tensor: torch.Tensor | None) -> tuple[pb.Header, torch.Tensor | None]:
    if header.kind == pb.ACT and header.phase == pb.TRAIN:
        header.row_lengths[:] = [1] * len(header.row_lengths)
    return header, tensor


NAN_BUT_GRADIENT = both(on(pb.ACT, filled(NAN)), on(pb.GRAD, filled(1.0)))
OVERFLOW, TOO_LARGE = "not finite", "a gradient of"
S7 = {
    "act_nan": Attack(on(pb.ACT, filled(NAN)), OVERFLOW),
    "act_nan_and_grad_one": Attack(NAN_BUT_GRADIENT, OVERFLOW),
    "act_inf": Attack(on(pb.ACT, filled(INF)), OVERFLOW),
    "act_huge": Attack(on(pb.ACT, filled(3e38)), OVERFLOW),
    "grad_nan": Attack(on(pb.GRAD, filled(NAN)), OVERFLOW),
    "grad_huge": Attack(on(pb.GRAD, filled(1e38)), OVERFLOW),
    "grad_1e6": Attack(on(pb.GRAD, filled(1e6)), TOO_LARGE),
    "grad_500_times": Attack(on(pb.GRAD, lambda tensor: 500 * tensor), "times the median of 3 devices"),
    "grad_flipped": Attack(on(pb.GRAD, torch.neg), "against the direction in which the others agree"),
}
S8 = {
    "labels_beyond_the_vocabulary": Attack(on(pb.LABELS, filled(10**9)), "broke the protocol: labels", (LAST_STAGE,)),
    "labels_negative": Attack(on(pb.LABELS, filled(-5)), "broke the protocol: labels", (LAST_STAGE,)),
    "labels_of_one_side": Attack(on(pb.LABELS, lambda t: t[:, 0]), "broke the protocol: labels", (LAST_STAGE,)),
    "labels_one_shorter": Attack(on(pb.LABELS, lambda t: t[:, :-1]), "broke the protocol: labels", (LAST_STAGE,)),
    "labels_of_no_position": Attack(on(pb.LABELS, filled(-100)), "", (LAST_STAGE,)),
    "norm_nan": Attack(norm(NAN), "broke the protocol: a squared norm of nan", (GLOBAL,)),
    "norm_infinite": Attack(norm(INF), "broke the protocol: a squared norm of inf", (GLOBAL,)),
    "norm_negative": Attack(norm(-1e30), "broke the protocol: a squared norm of -1e+30", (GLOBAL,)),
    "norm_huge": Attack(norm(1e300), "in its own layers a gradient of norm", (GLOBAL,)),
    "norm_not_finite": Attack(norm(0.0, False), "in its own layers a gradient that is not finite", (GLOBAL,)),
    "norm_of_a_host": Attack(of_a_host, "broke the protocol: a norm of host", (GLOBAL,)),
    "table_of_too_many_labels": Attack(table(labels=4 * 128), "broke the protocol: a TABLE row"),
    "table_of_no_labels": Attack(table(labels=0), "broke the protocol: a TABLE row"),
    "table_of_one_label": Attack(table(labels=1), ""),
    "phase_unknown": Attack(on(pb.ACT, phase=7), "broke the protocol: a micro-batch of step"),
    "step_beyond_the_plan": Attack(on(pb.ACT, step=2**31), "broke the protocol: a micro-batch of step"),
    "micro_batch_twice": Attack(on(pb.ACT, micro_batch=0), "broke the protocol: micro-batch 0"),
    "micro_batch_unknown": Attack(on(pb.ACT, micro_batch=9), "broke the protocol: micro-batch 9"),
    "hidden_states_of_one_row": Attack(on(pb.ACT, lambda t: t[:1]), "broke the protocol: row lengths"),
    "hidden_states_one_shorter": Attack(on(pb.ACT, lambda t: t[:, :-1]), "broke the protocol"),
    "hidden_states_flat": Attack(on(pb.ACT, lambda t: t[0]), "broke the protocol: hidden states must be"),
    "gradient_one_shorter": Attack(on(pb.GRAD, lambda t: t[:, :-1]), "another shape"),
    "gradient_of_an_unknown_micro_batch": Attack(on(pb.GRAD, micro_batch=9), "gradient of micro-batch 9"),
    "row_lengths_of_one": Attack(one_token_rows, ""),
}


def check_attack(source: ModelSource, data: list[Path], attack: Attack, *overrides: str) -> None:
    """Plays a round with the attack: the host goes on, its adapter is sound, the others miss no step, the device is named."""
    settings = (*A_LAYER_EACH, "federation.step_deadline_s=60", *attack.settings, *overrides)
    config = run_config(str(source.folder), *settings)
    start = initial_adapter(source, config.lora.targets, config.lora.rank, 1)
    dials = {BAD: lambda dial: dishonest(dial, attack.change)}
    with memory_fleet(source, config, data, dials=dials) as fleet:
        reports = fleet.run(start, STEPS)
        dismissed = [event for event in of_kind(fleet.events, LinkLost) if event.link == BAD]
    edge = reports["edge-1"]
    assert edge.state == "done", edge.error
    for report in (edge, *(reports[name] for name in HONEST)):
        for contribution in report.contributions:
            if contribution.source != BAD:
                assert moved(start, adapters.from_bytes(contribution.adapter)) < 0.5, report.node
    for name in HONEST:
        assert reports[name].state == "done", reports[name].error
        assert [step.counted for step in reports[name].steps] == [True] * STEPS
    named = {left.device: left for left in edge.host.left_out}
    if not attack.reason:
        assert not named
        return
    assert set(named) == {BAD}
    assert attack.reason in named[BAD].reason
    if named[BAD].out:
        assert dismissed[0].reason == named[BAD].reason


def moved(start: adapters.Adapter, end: adapters.Adapter) -> float:
    """Returns the largest change of any value; infinite if a value is not finite."""
    if not all(np.isfinite(array).all() for array in end.values()):
        return INF
    return max(float(np.abs(array - start[name]).max()) for name, array in end.items())


@pytest.mark.parametrize("attack", S7.values(), ids=S7)
def test_s7_no_number_of_a_device_spoils_the_joint_adapter(
    small: ModelSource, data_files: list[Path], attack: Attack
) -> None:
    check_attack(small, data_files, attack)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("clip", ["none", "stage", "global"])
@pytest.mark.parametrize("mode", ["joint", "sequential", "copies"])
def test_s7_in_every_mode_with_every_clip_and_optimizer(
    small: ModelSource, data_files: list[Path], mode: str, clip: str, optimizer: str
) -> None:
    settings = (f"split.host_mode={mode}", f"optimizer.clip={clip}", f"optimizer.name={optimizer}")
    check_attack(small, data_files, S7["grad_1e6"], *settings)


@pytest.mark.parametrize("attack", S8.values(), ids=S8)
def test_s8_no_frame_of_a_device_ends_the_job_of_all(
    small: ModelSource, data_files: list[Path], attack: Attack
) -> None:
    check_attack(small, data_files, attack)


@pytest.mark.parametrize(
    "chosen", [way("sign-flipped", 0), Way("not finite", "update of nan", honest, update=NAN)], ids=lambda one: one.kind
)
def test_s7_who_is_found_out_late_costs_the_others_a_round_and_nothing_else(tmp_path: Path, chosen: Way) -> None:
    """Hosts learned from it before; the round is done again, and ends as if it had never been there."""
    rows = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()[:120]]
    data = dealt(rows, tmp_path / "data", 0)
    source = find_model(str(write_tiny_llama(tmp_path / "model", layers=4)))
    settings = ("federation.rounds=1", "federation.local_steps=4")
    others = {name: path for name, path in data.items() if name != DISHONEST}
    alone = play(source, others, tmp_path / "alone", None, settings)
    attacked = play(source, data, tmp_path / "attacked", chosen, settings)
    assert attacked.perplexity == pytest.approx(
        alone.perplexity, rel=1e-3
    )  # a gradient over other counts rounds otherwise
    assert (attacked.named, alone.named) == ({DISHONEST}, set())


@pytest.mark.parametrize(("kind", "value"), [(pb.GRAD, NAN), (pb.ACT, INF)], ids=["gradient", "hidden states"])
def test_s19_a_device_says_which_host_sent_what_is_not_finite(
    small: ModelSource, data_files: list[Path], kind: int, value: float
) -> None:
    config = run_config(str(small.folder), *A_LAYER_EACH)
    start = initial_adapter(small, config.lora.targets, config.lora.rank, 1)
    dials = {BAD: lambda dial: with_a_dishonest_host(dial, on(kind, filled(value)))}
    with memory_fleet(small, config, data_files, dials=dials) as fleet:
        report = fleet.run(start, STEPS)[BAD]
    assert report.error == "host edge-1 sent values that are not finite, in step 0"
    assert not report.contributions


def test_s19_a_finite_gradient_of_a_host_that_overflows_leaves_the_own_layers_as_they_are(
    small: ModelSource, data_files: list[Path]
) -> None:
    config = run_config(str(small.folder), *A_LAYER_EACH)
    start = initial_adapter(small, config.lora.targets, config.lora.rank, 1)
    dials = {BAD: lambda dial: with_a_dishonest_host(dial, on(pb.GRAD, filled(3e38)))}
    with memory_fleet(small, config, data_files, dials=dials) as fleet:
        report = fleet.run(start, STEPS)[BAD]
    reason = "the gradient of its own layers is not finite, after what edge-1 sent"
    assert [(step.counted, step.reason) for step in report.steps] == [(False, reason)] * STEPS
    assert all(moved(start, adapters.from_bytes(one.adapter)) == 0 for one in report.contributions)
