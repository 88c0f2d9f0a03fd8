"""The kinds of LoRA that peft knows, in slices: rsLoRA, DoRA, patterns, some layers alone, modules that learn as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from edgelam_fl.bounds import DEFAULT_BOUNDS
from edgelam_fl.config import RunConfig
from edgelam_fl.model.adapter import Adapter, Span, write_peft_folder
from edgelam_fl.model.lora import MAGNITUDE
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.model.stage import LoraSettings, load_stages
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.serving.export import export
from edgelam_fl.serving.results import open_result
from edgelam_fl.wire import edgelam_pb2 as pb
from server.earlier_adapter import earlier_adapter
from server.global_adapter import first_adapter
from tests.fleet import (
    check_done,
    device_batches,
    joined,
    memory_fleet,
    plain_adapter,
    plain_model,
    plain_training,
    same_bits,
)
from tests.results import write_result
from tests.support import run_config, write_tiny_llama

STEPS, SIZES = 3, ("split.front=1", "lora.rank=4")
PATTERNS = [
    r"lora.rank_pattern={ 'layers\.[12]\..*\.q_proj' = 3, v_proj = 5 }",
    "lora.alpha_pattern={ 'layers.0.self_attn.q_proj' = 3.0, v_proj = 7.0 }",
]
KINDS = {
    "rsLoRA": ["lora.use_rslora=true"],
    "patterns": PATTERNS,
    "layers of both ends": ["lora.layers_to_transform=[0, 5]"],
    "a layer of a host": ["lora.layers_to_transform=3"],
    "DoRA": ["lora.use_dora=true"],
    "head and norms": ["lora.modules_to_save=['lm_head', 'norm']"],
    "all at once": [
        "lora.use_rslora=true",
        "lora.use_dora=true",
        "lora.modules_to_save=['model.norm', 'input_layernorm']",
        *PATTERNS,
    ],
}


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """Returns the tiny model with a head of its own, and with norms that are not ones."""
    folder = write_tiny_llama(tmp_path_factory.mktemp("untied"), tied=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    drawn = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=drawn))
    model.save_pretrained(folder)
    return find_model(str(folder))


def config_of(source: ModelSource, *overrides: str) -> RunConfig:
    return run_config(source.name, *SIZES, *overrides)


def trained(source: ModelSource, config: RunConfig, data: Sequence[Path], steps: int = STEPS) -> Adapter:
    """Returns what devices and hosts trained in a round, and what they held."""
    start = first_adapter(RunSpec(config, source))
    with memory_fleet(source, config, data) as fleet:
        reports = fleet.run(start, steps)
    check_done(reports)
    return {**start, **joined(reports)}


def plainly_trained(source: ModelSource, config: RunConfig, file: Path) -> Adapter:
    model = plain_model(source, config, first_adapter(RunSpec(config, source)))
    batches = device_batches(source, config, file, "device-1", STEPS)
    plain_training(model, config, [[units] for units in batches])
    return plain_adapter(model)


@pytest.mark.parametrize("kind", KINDS)
def test_split_equals_unsplit_equals_peft(untied: ModelSource, data_files: list[Path], kind: str) -> None:
    config = config_of(untied, *KINDS[kind])
    expected, start = plainly_trained(untied, config, data_files[0]), first_adapter(RunSpec(config, untied))
    assert all(not np.array_equal(expected[name], start[name]) for name in start), "each tensor has learned"
    for hosts in (0, 2):
        split = config_of(untied, *KINDS[kind], f"split.hosts={hosts}")
        assert same_bits(trained(untied, split, data_files[:1]), expected), hosts


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_can_begin_with_what_peft_saved(untied: ModelSource, tmp_path: Path, kind: str) -> None:
    config = config_of(untied, *KINDS[kind], f"model.adapter={tmp_path}")
    spec = RunSpec(config, untied)
    model = plain_model(untied, config, first_adapter(spec))
    with torch.no_grad():
        for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.fill_(number)
    model.save_pretrained(tmp_path)
    assert same_bits(earlier_adapter(spec, DEFAULT_BOUNDS), plain_adapter(model))


@pytest.mark.parametrize(("kind", "base"), [("head and norms", "bf16"), ("DoRA", "int8"), ("all at once", "nf4")])
def test_a_split_changes_no_bit_on_other_bases(
    untied: ModelSource, data_files: list[Path], kind: str, base: str
) -> None:
    config = config_of(untied, *KINDS[kind], f"model.base={base}", "split.hosts=0")
    whole = trained(untied, config, data_files[:1], 2)
    split = config_of(untied, *KINDS[kind], f"model.base={base}", "split.hosts=2")
    assert same_bits(trained(untied, split, data_files[:1], 2), whole)
    assert not same_bits(whole, first_adapter(RunSpec(config, untied)))


@pytest.mark.parametrize(
    "kind", [["lora.modules_to_save=lm_head"], ["lora.modules_to_save=lm_head", "lora.layers_to_transform=1"]]
)
def test_a_head_at_the_last_host_learns_as_on_the_device(
    untied: ModelSource, data_files: list[Path], kind: list[str]
) -> None:
    """Also if nothing else learns there, nor before: the one layer with LoRA is a host's that comes earlier."""
    config = config_of(untied, *kind, "split.back=0", "split.hosts=2")
    at_host = config_of(untied, *kind, "split.back=0", "split.hosts=2", "split.labels=last-stage")
    expected = trained(untied, config, data_files[:1])
    assert same_bits(trained(untied, at_host, data_files[:1]), expected)
    head = "base_model.model.lm_head.weight"
    assert not np.array_equal(expected[head], first_adapter(RunSpec(config, untied))[head])


