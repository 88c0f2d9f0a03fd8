"""The real model through the demo's smallest run: what it scores before and after is what transformers and peft alone find.

The run is that of `python -m benchmarks.demo --smoke`, whose result is looked at here too, so that the real model is
fine-tuned by a whole federation once.
"""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from benchmarks import common, demo
from edgelam_fl.config import parse_run_file
from edgelam_fl.model.source import ModelSource
from edgelam_fl.telemetry.summary import Summary, read_summary
from tests.fleet import read_by_transformers
from tests.integration.elsewhere import elsewhere, held_out_pairs
from tests.integration.test_benchmarks import ROOT, check_result

pytestmark = [pytest.mark.processes, pytest.mark.real_model]


@dataclass(frozen=True)
class Demo:
    folder: Path  # of the run
    printed: str  # by the benchmark

    @property
    def summary(self) -> Summary:
        return read_summary(self.folder / "summary.json")


@pytest.fixture(scope="module")
def run() -> Demo:
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.chdir(ROOT)
        common.main("demo", demo.measure, arguments=["--smoke"])
    return Demo(ROOT / demo.SMOKE_RUN, printed.getvalue())


@pytest.fixture(scope="module")
def plain(run: Demo, smollm: ModelSource) -> dict[str, tuple[float, float]]:
    """Held-out perplexity before and after, computed where EdgeLAM-FL is not."""
    assert smollm.gguf is not None
    config = parse_run_file((run.folder / "config.toml").read_text(encoding="utf-8"), source="the demo's run file")
    model, files = read_by_transformers(smollm.gguf, torch.float32), (run.folder / "data").glob("*.jsonl")
    held_out = held_out_pairs({file.stem: file for file in files}, config)
    found = elsewhere(model, smollm.folder, {"run": run.folder / "adapter"}, config, held_out)
    return {name: (found[""][name], found["run"][name]) for name in held_out}


def test_the_benchmark_of_the_demo_runs(run: Demo) -> None:
    check_result("demo", run.printed)


def test_perplexity_before_is_plain_transformers(run: Demo, plain: dict[str, tuple[float, float]]) -> None:
    assert [device.name for device in run.summary.devices] == list(plain) != []
    for device in run.summary.devices:
        assert device.perplexity_before == pytest.approx(plain[device.name][0], abs=1e-3)


def test_exported_adapter_scores_the_same_elsewhere(run: Demo, plain: dict[str, tuple[float, float]]) -> None:
    assert [device.name for device in run.summary.devices] == list(plain) != []
    for device in run.summary.devices:
        before, after = plain[device.name]
        assert device.perplexity_after == pytest.approx(after, rel=1e-4)
        assert after < 0.95 * before, "two steps at this rate must be felt, or nothing was compared"


def test_exported_adapter_names_a_base_that_others_can_find(run: Demo, smollm: ModelSource) -> None:
    config = json.loads((run.folder / "adapter/adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    known = config["auto_mapping"]["trained_on"]
    assert (known["file"], known["sha256"]) == ("SmolLM2-135M-Instruct.Q4_1.gguf", smollm.files["weights"])


def test_a_demo_leaves_a_card_with_what_was_measured(run: Demo, plain: dict[str, tuple[float, float]]) -> None:
    card = ModelCard.load(run.folder / "adapter/README.md")
    (before, after), *_ = plain.values()
    assert f"| 1 device | {before:.2f} | {after:.2f} |" in card.text
    assert "a rounded copy of HuggingFaceTB/SmolLM2-135M-Instruct" in card.text
    assert card.data.to_dict()["license"] == "apache-2.0"
