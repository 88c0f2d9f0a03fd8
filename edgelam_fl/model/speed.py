"""Measures how fast a chip of this machine computes one layer's matrices of a model with each base, with random weights.

Measured, never looked up by a processor's name. Reads no weights; knows nothing about plans, which choose by these numbers.
"""

from __future__ import annotations

import hashlib
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from edgelam_fl.errors import ModelError
from edgelam_fl.files import cache_folder, write_atomically
from edgelam_fl.model.base_names import COMPUTES, PROFILED_TOKENS, SHORT
from edgelam_fl.model.bases import DTYPE, usable_bases
from edgelam_fl.model.chip import CPU, chip_name, finish
from edgelam_fl.model.quantized import QUANTIZED
from edgelam_fl.model.source import ModelSource

Shapes = list[tuple[int, int]]

_BUDGET_S = 0.25  # per pair; a layer that takes longer still runs as often as _RUNS says
_RUNS = (3, 50)
_LONG_RUN = 8  # multiple of the budget: a longer run is not repeated


def layers_s(shapes: Shapes, base: str, dtype: torch.dtype, chip: torch.device) -> float:
    """Returns the mean seconds of a few runs over matrices of these (out, in) sizes, forward and backward."""
    generator = torch.Generator().manual_seed(1)
    pairs = []
    for out_features, in_features in shapes:
        weight_OI = torch.randn(out_features, in_features, generator=generator)
        if base in QUANTIZED:
            layer: nn.Module = QUANTIZED[base].from_weight(weight_OI)
        else:
            layer = nn.Linear(in_features, out_features, bias=False, device="meta")
            layer.weight = nn.Parameter(weight_OI.to(dtype), requires_grad=False)
        x = torch.randn(PROFILED_TOKENS, in_features, generator=generator).to(chip, dtype)
        pairs.append((layer.to(chip), x.requires_grad_()))
    return mean_s(lambda: _run(pairs, chip), _BUDGET_S)


def measure_bases(
    source: ModelSource,
    chip: torch.device = CPU,
    measure: Callable[[Shapes, str, torch.dtype, torch.device], float] = layers_s,
) -> dict[str, float]:
    """Measures the seconds of one layer's matrices over 128 tokens, forward and backward, per "base/compute" ("int8/bf16").

    Takes about 2 s once per model, torch, number of threads, machine and chip; then the cache has the result. measure: returns
    the seconds of matrices of these sizes, for a base, a type to compute in and a chip.
    """
    measured: dict[str, float] = measure_once(source, "", chip, lambda: _measured(source, chip, measure))
    return measured


def measure_once(source: ModelSource, what: str, chip: torch.device, measure: Callable[[], Any]) -> Any:
    """Returns the JSON value of `measure()`, from the cache if this model was measured with this torch, threads, machine and chip.

    `what` names the kind of measurement.
    """
    kind = torch.backends.cpu.get_cpu_capability() if chip == CPU else chip_name(chip)
    machine = (platform.node(), platform.machine(), kind)
    known = json.dumps(
        [source.weights_digest, torch.__version__, torch.get_num_threads(), machine, usable_bases(chip), what]
    )
    note = cache_folder() / "speed" / f"{hashlib.sha256(known.encode()).hexdigest()[:24]}.json"
    try:
        return json.loads(note.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        text = json.dumps(measure())
    note.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(note, text)
    return json.loads(text)


def mean_s(run: Callable[[], float], budget_s: float) -> float:
    """Returns the mean seconds of a few runs, each of which returns its seconds, without the first, which warms up kernels.

    The mean and not the median, because a container's share of a core comes as ten or more pauses per second, which most runs do
    not meet.
    """
    first_s = run()
    if first_s > _LONG_RUN * budget_s:
        return first_s
    least, most = _RUNS
    began, taken = time.perf_counter(), [run() for _ in range(least)]
    while len(taken) < most and time.perf_counter() - began < budget_s:
        taken.append(run())
    return statistics.fmean(taken)


def _measured(source: ModelSource, chip: torch.device, measure: Callable[..., float]) -> dict[str, float]:
    shapes = _layer_shapes(source)
    return {
        f"{base}/{SHORT[compute]}": measure(shapes, base, DTYPE[compute], chip)
        for base in usable_bases(chip)
        for compute in COMPUTES[base]
    }


def _layer_shapes(source: ModelSource) -> Shapes:
    shapes = source.used_matrices(0)
    if not shapes:
        raise ModelError(f"model {source.name} has no matrices in its layer 0, so its speed cannot be measured")
    return shapes


def _run(pairs: list[tuple[nn.Module, torch.Tensor]], chip: torch.device) -> float:
    finish(chip)
    began = time.perf_counter()
    for layer, x in pairs:
        y = layer(x)
        y.backward(torch.ones_like(y))
        x.grad = None
    finish(chip)
    return time.perf_counter() - began
