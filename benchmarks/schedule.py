"""Measures how busy the stages of a pipeline are, beside m / (m + p - 1), what one-forward-one-backward reaches with p equal stages and m
micro-batches. The stages are emulated: equal by waiting for a fixed time in each pass of a tiny model, so that one machine has them all.

The route is a device's front and p - 1 hosts, the last of which has the labels. Busy is the time in passes by the nodes' timelines, over the
time of the steps by the device's clock, which includes frames, decisions and the optimizer. --smoke: one case, short passes.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.common import Figure, main
from edgelam_fl.model.adapter import initial_adapter
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.model.stage import Stage, load_stages
from edgelam_fl.node.play import NodeHooks
from tests.fleet import check_done, memory_fleet
from tests.support import run_config, write_data_files, write_tiny_llama

CASES = [(stages, micro_batches) for stages in (2, 3) for micro_batches in (4, 8)]
PASS_S = 0.15  # a forward pass; a backward pass takes as long: its limit with frozen weights
STEPS, BAR = 3, 0.9


class _Wait(torch.autograd.Function):
    """Passes hidden states on and gradients back, each after a pass's time."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, pass_s: float) -> torch.Tensor:
        ctx.pass_s = pass_s
        time.sleep(pass_s)
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        time.sleep(ctx.pass_s)
        return grads[0], None


def measure(smoke: bool) -> tuple[dict[str, Any], list[Figure]]:
    torch.set_num_threads(1)
    cases, pass_s, steps = ([(2, 4)], 0.01, 1) if smoke else (CASES, PASS_S, STEPS)
    figures = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, (file, *_) = find_model(str(write_tiny_llama(folder / "tiny"))), write_data_files(folder)
        for stages, micro_batches in cases:
            busy, ideal = _busy(source, file, stages, micro_batches, pass_s, steps), _ideal(stages, micro_batches)
            what, bar = f"p = {stages}, m = {micro_batches}", None if smoke else f"at least {BAR} of {ideal:.3f}"
            figures.append(
                Figure(
                    f"{what}: busy share of emulated equal stages",
                    round(busy, 3),
                    "",
                    bar,
                    busy >= BAR * ideal if bar else None,
                )
            )
            figures.append(Figure(f"{what}: over m / (m + p - 1)", round(busy / ideal, 3), ""))
    return {"emulated": True, "pass_s": pass_s, "steps": steps}, figures


def _ideal(stages: int, micro_batches: int) -> float:
    return micro_batches / (micro_batches + stages - 1)


def _busy(source: ModelSource, file: Path, stages: int, micro_batches: int, pass_s: float, steps: int) -> float:
    """Returns the mean share of the steps' time in which a stage is in a pass."""

    def load(*what: Any, **how: Any) -> list[Stage]:
        return [_waiting(stage, pass_s) for stage in load_stages(*what, **how)]

    config = run_config(
        source.name, "split.front=2", "split.back=0", "split.labels=last-stage", f"split.hosts={stages - 1}",
        f"federation.batch_size={micro_batches}", f"split.micro_batches={micro_batches}", f"split.window={stages + 1}",
    )  # fmt: skip
    names = ["device-1", *(f"edge-{number}" for number in range(1, stages))]
    start = initial_adapter(source, config.lora.targets, config.lora.rank, 1)
    with memory_fleet(source, config, [file], dict.fromkeys(names, NodeHooks(load=load))) as fleet:
        reports = fleet.run(start, steps)
    check_done(reports)
    step_s = sum(step.seconds for step in reports["device-1"].steps)
    passes = {
        name: [one.seconds for one in reports[name].timeline if one.kind in ("forward", "backward")] for name in names
    }
    assert all(len(seconds) == 2 * micro_batches * steps for seconds in passes.values())
    return fmean(sum(seconds) for seconds in passes.values()) / step_s


def _waiting(stage: Stage, pass_s: float) -> Stage:
    """Changes a stage so that each of its passes takes `pass_s` longer in training."""
    plain = stage.forward

    def forward(*inputs: Any, **how: Any) -> torch.Tensor:
        output = plain(*inputs, **how)
        return _Wait.apply(output, pass_s) if torch.is_grad_enabled() else output

    stage.forward = forward  # type: ignore[method-assign]
    return stage


if __name__ == "__main__":
    main("schedule", measure)
