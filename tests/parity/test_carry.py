"""Carry factors in the model: added to it exactly, and split equals unsplit with them as without."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from edgelam_fl.errors import ProtocolError
from edgelam_fl.model import adapter as adapters
from edgelam_fl.model.adapter import Adapter, Span, initial_adapter
from edgelam_fl.model.carry import CARRY_A, CARRY_B
from edgelam_fl.model.source import ModelSource
from edgelam_fl.model.stage import LoraSettings, Stage, load_stages
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.wire import edgelam_pb2 as pb
from server.global_adapter import as_start
from strategies.aggregation.error import aggregation_error
from strategies.aggregation.flora import FLoRA
from strategies.api import Contribution
from tests.fleet import Fleet, check_done, joined, memory_fleet, same_bits
from tests.results import trained_adapter, with_carry
from tests.support import run_config

THREE = [Span(0, 2, embed=True), Span(2, 4), Span(4, 6, head=True)]
WHOLE = Span(0, 6, embed=True, head=True)
IDS = torch.randint(2, 100, (2, 9), generator=torch.Generator().manual_seed(1))
LENGTHS = [9, 5]


def load(source: ModelSource, spans: list[Span], adapter: Adapter, base: str = "fp32", rank: int = 8) -> list[Stage]:
    kept, _, computed = base.partition(" ")
    lora = LoraSettings(rank, 16.0, ("q_proj", "v_proj"))
    stages = load_stages(source, spans, kept, lora, {"bf16": "bfloat16", "": ""}[computed])
    for stage in stages:
        stage.load_adapter(adapter)
    return stages


def through(stages: list[Stage]) -> torch.Tensor:
    inputs = IDS
    for stage in stages:
        inputs = stage(inputs, LENGTHS)
    return inputs


def added_to_the_base(source: ModelSource, adapter: Adapter, alpha: float = 16.0) -> Any:
    """transformers alone: every weight with s B A and the carry's product in it."""
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
    for name, a_RI in adapter.items():
        if name.endswith((".lora_A.weight", CARRY_A)):
            b_OR = adapter[name.replace("_A.weight", "_B.weight")]
            scale = 1.0 if name.endswith(CARRY_A) else alpha / len(a_RI)
            module = name.removeprefix(adapters.PREFIX).partition(".lora_")[0]
            product = torch.from_numpy(scale * b_OR.astype(np.float64) @ a_RI).float()
            model.get_submodule(module).weight.data.add_(product)
    return model.eval()


def plain_logits(model: Any) -> torch.Tensor:
    mask = (torch.arange(IDS.shape[1])[None] < torch.tensor(LENGTHS)[:, None]).long()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS, attention_mask=mask).logits
    return logits


def test_a_carry_is_part_of_every_weight(tiny: ModelSource) -> None:
    adapter = with_carry(trained_adapter(tiny), 3)
    (stage,) = load(tiny, [WHOLE], adapter)
    expected = plain_logits(added_to_the_base(tiny, adapter))
    got = through([stage]).detach()
    assert (got - expected).norm() < 1e-5 * expected.norm()
    stage.load_adapter(trained_adapter(tiny))
    assert torch.equal(through([stage]), through(load(tiny, [WHOLE], trained_adapter(tiny)))), "it is gone again"
    assert stage.carry() == {}


@pytest.mark.parametrize("base", ["fp32", "bf16", "int8", "int8 bf16", "nf4", "nf4 bf16"])
def test_three_slices_with_a_carry_are_the_whole(tiny: ModelSource, base: str) -> None:
    """Logits and gradients, recomputed or not."""
    adapter = with_carry(trained_adapter(tiny), 3)
    results = []
    for spans, recomputed in (([WHOLE], False), (THREE, False), (THREE, True)):
        stages = load(tiny, spans, adapter, base)
        for stage in stages:
            stage.set_checkpointing(recomputed)
        logits = through(stages)
        logits.float().square().sum().backward()
        grads = {name: p.grad.numpy() for stage in stages for name, p in stage.adapter_parameters.items()}
        results.append((logits, grads))
    without = through(load(tiny, [WHOLE], trained_adapter(tiny), base))
    assert not torch.equal(results[0][0], without)
    for logits, grads in results[1:]:
        assert torch.equal(logits, results[0][0])
        assert same_bits(grads, results[0][1])


def test_cached_generation_with_a_carry(tiny: ModelSource) -> None:
    stages = load(tiny, THREE, with_carry(trained_adapter(tiny), 3))
    row = IDS[:1]
    (whole,) = load(tiny, [WHOLE], with_carry(trained_adapter(tiny), 3))
    caches = [stage.new_cache() for stage in stages]
    with torch.no_grad():
        for first, last in ((0, 5), (5, 6), (6, 9)):
            hidden = row[:, first:last]
            for stage, cache in zip(stages, caches, strict=True):
                hidden = stage(hidden, [last - first], cache=cache)
        torch.testing.assert_close(hidden, whole(row, [9])[:, 6:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda a, b: (a, None), "expected A and B in float32"),
        (lambda a, b: (a.astype(np.float64), b), "expected A and B in float32"),
        (lambda a, b: (a[:, 1:], b), r"expected A \[rank, 64\] and B \[64, rank\], got \[3, 63\] and \[64, 3\]"),
        (lambda a, b: (a, b[:, 1:]), r"got \[3, 64\] and \[64, 2\]"),
        (lambda a, b: (a[:0], b[:, :0]), r"got \[0, 64\] and \[64, 0\]"),
    ],
)
def test_a_carry_that_does_not_fit_is_refused(tiny: ModelSource, spoil: Any, says: str) -> None:
    adapter = with_carry(trained_adapter(tiny), 3)
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    a_MI, b_OM = spoil(adapter[module + CARRY_A], adapter[module + CARRY_B])
    adapter |= {module + CARRY_A: a_MI}
    adapter = {**adapter, module + CARRY_B: b_OM} if b_OM is not None else _less(adapter, module + CARRY_B)
    with pytest.raises(ProtocolError, match=says):
        load(tiny, [WHOLE], adapter)


