"""The real model through a real run: what it scores before and after is what transformers and peft alone find."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from edgelam_fl.model.source import ModelSource
from edgelam_fl.tasks.data import read_pairs
from edgelam_fl.tasks.held_out import set_aside
from tests.fleet import read_by_transformers
from tests.integration.federation import Federation, Run, config_of
from tests.support import WAIT_S

pytestmark = [pytest.mark.processes, pytest.mark.real_model]

MAX_TOKENS, HELD_OUT = 64, 0.25


@pytest.fixture(scope="module")
def run(federation: Federation, smollm: ModelSource) -> Run:
    settings = ["federation.rounds=1", "federation.local_steps=2", "federation.batch_size=2", "optimizer.lr=0.001"]
    return federation.run("smollm2", config_of(smollm.name, *settings, f"task.max_tokens={MAX_TOKENS}"))


@pytest.fixture(scope="module")
def plain(run: Run, few_pairs: dict[str, Path], smollm: ModelSource) -> dict[str, list[float]]:
    """Held-out perplexity before and after, computed where EdgeLAM-FL is not."""
    assert smollm.gguf is not None
    task = {
        "model": str(read_by_transformers(smollm.gguf, torch.float32)),
        "tokenizer": str(smollm.folder),
        "adapter": str(run.path / "adapter"),
        "max_tokens": MAX_TOKENS,
        "threads": 1,
        "pairs": {
            name: set_aside(read_pairs(file, "question", "answer"), HELD_OUT)[1] for name, file in few_pairs.items()
        },
    }
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("plain_perplexity.py"))],
        input=json.dumps(task), capture_output=True, text=True, timeout=WAIT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_perplexity_before_is_plain_transformers(run: Run, plain: dict[str, list[float]]) -> None:
    assert plain.keys() == {device.name for device in run.summary.devices} != set()
    for name, (before, _) in plain.items():
        assert run.device(name).perplexity_before == pytest.approx(before, abs=1e-3)


def test_exported_adapter_scores_the_same_elsewhere(run: Run, plain: dict[str, list[float]]) -> None:
    assert plain.keys() == {device.name for device in run.summary.devices} != set()
    for name, (before, after) in plain.items():
        assert run.device(name).perplexity_after == pytest.approx(after, rel=1e-4)
        assert after < 0.95 * before, "two steps at this rate must be felt, or nothing was compared"


def test_exported_adapter_names_a_base_that_others_can_find(run: Run) -> None:
    config = json.loads((run.path / "adapter/adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
