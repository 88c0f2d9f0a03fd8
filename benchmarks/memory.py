"""Measures a node's memory: loads slices of SmolLM2 in every base and trains a step, each in a process of its own.

Each process is forked from the template of nodes' processes, whose memory is the baseline. Pages of mapped weight files
count, and every page is read first. Writes a table as well: benchmarks/results/memory.md. --smoke: two slices in int8.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, Figure, main
from edgelam_fl.federation.template import warm_template
from edgelam_fl.model.base_names import BASES

SLICES = (2, 8, 15, 26)
FIRST_LAYER, ROWS, TOKENS, THREADS = 2, 4, 64, 1
MIB = 2**20
OVER_STEP, OVER_LOAD, OVER_FIRST_READ, SLOPE_OFF = 100, 80, 220, 0.1  # the bars: MiB, and a share


def measure(smoke: bool) -> tuple[dict[str, Any], list[Figure]]:
    bases, slices = (("int8",), (2, 8)) if smoke else (BASES, SLICES)
    rows = []
    for base in bases:
        _measured(base, slices[-1])  # fills the cache
        rows += [_measured(base, layers) for layers in slices]
    first_reads = []
    for base in () if smoke else bases:
        with tempfile.TemporaryDirectory() as cache:
            first_reads.append(_measured(base, 8, cache=cache))
    figures = [figure for row in rows for figure in _slice_figures(row)]
    figures += [_first_read_figure(row) for row in first_reads]
    figures += [_slope_figure(base, [row for row in rows if row["base"] == base]) for base in bases]
    if not smoke:
        (RESULTS / "memory.md").write_text(_table(rows, first_reads, figures), encoding="utf-8")
    settings = {
        "model": "smollm2-135m",
        "first_layer": FIRST_LAYER,
        "rows": ROWS,
        "tokens": TOKENS,
        "threads": THREADS,
        "lora": "q, v; rank 8",
    }
    return settings, figures


def _measured(base: str, layers: int, cache: str = "") -> dict[str, Any]:
    """Measures one slice in a new process and returns its row. `cache`: an empty folder to use instead of the user's cache."""
    warm_template()
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_one, args=(base, layers, cache, theirs))
    process.start()
    theirs.close()
    try:
        row: dict[str, Any] = ours.recv()
    except EOFError:
        process.join()
        raise SystemExit(f"{base}, {layers} layers: the process ended with status {process.exitcode}") from None
    process.join()
    print(
        {name: value if isinstance(value, str) or value < MIB else f"{_mib(value)} MiB" for name, value in row.items()},
        flush=True,
    )
    return row


# ---------------------------------------------------------------- in the measured process


def _one(base: str, layers: int, cache: str, answer: Connection) -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1"} | ({"EDGELAM_CACHE": cache} if cache else {})
    answer.send(_load_and_train(base, layers))


def _load_and_train(base: str, layers: int) -> dict[str, Any]:
    """Loads a slice and trains a step; returns the row, in bytes above the baseline."""
    import torch

    from edgelam_fl.model.allocator import give_back_at_once
    from edgelam_fl.model.memory import unit_bytes, weights_bytes
    from edgelam_fl.model.source import find_model
    from edgelam_fl.model.stage import LoraSettings, Span, load_stages

    torch.set_num_threads(THREADS)
    give_back_at_once()
    baseline = _resident("VmRSS")
    _forget_peak()
    source, span = find_model("smollm2-135m"), Span(FIRST_LAYER, FIRST_LAYER + layers)
    (stage,) = load_stages(source, [span], base, LoraSettings(8, 16.0, ("q_proj", "v_proj")))
    for parameter in stage.parameters():
        parameter.detach().view(torch.uint8).flatten()[::1024].sum()  # reads every page
    row = {
        "base": base,
        "layers": layers,
        "weights": weights_bytes(source, [span], base),
        "activations": unit_bytes(source.config, layers, ROWS, TOKENS, stage.dtype.itemsize),
        "adapter": 3 * sum(parameter.nbytes for parameter in stage.adapter_parameters.values()),  # with its moments
        "loaded": _resident("VmRSS") - baseline,
        "load_peak": _resident("VmHWM") - baseline,
        "baseline": baseline,
    }
    _forget_peak()
    optimizer = torch.optim.AdamW(stage.set_trainable(lambda layer: True))
    x = torch.randn(ROWS, TOKENS, source.hidden_size).to(stage.dtype).requires_grad_()
    output = stage(x, [TOKENS] * ROWS)
    output.backward(torch.randn_like(output))
    optimizer.step()
    optimizer.zero_grad()
    row |= {"stepped": _resident("VmRSS") - baseline, "step_peak": _resident("VmHWM") - baseline}
    return row


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this benchmark needs Linux: it reads /proc/self/status")


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


