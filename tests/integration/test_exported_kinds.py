"""What each kind of LoRA has learned is the same model where EdgeLAM-FL is not: held-out perplexity of the exported folders."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from edgelam_fl.config import RunConfig
from edgelam_fl.model.adapter import Adapter
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.serving.export import export
from edgelam_fl.serving.results import open_result
from server.global_adapter import first_adapter
from tests.fleet import check_done, memory_fleet
from tests.integration.elsewhere import elsewhere, held_out_pairs
from tests.parity.test_lora_kinds import KINDS, SIZES, config_of, moved
from tests.results import write_result
from tests.support import write_tiny_llama

NAMES = ("rsLoRA", "layers of both ends", "DoRA", "head and norms", "all at once")
ALL = {"plain": list[str](), **{name: KINDS[name] for name in NAMES}}


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """Returns a tiny model with a head of its own, whose numbers are so large that a small change of a layer shows."""
    folder = write_tiny_llama(tmp_path_factory.mktemp("untied"), tied=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "lm_head.weight")):
                parameter *= 8
    model.save_pretrained(folder)
    return find_model(str(folder))


def perplexity_here(source: ModelSource, config: RunConfig, adapter: Adapter, file: Path) -> float:
    """As a round measures it: over a route of a device and a host."""
    with memory_fleet(source, config, [file]) as fleet:
        reports = fleet.run(adapter, 1)
    check_done(reports)
    report = reports["device-1"]
    assert report.eval_labels
    return math.exp(report.eval_loss_sum / report.eval_labels)


@pytest.mark.processes
def test_each_kind_scores_the_same_elsewhere(untied: ModelSource, data_files: list[Path], tmp_path: Path) -> None:
    """One process of transformers and peft for all."""
    here, folders = {}, {}
    for name, settings in ALL.items():
        config = config_of(untied, *settings)
        adapter = moved(first_adapter(RunSpec(config, untied)))
        here[name] = perplexity_here(untied, config, adapter, data_files[0])
        run = write_result(tmp_path / name.replace(" ", "-"), untied, *SIZES, *settings, adapter=adapter)
        folders[name], _ = export(open_result(run), "peft", None)
    config = config_of(untied)
    pairs = held_out_pairs({"device-1": data_files[0]}, config)
    found = elsewhere(untied.folder, untied.folder, folders, config, pairs)
    there = {name: of_devices["device-1"] for name, of_devices in found.items()}
    assert here == pytest.approx({name: there[name] for name in ALL}, rel=1e-4)
    values = sorted(there.values())
    assert all(low != pytest.approx(high, rel=1e-3) for low, high in pairwise(values)), "or nothing was compared"
