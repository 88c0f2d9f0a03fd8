"""States of frozen fronts that a host keeps: the bits are those of sending them every time, whatever the host has kept."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from edgelam_fl.config import RunConfig
from edgelam_fl.model.adapter import Adapter, initial_adapter, initial_cut
from edgelam_fl.model.source import ModelSource
from edgelam_fl.node.front_cache import RunFronts
from edgelam_fl.node.play import NodeHooks
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.tasks.base import Unit
from edgelam_fl.wire import edgelam_pb2 as pb
from tests.fleet import (
    Fleet,
    check_done,
    device_batches,
    joined,
    memory_fleet,
    plain_adapter,
    plain_loss,
    plain_model,
    plain_optimizer,
    same_bits,
)
from tests.support import run_config

EXAMPLES, STEPS = (9, 14), 2  # 8 and 12 of them to train on: with 4 a step, an epoch of the first device is a round
FULL = {"edge-1": NodeHooks(disk_free=lambda folder: 0)}  # a host whose disk takes nothing


def config_of(tiny: ModelSource, *settings: str) -> RunConfig:
    return run_config(tiny.name, "wire.front_cache_mb=1", 'lora.train=["hosts", "back"]', *settings)


@pytest.fixture(scope="module")
def files(data_files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The first examples of two devices."""
    folder, made = tmp_path_factory.mktemp("few"), []
    for number, (file, count) in enumerate(zip(data_files, EXAMPLES, strict=False), 1):
        made.append(folder / f"device-{number}.jsonl")
        made[-1].write_text("".join(file.read_text().splitlines(keepends=True)[:count]))
    return made


def two_rounds(fleet: Fleet, start: Adapter, between: str = "") -> tuple[Adapter, list[dict[str, pb.JobReport]]]:
    """Trains two rounds with an evaluation before each. `between`: a node that is started again between them."""
    first = fleet.run(start, STEPS)
    check_done(first)
    if between:
        fleet.restart(between)
    second = fleet.run(start | joined(first), STEPS, step_offset=STEPS)
    check_done(second)
    return joined(second), [first, second]


def trained(
    tiny: ModelSource, config: RunConfig, files: Sequence[Path], state: Path | None = None, between: str = "",
    hooks: Mapping[str, NodeHooks] = {},
) -> tuple[Adapter, list[dict[str, pb.JobReport]]]:  # fmt: skip
    start, cut = initial_adapter(tiny, config.lora.targets, config.lora.rank, 1), RunSpec(config, tiny).cut
    start |= initial_cut(tiny, cut, 1) if cut else {}
    with memory_fleet(tiny, config, files, hooks, state=state) as fleet:
        return two_rounds(fleet, start, between)


def sent_bytes(report: pb.JobReport, kind: str, link: str = "entry edge-1") -> int:
    """Counts the payload bytes of a kind that a device has sent over a link in a round."""
    return sum(one.payload_bytes for one in report.bytes if (one.link, one.direction, one.kind) == (link, "sent", kind))


class PassThrough(nn.Module):
    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states


