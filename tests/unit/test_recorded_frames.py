"""The tap of the leakage benchmark records what a host gets: the states that the device's front makes, and the gradients."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.leakage.frames import record, seen_in
from benchmarks.leakage.looking import front_to
from edgelam_fl.model.source import ModelSource
from edgelam_fl.model.stage import LoraSettings
from tests.support import run_config

FRONT, STEPS = 2, 2


def test_recorded_states_are_those_of_the_front_with_the_rounds_adapter(tiny: ModelSource, tmp_path: Path) -> None:
    config = run_config(tiny.name, f"split.front={FRONT}", "task.template=plain", "task.max_tokens=24")
    texts = [f"The device number {n} holds {n * n} examples." for n in range(12)]
    first, second = record(tiny, config, texts, tmp_path, rounds=[STEPS, 1])
    assert len(first.frames) == len(first.units) == STEPS * config.split.micro_batches
    lora = LoraSettings(config.lora.rank, config.lora.alpha, config.lora.targets)
    for recorded in (first, second):
        frame, unit = recorded.frames[0], recorded.units[0]
        states_BTD = front_to(tiny, "fp32", FRONT, lora, recorded.adapter).of_tokens(unit.inputs, frame.lengths_B)
        assert torch.equal(frame.states_BTD, states_BTD)
        assert frame.gradient_BTD.shape == frame.output_BTD.shape
        assert frame.gradient_BTD.abs().sum() > 0
    public_BTD = front_to(tiny, "fp32", FRONT).of_tokens(second.units[0].inputs, second.frames[0].lengths_B)
    assert not torch.equal(second.frames[0].states_BTD, public_BTD), "the front has learned"
    seen = seen_in(first, slice(0, 1))
    assert seen.lengths_R == first.frames[0].lengths_B
    assert len(seen.states_ND) == len(seen.ids_N) == sum(seen.lengths_R)
