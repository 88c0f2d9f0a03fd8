"""Records what a host gets in a real split run: a device and a host in this process, with frames on a link between them.

Shapes: B rows of a micro-batch, T tokens, D hidden.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from edgelam_fl.config import RunConfig
from edgelam_fl.model.adapter import Adapter, initial_adapter
from edgelam_fl.model.source import ModelSource
from edgelam_fl.model.stage import Stage, load_stages
from edgelam_fl.node.play import NodeHooks
from edgelam_fl.privacy.attacks.seen import Seen
from edgelam_fl.tasks.base import Unit
from tests.fleet import check_done, device_batches, joined, memory_fleet

PROMPT_WORDS = 3  # of a text; the rest is the answer, whose tokens are the labels


@dataclass
class Frame:
    """A micro-batch of a training step as the host knows it; `gradient_BTD` comes back later, at the host's output."""

    states_BTD: torch.Tensor
    lengths_B: tuple[int, ...]
    output_BTD: torch.Tensor
    gradient_BTD: torch.Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(frozen=True)
class Recorded:
    """One round: the host's frames in their order, the device's micro-batches behind them, and the adapter it began with."""

    frames: list[Frame]
    units: list[Unit]
    adapter: Adapter


def record(
    source: ModelSource, config: RunConfig, texts: Sequence[str], folder: Path, rounds: Sequence[int]
) -> list[Recorded]:
    """Trains on the texts over one host, in rounds of so many steps."""
    file = folder / "device-1.jsonl"
    split = [(" ".join(text.split()[:PROMPT_WORDS]), " ".join(text.split()[PROMPT_WORDS:])) for text in texts]
    file.write_text(
        "".join(json.dumps({"question": prompt, "answer": answer}) + "\n" for prompt, answer in split if answer),
        encoding="utf-8",
    )
    adapter = initial_adapter(source, config.lora.targets, config.lora.rank, config.run.seed)
    frames: list[Frame] = []
    recorded, offset = [], 0
    batches = device_batches(source, config, file, "device-1", sum(rounds))
    hooks = NodeHooks(load=partial(_load_with_tap, frames))
    with memory_fleet(source, config, [file], hooks={"edge-1": hooks}) as fleet:
        for steps in rounds:
            reports = fleet.run(adapter, steps, step_offset=offset)
            check_done(reports)
            units = [unit for step in batches[offset : offset + steps] for unit in step]
            recorded.append(Recorded(frames.copy(), units, adapter))
            adapter, offset = adapter | joined(reports), offset + steps
            frames.clear()
    return recorded


def seen_in(recorded: Recorded, steps: slice) -> Seen:
    """Returns what the host saw in some micro-batches, with the tokens behind it."""
    states, ids, lengths = [], [], []
    for frame, unit in zip(recorded.frames[steps], recorded.units[steps], strict=True):
        for row, length in enumerate(frame.lengths_B):
            states.append(frame.states_BTD[row, :length])
            ids.append(unit.inputs[row, :length])
            lengths.append(length)
    return Seen(torch.cat(states), torch.cat(ids), tuple(lengths))


def _load_with_tap(frames: list[Frame], *arguments: Any, **more: Any) -> list[Stage]:
    stages = load_stages(*arguments, **more)

    def tap(_: Stage, inputs: tuple[torch.Tensor, list[int]], output: torch.Tensor) -> None:
        if output.requires_grad:  # a training step
            frame = Frame(inputs[0].detach().clone(), tuple(inputs[1]), output.detach().clone())
            frames.append(frame)
            output.register_hook(lambda gradient: setattr(frame, "gradient_BTD", gradient.clone()))

    for stage in stages:
        stage.register_forward_hook(tap)
    return stages