class FrontAlone:
    """The plain model, with its first layers computed for each example alone."""

    def __init__(self, source: ModelSource, config: RunConfig, start: Adapter) -> None:
        self.below, self.model = plain_model(source, config, start), plain_model(source, config, start)
        self._front = config.split.front
        for number in range(self._front):
            self.model.base_model.model.model.layers[number] = PassThrough()

    @torch.no_grad()
    def states(self, unit: Unit) -> torch.Tensor:
        rows, tokens = unit.shape
        width = self.model.config.hidden_size
        states_BTD = torch.zeros(rows, tokens, width)
        for row, length in enumerate(unit.row_lengths):
            below = self.below(
                input_ids=unit.inputs[row : row + 1, :length], output_hidden_states=True, use_cache=False
            )
            states_BTD[row, :length] = below.hidden_states[self._front][0]
        return states_BTD

    def logits(self, _: Any, unit: Unit) -> torch.Tensor:
        tokens = unit.shape[1]
        mask = (torch.arange(tokens)[None, :] < torch.tensor(unit.row_lengths)[:, None]).long()
        return self.model(inputs_embeds=self.states(unit), attention_mask=mask, use_cache=False).logits

    def train(self, config: RunConfig, steps: Sequence[Sequence[Unit]]) -> Adapter:
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(".lora_" in name)
        optimizer = plain_optimizer([p for p in self.model.parameters() if p.requires_grad], config)
        for units in steps:
            labels = sum(unit.count for unit in units)
            for unit in units:
                (plain_loss(self.model, unit, config.task.label_smoothing, self.logits) / labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        return plain_adapter(self.model)


@pytest.mark.parametrize("settings", [["split.back=2"], ["split.back=0"], ["split.back=0", "split.hosts=2"]])
def test_a_front_that_hosts_keep_trains_like_a_plain_loop_with_the_front_alone(
    tiny: ModelSource, files: list[Path], settings: list[str]
) -> None:
    config = config_of(tiny, *settings)
    start = initial_adapter(tiny, config.lora.targets, config.lora.rank, 1)
    plain = FrontAlone(tiny, config, start)
    expected = plain.train(config, device_batches(tiny, config, files[0], "device-1", STEPS))
    with memory_fleet(tiny, config, files[:1]) as fleet:
        reports = fleet.run(start, STEPS)
    check_done(reports)
    got = joined(reports)
    assert got
    assert same_bits(got, {name: expected[name] for name in got})


def test_the_states_of_an_example_travel_once(tiny: ModelSource, files: list[Path]) -> None:
    _, (first, second) = trained(tiny, config_of(tiny), files)
    for device in ("device-1", "device-2"):
        assert sent_bytes(first[device], "ACT") > 0
    assert sent_bytes(second["device-1"], "ACT") == 0, "an epoch and the held-out examples were in round 1"
    assert 0 < sent_bytes(second["device-2"], "ACT") < sent_bytes(first["device-2"], "ACT"), "it has more examples"


@pytest.fixture(scope="module")
def undisturbed(tiny: ModelSource, files: list[Path]) -> tuple[Adapter, list[dict[str, pb.JobReport]]]:
    return trained(tiny, config_of(tiny), files[:1])


@pytest.mark.parametrize("what", ["a full disk", "a restarted host", "a restarted device"])
def test_a_host_that_has_kept_nothing_gets_the_states_in_the_same_step(
    tiny: ModelSource,
    files: list[Path],
    undisturbed: tuple[Adapter, list[dict[str, pb.JobReport]]],
    tmp_path: Path,
    what: str,
) -> None:
    between = {"a restarted host": "edge-1", "a restarted device": "device-1"}.get(what, "")
    hooks = FULL if what == "a full disk" else {}
    expected, (once, again) = undisturbed
    got, (first, second) = trained(tiny, config_of(tiny), files[:1], tmp_path, between, hooks)
    assert same_bits(got, expected)
    assert first["device-1"].eval_loss_sum == once["device-1"].eval_loss_sum
    assert sent_bytes(again["device-1"], "ACT") == 0
    assert sent_bytes(second["device-1"], "ACT") >= sent_bytes(once["device-1"], "ACT"), "all comes again"


@pytest.mark.parametrize(
    "settings",
    [
        ["split.labels=last-stage", "split.back=0"],
        ["wire.gradients=lowrank", 'lora.train=["back"]'],
        ["split.front=0"],
        ["wire.activation_codec=int4", "wire.gradient_codec=int8"],
    ],
    ids=["last-stage", "lowrank", "embedding", "codecs"],
)
def test_kept_states_change_no_bit_of_other_ways_over_the_route(
    tiny: ModelSource, files: list[Path], settings: list[str]
) -> None:
    config = config_of(tiny, *settings)
    (kept, (_, second)), (not_kept, _) = (trained(tiny, config, files[:1], hooks=hooks) for hooks in ({}, FULL))
    assert same_bits(kept, not_kept)
    assert sent_bytes(second["device-1"], "ACT") == 0


def test_gradients_are_summed_in_one_order_whatever_the_host_has_lost(
    tiny: ModelSource, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A micro-batch whose states are asked for again is not overtaken by those after it."""
    config = config_of(tiny, "split.micro_batches=4", "split.window=4", "federation.batch_size=4")
    expected, _ = trained(tiny, config, files[:1])
    find, asked = RunFronts.find, [0, 0]

    def forgets(fronts: RunFronts, *which: Any) -> torch.Tensor | None:
        found = find(fronts, *which)
        asked[0] += 1
        if asked[0] % 4 in (1, 2):  # of two, because the order of two numbers does not change their sum
            asked[1] += found is not None
            time.sleep(0.1)  # meanwhile the device sends those after it
            return None
        return found

    monkeypatch.setattr(RunFronts, "find", forgets)
    got, _ = trained(tiny, config, files[:1])
    assert asked[1], "nothing was asked for again"
    assert same_bits(got, expected)
