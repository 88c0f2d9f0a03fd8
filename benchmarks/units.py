"""Measures what a host saves if its units are larger, and whether the rows of several devices keep their bits in one unit.

A host's layers of SmolLM2-135M (all but two at each end), forward and backward, in one process of one thread: units of 1 to 8 rows of 55
tokens, about the demo's examples. CPU seconds, in turns, so other programs on the machine disturb little. Then the units of three devices, two
rows each, one by one and as one unit. It takes two minutes. --smoke: a tiny random model, two sizes, no files.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from benchmarks.common import Figure, main
from benchmarks.compared.load import Load
from edgelam_fl.model.adapter import Span
from edgelam_fl.model.stage import Stage
from tests.support import write_tiny_llama

ROWS, TOKENS, TURNS, END = (1, 2, 4, 6, 8), 55, 7, 2
DEVICES, ROWS_OF_ONE = 3, 2


class Passed(NamedTuple):
    """A unit's way through the layers, forward and back."""

    states_BTD: torch.Tensor
    inputs_grad_BTD: torch.Tensor
    adapter_grads: dict[str, torch.Tensor]
    cpu_s: float


def measure(smoke: bool) -> tuple[dict[str, Any], list[Figure]]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        model = str(write_tiny_llama(Path(name) / "tiny")) if smoke else "smollm2-135m"
        load = Load(model, (), ())
        (stage,) = load.stages(Span(END, load.source.num_layers - END))
        hidden = load.source.hidden_size
    rows, turns = (ROWS[1:3], 1) if smoke else (ROWS, TURNS)
    generator = torch.Generator().manual_seed(1)

    def numbers(count: int) -> torch.Tensor:
        return torch.randn(count, TOKENS, hidden, generator=generator)

    taken: dict[int, list[float]] = {count: [] for count in rows}
    for turn in range(turns + 1):
        for count in rows:
            passed = _passed(stage, numbers(count), numbers(count))
            if turn:  # the first brings memory
                taken[count].append(passed.cpu_s)
    work_ms = {count: 1e3 * median(seconds) / (count * TOKENS) for count, seconds in taken.items()}
    figures = [
        Figure(f"units of {count} rows: work", round(ms, 3), "CPU ms per token") for count, ms in work_ms.items()
    ]
    figures += [
        Figure(f"units of {ROWS_OF_ONE} rows over {count} rows: work", round(work_ms[ROWS_OF_ONE] / ms, 3), "")
        for count, ms in work_ms.items()
        if count > ROWS_OF_ONE
    ]
    units = [(numbers(ROWS_OF_ONE), numbers(ROWS_OF_ONE)) for _ in range(DEVICES)]
    figures += _joined(stage, units)
    return {"model": "tiny" if smoke else "SmolLM2-135M", "tokens of a row": TOKENS, "turns": turns}, figures


def _passed(stage: Stage, inputs_BTD: torch.Tensor, gradient_BTD: torch.Tensor) -> Passed:
    inputs_BTD = inputs_BTD.clone().requires_grad_()
    began = time.process_time()
    states_BTD = stage(inputs_BTD, [TOKENS] * len(inputs_BTD))
    states_BTD.backward(gradient_BTD)
    cpu_s = time.process_time() - began
    grads = {}
    for name, parameter in stage.adapter_parameters.items():
        assert parameter.grad is not None
        grads[name], parameter.grad = parameter.grad, None
    assert inputs_BTD.grad is not None
    return Passed(states_BTD.detach(), inputs_BTD.grad, grads, cpu_s)


def _joined(stage: Stage, units: list[tuple[torch.Tensor, torch.Tensor]]) -> list[Figure]:
    """Compares the units of several devices, one by one, with all their rows as one unit."""
    apart = [_passed(stage, *unit) for unit in units]
    together = _passed(stage, *(torch.cat(parts) for parts in zip(*units, strict=True)))
    states = torch.equal(together.states_BTD, torch.cat([one.states_BTD for one in apart]))
    inputs = torch.equal(together.inputs_grad_BTD, torch.cat([one.inputs_grad_BTD for one in apart]))
    off = 0.0
    for name, grad in together.adapter_grads.items():
        summed = torch.stack([one.adapter_grads[name] for one in apart]).sum(0)
        off = max(off, float((summed - grad).abs().max() / grad.abs().max().clamp_min(1e-30)))
    return [
        Figure("joined units: hidden states equal to the bit", int(states), ""),
        Figure("joined units: gradients of inputs equal to the bit", int(inputs), ""),
        Figure("joined units: adapters' gradients differ by", off, "of the largest number"),
    ]


if __name__ == "__main__":
    main("units", measure)
