"""Measures how long one decoder layer takes here, with attention, norms, LoRA and random weights. Reads no weights.

`model.speed` measures only the matrices of a layer. While it measures, a layer of the model's shapes is in memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch

from edgelam_fl.model.adapter import Span, target_names
from edgelam_fl.model.base_names import COMPUTES, SHORT
from edgelam_fl.model.bases import DTYPE, usable_bases
from edgelam_fl.model.chip import CPU, finish
from edgelam_fl.model.quantized import QUANTIZED, quantize
from edgelam_fl.model.source import ModelSource
from edgelam_fl.model.speed import mean_s, measure_once
from edgelam_fl.model.stage import LoraSettings, Stage, load_stages

TOKENS = (128, 512)  # of a micro-batch
_ROW = 128  # tokens of one row: a larger micro-batch has more rows, as in training
_RANK = 8
_FEW = 16
_HOPELESS_S = (
    3.0  # for the smaller size: a slower layer is measured with a few tokens only, as bf16 without hardware support
)
_SLOW_S = 0.25  # for the smaller size: a slower layer is not measured at the larger size, which would take minutes
_BUDGET_S = 0.5  # several of the periods in which a container gets its share of a core
LayerSeconds = dict[int, dict[str, float]]  # tokens -> "base/compute" -> seconds


def measure_layers(
    source: ModelSource, say: Callable[[str], None] = lambda _: None, chip: torch.device = CPU
) -> LayerSeconds:
    """Measures the seconds of layer 0, forward and backward, once per model, torch, number of threads, machine and chip.

    A slow layer is measured only at the smaller size. The cache keeps the result.
    """
    measured = measure_once(source, "layer", chip, lambda: _measured(source, say, chip))
    return {int(tokens): seconds for tokens, seconds in measured.items()}


def _measured(source: ModelSource, say: Callable[[str], None], chip: torch.device) -> LayerSeconds:
    measured: LayerSeconds = {tokens: {} for tokens in TOKENS}
    for base, compute in [(each, compute) for each in usable_bases(chip) for compute in COMPUTES[each]]:
        key = f"{base}/{SHORT[compute]}"
        say(f"measuring a layer of {source.name} in {key}")
        stage = random_layer(source, base, compute, chip)
        for tokens in TOKENS:
            measured[tokens][key] = _seconds(stage, source, tokens)
            if measured[tokens][key] > _SLOW_S:
                break
    return measured


def random_layer(source: ModelSource, base: str, compute: str, chip: torch.device = CPU) -> Stage:
    """Makes layer 0 with random weights and LoRA on all its matrices; the values of weights do not change the time."""
    lora = LoraSettings(_RANK, 2.0 * _RANK, tuple(target_names(source)))
    classes = 2 if source.family.task_head else 0
    (stage,) = load_stages(source, [Span(0, 1)], base, lora, compute, classes=classes, read=_random_tensors, chip=chip)
    return stage


def _random_tensors(
    source: ModelSource, names: list[str], base: str, compute: str
) -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    dtype = DTYPE[compute or COMPUTES[base][0]]
    matrices = source.linear_modules()
    for name in names:
        if base in QUANTIZED and source.packs(name):
            shape = matrices.get(name.removesuffix(".weight"), source.index[name].shape)  # GPT-2's are turned
            packed, scale = quantize(0.02 * torch.randn(shape, generator=generator), base)
            yield name, packed
            yield f"{name}_scale", scale
        else:
            yield name, (0.02 * torch.randn(source.index[name].shape, generator=generator)).to(dtype)


@torch.enable_grad()
def _seconds(stage: Stage, source: ModelSource, tokens: int) -> float:
    for _ in range(2):  # the first run warms the kernels up
        few_s = _run(stage, _hidden(stage, source, 1, _FEW)) * tokens / _FEW
        if few_s <= _HOPELESS_S:
            break
    else:
        return few_s
    hidden_BTD = _hidden(stage, source, tokens // _ROW, _ROW)
    return mean_s(lambda: _run(stage, hidden_BTD), _BUDGET_S)


def _hidden(stage: Stage, source: ModelSource, rows: int, tokens: int) -> torch.Tensor:
    hidden_BTD = torch.randn(rows, tokens, source.hidden_size, generator=torch.Generator().manual_seed(2))
    return hidden_BTD.to(stage.chip, stage.dtype).requires_grad_()


def _run(stage: Stage, hidden_BTD: torch.Tensor) -> float:
    finish(stage.chip)
    began = time.perf_counter()
    output_BTD = stage(hidden_BTD, [hidden_BTD.shape[1]] * len(hidden_BTD))
    output_BTD.backward(torch.ones_like(output_BTD))
    finish(stage.chip)
    taken = time.perf_counter() - began
    hidden_BTD.grad = None
    for parameter in stage.trainable():
        parameter.grad = None
    return taken