def test_dora_in_bf16_is_pefts(untied: ModelSource, data_files: list[Path]) -> None:
    config = config_of(untied, *KINDS["DoRA"], "model.base=bf16")
    assert same_bits(trained(untied, config, data_files[:1]), plainly_trained(untied, config, data_files[0]))


@pytest.mark.parametrize("base", ["fp32", "bf16"])
def test_the_server_begins_with_pefts_own_magnitudes(untied: ModelSource, base: str) -> None:
    config = config_of(untied, *KINDS["all at once"], f"model.base={base}")
    start, fresh = first_adapter(RunSpec(config, untied)), plain_adapter(plain_model(untied, config, {}))
    assert start.keys() == fresh.keys()
    drawn = (".lora_A.weight", ".lora_B.weight")
    assert all(np.array_equal(start[name], fresh[name]) for name in start if not name.endswith(drawn))


@pytest.mark.parametrize("base", ["int8", "nf4"])
def test_magnitudes_of_quantized_matrices_are_those_of_the_quantized_numbers(untied: ModelSource, base: str) -> None:
    (fine,), (coarse,) = (
        load_stages(
            untied,
            [Span(2, 3)],
            each,
            LoraSettings(4, 8.0, ("down_proj",), kind=RunSpec(config_of(untied, *KINDS["DoRA"]), untied).kind),
        )
        for each in ("fp32", base)
    )
    x = torch.eye(128)
    down: Any = coarse.layers[2]
    matrix_OI = down.mlp.down_proj.get_base_layer()(x).T
    (magnitude,) = (a for name, a in coarse.adapter().items() if name.endswith(MAGNITUDE))
    np.testing.assert_allclose(magnitude, matrix_OI.detach().norm(dim=1), rtol=1e-5)
    assert not np.array_equal(magnitude, fine.adapter()[f"base_model.model.model.layers.2.mlp.down_proj{MAGNITUDE}"])


def test_dropout_and_checkpointing_with_dora_do_not_depend_on_the_split(
    untied: ModelSource, data_files: list[Path]
) -> None:
    found = [
        trained(untied, config_of(untied, *KINDS["DoRA"], *more), data_files[:1])
        for more in (
            ["split.hosts=0", "lora.dropout=0.3"],
            ["split.hosts=2", "lora.dropout=0.3", "split.checkpointing=true"],
            ["split.hosts=0"],
        )
    ]
    assert same_bits(found[0], found[1])
    assert not same_bits(found[0], found[2]), "dropout drops"