# ---------------------------------------------------------------- figures


def _slice_figures(row: dict[str, Any]) -> list[Figure]:
    name = f"{row['base']}, {row['layers']} layers: "
    over_step = row["stepped"] - row["weights"] - row["activations"]
    over_peak = row["step_peak"] - row["weights"] - row["activations"]
    over_load = row["load_peak"] - row["weights"]
    step_bar = f"at most {OVER_STEP} MiB over weights and activations"
    return [
        Figure(f"{name}weights, computed", _mib(row["weights"]), "MiB"),
        Figure(f"{name}activations, computed", _mib(row["activations"]), "MiB"),
        _bar(
            f"{name}peak while loading",
            row["load_peak"],
            f"at most {OVER_LOAD} MiB over the weights",
            over_load,
            OVER_LOAD,
        ),
        _bar(f"{name}resident after a step", row["stepped"], step_bar, over_step, OVER_STEP),
        _bar(f"{name}peak in the step", row["step_peak"], step_bar, over_peak, OVER_STEP),
    ]


def _first_read_figure(row: dict[str, Any]) -> Figure:
    name = f"{row['base']}, {row['layers']} layers: peak of the first read of the GGUF file"
    over = row["load_peak"] - row["weights"]
    return _bar(name, row["load_peak"], f"at most {OVER_FIRST_READ} MiB over the weights", over, OVER_FIRST_READ)


def _slope_figure(base: str, rows: list[dict[str, Any]]) -> Figure:
    """Fits memory after a step against layers by least squares; compares the slope with the computed need of a layer."""
    layers = [row["layers"] for row in rows]
    middle = sum(layers) / len(layers)
    slope = sum((row["layers"] - middle) * row["stepped"] for row in rows) / sum((n - middle) ** 2 for n in layers)
    computed = (rows[-1]["weights"] + rows[-1]["adapter"]) / rows[-1]["layers"]
    bar = f"within {SLOPE_OFF:.0%} of {_mib(computed)} MiB: a layer's weights, its LoRA and the moments"
    return Figure(f"{base}: memory a layer", _mib(slope), "MiB", bar, abs(slope / computed - 1) <= SLOPE_OFF)


def _bar(name: str, value: int, bar: str, over: int, allowed_mib: int) -> Figure:
    return Figure(name, _mib(value), "MiB", bar, over <= allowed_mib * MIB)


def _mib(size: float) -> float:
    return round(size / MIB, 2)


def _table(rows: list[dict[str, Any]], first_reads: list[dict[str, Any]], figures: list[Figure]) -> str:
    head = ("base", "layers", "weights", "activations", "loaded", "peak loading", "after a step", "peak in the step")
    keys = ("weights", "activations", "loaded", "load_peak", "stepped", "step_peak")
    lines = [
        "# Memory a node",
        "",
        f"SmolLM2-135M, layers from {FIRST_LAYER} on, one training step of {ROWS} x {TOKENS} tokens (forward, backward, AdamW on the",
        "LoRA of queries and values, rank 8). MiB over the process after its imports; weights and activations are computed.",
        "Written by `python -m benchmarks.memory`.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    for row in rows:
        lines.append(
            "| " + " | ".join([row["base"], str(row["layers"]), *(f"{_mib(row[key]):.1f}" for key in keys)]) + " |"
        )
    lines += ["", "| base | layers | weights | peak of the first read of the GGUF file |", "|---|---|---|---|"]
    for row in first_reads:
        lines.append(f"| {row['base']} | {row['layers']} | {_mib(row['weights']):.1f} | {_mib(row['load_peak']):.1f} |")
    lines += ["", "| a layer more | MiB | asked |", "|---|---|---|"]
    lines += [f"| {f.name.partition(':')[0]} | {f.value} | {f.bar} |" for f in figures if f.name.endswith("a layer")]
    missed = [
        f"- {figure.name}: {figure.value} {figure.unit}, {figure.bar}" for figure in figures if figure.holds is False
    ]
    lines += ["", "Missed bars:" if missed else f"All {sum(f.holds is True for f in figures)} bars hold.", *missed]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main("memory", measure)