def _less(adapter: Adapter, name: str) -> Adapter:
    return {other: array for other, array in adapter.items() if other != name}


@pytest.mark.parametrize("base", ["fp32", "bf16", "nf4 bf16"])
def test_a_route_with_a_carry_equals_the_route_over_no_host(
    tiny: ModelSource, data_files: list[Path], base: str
) -> None:
    """Three rounds: a carry, another of more rank, and the same again, which is not sent a second time."""
    results = []
    kept, _, computed = base.partition(" ")
    for hosts in (0, 2):
        config = run_config(
            tiny.name, f"model.base={kept}", f"model.compute={computed or 'auto'}", f"split.hosts={hosts}"
        )
        start = initial_adapter(tiny, config.lora.targets, config.lora.rank, 1)
        with memory_fleet(tiny, config, data_files[:1]) as fleet:
            first = ran(fleet, with_carry(start, 2), 0)
            second = ran(fleet, with_carry(joined(first), 5), 3)
            third = ran(fleet, with_carry(joined(second), 5), 6, send_to=[])
        assert third["device-1"].moments == "warm"
        assert set(joined(third)) == set(start), "a carry is not trained, and not contributed"
        results.append((joined(third), third["device-1"].eval_loss_sum))
    assert same_bits(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def ran(fleet: Fleet, adapter: Adapter, offset: int, **options: Any) -> dict[str, pb.JobReport]:
    reports = fleet.run(adapter, 3, step_offset=offset, **options)
    check_done(reports)
    return reports


def test_the_carry_of_a_run_that_is_over_is_forgotten(tiny: ModelSource, data_files: list[Path]) -> None:
    config = run_config(tiny.name, "split.hosts=1")
    start = initial_adapter(tiny, config.lora.targets, config.lora.rank, 1)
    losses = []
    with memory_fleet(tiny, config, data_files[:1]) as fleet:
        for adapter in (start, with_carry(start, 2), start):
            losses.append(ran(fleet, adapter, 0)["device-1"].eval_loss_sum)
    assert losses[0] == losses[2] != losses[1]


def test_flora_over_a_host_is_flora_without_one(tiny: ModelSource, data_files: list[Path]) -> None:
    """Two devices with copies on a host; the second round starts from what the first one stacked."""
    results = []
    for hosts in (0, 1):
        config = run_config(tiny.name, f"split.hosts={hosts}", "split.host_mode=copies")
        current: Adapter = initial_adapter(tiny, config.lora.targets, config.lora.rank, 1)
        with memory_fleet(tiny, config, data_files[:2]) as fleet:
            for number in (1, 2):
                reports = ran(fleet, current, 3 * number)
                given = contributions(reports, config.lora.alpha / config.lora.rank)
                seen = as_start(current, RunSpec(config, tiny), number)
                result = FLoRA().aggregate(given, seen)
                error = aggregation_error(given, {**result.tensors, **result.carry}, seen)
                assert error == pytest.approx(0, abs=1e-5)
                expected = of_the_mean(current, given)
                current = {**current, **result.tensors, **result.carry}
        assert {len(array) for name, array in current.items() if name.endswith(CARRY_A)} == {2 * (8 + 8)}
        logits = through(load(tiny, [WHOLE], current)).detach()
        wanted = plain_logits(added_to_the_base(tiny, expected, alpha=1.0))
        assert (logits - wanted).norm() < 1e-5 * wanted.norm()
        results.append(current)
    assert same_bits(*results)


def contributions(reports: Mapping[str, pb.JobReport], scale: float) -> list[Contribution]:
    """A device's ends and its copy on the host, as one source."""
    tensors: dict[str, Adapter] = {}
    weights: dict[str, float] = {}
    for report in reports.values():
        for part in report.contributions:
            tensors.setdefault(part.source, {}).update(adapters.from_bytes(part.adapter))
            weights[part.source] = part.weight
    modules = {name.rpartition(".lora_")[0] for found in tensors.values() for name in found}
    return [Contribution(source, weights[source], tensors[source], dict.fromkeys(modules, scale)) for source in tensors]


def of_the_mean(current: Adapter, given: list[Contribution]) -> Adapter:
    """The round's carry, and beside it sum_k p_k s_k B_k A_k, dense: factors whose A is the identity, scaled by 1 / rank."""
    total, found = sum(one.weight for one in given), {name: a for name, a in current.items() if "carry" in name}
    for module, scale in given[0].scales.items():
        a, b = module + ".lora_A.weight", module + ".lora_B.weight"
        mean = sum(one.weight / total * scale * one.tensors[b].astype(np.float64) @ one.tensors[a] for one in given)
        width = mean.shape[1]
        found[a], found[b] = np.eye(width), width * mean
    return found