def test_a_devices_copy_at_a_host_learns_as_if_it_were_alone(untied: ModelSource, data_files: list[Path]) -> None:
    kind = ["lora.use_dora=true", "lora.modules_to_save=input_layernorm"]
    alone = trained(untied, config_of(untied, *kind), data_files[:1])
    with memory_fleet(untied, config_of(untied, *kind, "split.host_mode=copies"), data_files[:2]) as fleet:
        reports = fleet.run(first_adapter(RunSpec(fleet.config, untied)), STEPS)
    check_done(reports)
    own = joined({name: only(report, "device-1") for name, report in reports.items()})
    assert same_bits(own, alone)


def only(report: pb.JobReport, source: str) -> pb.JobReport:
    return pb.JobReport(contributions=[one for one in report.contributions if one.source == source])


def test_threads_of_a_host_compute_on_views_with_the_same_magnitudes(untied: ModelSource) -> None:
    spec = RunSpec(config_of(untied, *KINDS["all at once"]), untied)
    (stage,) = load_stages(
        untied, [Span(1, 4)], "fp32", LoraSettings(4, 8.0, ("q_proj", "v_proj"), 0.2, kind=spec.kind)
    )
    stage.load_adapter(moved(first_adapter(spec)))
    view, hidden = stage.view(), torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))
    assert all(view.adapter_parameters[name] is p for name, p in stage.adapter_parameters.items())
    with torch.no_grad():
        assert torch.equal(view(hidden, [5, 5], unit_seed=3), stage(hidden, [5, 5], unit_seed=3))
        assert not torch.equal(view(hidden, [5, 5], unit_seed=3), view(hidden, [5, 5]))


# ---------------------------------------------------------------- elsewhere


@pytest.mark.parametrize("kind", ["patterns", "a layer of a host", "head and norms", "all at once"])
def test_what_was_trained_is_the_same_model_elsewhere(
    untied: ModelSource, data_files: list[Path], tmp_path: Path, kind: str
) -> None:
    """In peft to the bit, merged up to rounding."""
    config = config_of(untied, *KINDS[kind])
    adapter = moved(first_adapter(RunSpec(config, untied)))
    folder = write_result(tmp_path / "run", untied, *SIZES, *KINDS[kind], adapter=adapter)
    expected = logits(plain_model(untied, config, adapter))
    made, _ = export(open_result(folder), "peft", None)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(untied.folder), made).eval()
    assert torch.equal(logits(tuned), expected)
    merged, _ = export(open_result(folder), "merged", None)
    got = logits(AutoModelForCausalLM.from_pretrained(merged))
    assert (got - expected).norm() < 1e-5 * expected.norm()
    assert (got - logits(AutoModelForCausalLM.from_pretrained(untied.folder))).norm() > 1e-3 * expected.norm()


def moved(start: Adapter) -> Adapter:
    """Returns an adapter in which nothing is as it began."""
    drawn = np.random.default_rng(2)
    return {name: array + drawn.normal(0, 0.1, array.shape).astype(np.float32) for name, array in start.items()}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(
        input_ids=torch.randint(2, 200, (2, 9), generator=torch.Generator().manual_seed(1))
    ).logits
    return found


def test_all_linear_modules_of_some_layers_are_named_for_peft(untied: ModelSource, tmp_path: Path) -> None:
    """peft takes "all-linear" for all layers alone."""
    config = config_of(untied, "lora.targets=all-linear", "lora.layers_to_transform=[1, 4]")
    spec = RunSpec(config, untied)
    adapter = moved(first_adapter(spec))
    assert len(adapter) == 2 * 7 * 2
    write_peft_folder(
        adapter, tmp_path, reference="x", rank=4, alpha=config.lora.alpha, targets=config.lora.targets, kind=spec.kind
    )
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(untied.folder), tmp_path)
    assert same_bits(plain_adapter(tuned), adapter)
