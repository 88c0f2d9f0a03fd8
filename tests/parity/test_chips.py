"""A node on an accelerator trains, measures and answers as one on the CPU: on each chip that is here, and on a pretended one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from edgelam_fl.config import ModelSection, TaskSection
from edgelam_fl.model.adapter import Span, initial_adapter
from edgelam_fl.model.chip import CPU, chips_here, deterministic_kernels, off
from edgelam_fl.model.source import ModelSource
from edgelam_fl.model.stage import load_stages
from edgelam_fl.model.weights import read_tensors
from edgelam_fl.node.play import NodeHooks
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.serving.generate import LocalSpeaker
from server.global_adapter import first_adapter
from tests.fleet import check_done, joined, memory_fleet, relative_distance, same_bits
from tests.pretended_chip import CHIP
from tests.support import run_config

CHIPS = [CHIP, *(chip for chip in chips_here() if chip != CPU)]
STEPS = 2


@pytest.fixture(autouse=True)
def _same_bits_each_time() -> Iterator[None]:
    """Fused attention is also another one on each chip, with bits of its own."""
    with deterministic_kernels():
        yield


def _copied(source: ModelSource, names: list[str], base: str, compute: str) -> Iterable[tuple[str, torch.Tensor]]:
    """Reads weights to where torch puts tensors: a product's bits may depend on how a file aligns them."""
    return ((name, tensor.clone()) for name, tensor in read_tensors(source, names, base, compute))


HOOKS = NodeHooks(load=partial(load_stages, read=_copied))


@pytest.mark.parametrize("chip", CHIPS, ids=str)
@pytest.mark.parametrize("base", ["fp32", "nf4"])
def test_training_on_a_chip_is_that_on_the_cpu(
    tiny: ModelSource, data_files: list[Path], chip: torch.device, base: str
) -> None:
    settings = ["split.hosts=1", "split.front=1", "lora.dropout=0.1", "optimizer.name=sgd", "optimizer.lr=0.5"]
    config = run_config(tiny.name, f"model.base={base}", *settings)
    start = initial_adapter(tiny, config.lora.targets, config.lora.rank, 1)
    nodes = ("edge-1", "device-1", "device-2")
    found = []
    for everywhere in (CPU, chip):
        with memory_fleet(
            tiny, config, data_files[:2], dict.fromkeys(nodes, HOOKS), chips=dict.fromkeys(nodes, everywhere)
        ) as fleet:
            reports = fleet.run(start, STEPS)
        check_done(reports)
        found.append((joined(reports), reports["device-1"].eval_loss_sum))
    (on_cpu, loss_cpu), (on_chip, loss_chip) = found
    assert relative_distance(on_chip, on_cpu, start) < 0.01  # other kernels add in another order
    assert loss_chip == pytest.approx(loss_cpu, rel=1e-3)


@pytest.mark.parametrize("chip", CHIPS, ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        [
            "split.hosts=2", "split.labels=last-stage", "split.back=0", "optimizer.clip=global", "split.checkpointing=true",
            "lora.use_dora=true", "lora.modules_to_save=norm", "lora.dropout=0.1",
        ],
        ["split.hosts=1", "split.host_mode=copies", "optimizer.name=sgd", "privacy.disguise=0.1", "privacy.cut_clip=2"],
    ],
    ids=["last-stage", "copies"],
)  # fmt: skip
def test_nothing_of_a_run_is_left_on_the_wrong_chip(
    tiny: ModelSource, data_files: list[Path], chip: torch.device, settings: list[str]
) -> None:
    """What draws secret random numbers, and so has no bits to compare, and the ways of a run that others do not take."""
    config = run_config(tiny.name, *settings)
    start = first_adapter(RunSpec(config, tiny))
    chips = dict.fromkeys(("edge-1", "edge-2", "device-1", "device-2"), chip)
    with memory_fleet(tiny, config, data_files[:2], chips=chips) as fleet:
        reports = fleet.run(start, STEPS)
        check_done(reports)
        again = fleet.run(start | joined(reports), STEPS)  # with moments, and tensors that are there already
    check_done(again)
    assert all(report.moments for report in again.values())
    assert not same_bits(joined(again), joined(reports))


@pytest.mark.parametrize("chip", CHIPS, ids=str)
def test_a_chat_on_a_chip_is_that_on_the_cpu(tiny: ModelSource, chip: torch.device) -> None:
    """The whole model, and a slice of it that keeps keys and values, token by token."""
    model, task = ModelSection(name=tiny.name), TaskSection()
    ids, logits, states = list(range(5, 12)), [], []
    for on in (CPU, chip):
        speaker, (stage,) = (
            LocalSpeaker(model, task, on),
            load_stages(tiny, [Span(0, 3, embed=True)], "fp32", None, chip=on),
        )
        cache = stage.new_cache()
        with torch.no_grad(), speaker.opened(tuned=False) as step:
            logits.append(torch.stack([step(ids, 0), step([3], len(ids))]))
            each = [stage(torch.tensor([new]), [len(new)], cache=cache) for new in (ids, [3])]
        states.append(off(torch.cat(each, dim=1)))
    assert logits[1].device == CPU
    assert torch.allclose(logits[1], logits[0], atol=1e-4)
    assert torch.allclose(states[1], states[0], atol=1e-4)
