"""Trains the same batches in many ways, in turns, on this machine: unsplit, split, and as others would do it.

SmolLM2-135M in fp32, LoRA of rank 8 on q and v, rows of 256 tokens that all carry loss, 8 rows a step, in 8 micro-batches if the
way has any. All ways are started and warmed first; then each makes one step per turn, and the order changes with each turn. What
is split runs in two processes of one thread each, what is not in one process of two threads, so all have the same two cores.
It takes seven minutes, and measures time: run it on a machine that does nothing else. Draws results/side_by_side.svg.
--smoke: one step of a tiny random model, no bars, no files.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import RESULTS, Figure, main
from benchmarks.compared.bars import bars
from benchmarks.compared.load import Load, write_long_examples
from benchmarks.compared.pipelining import ENVIRONMENT, pipelining
from benchmarks.compared.plain import plain
from benchmarks.compared.product import Product, in_turn, product
from benchmarks.compared.serial import serial_device, serial_server
from benchmarks.compared.workers import Step, Way, Worker, Workers
from tests.support import write_tiny_llama

TURNS, MOST_S = 5, 420.0  # no further turn begins if it might not end by then
ROWS, TOKENS, EVEN_CUT = 8, 256, 19  # with the head, layers [0, 19) take about as long as the rest
BATCH, PIECES = "plain peft, one batch", "plain peft, micro-batches"
UNSPLIT, SPLIT, EVEN = "product, unsplit", "product, split at the default cut", "product, split in even halves"
FEDERATED = "product, whole models on two devices"
TORCH, SERIAL = "torch.distributed.pipelining", "serial split loop"
OURS = (UNSPLIT, SPLIT, EVEN, FEDERATED)
# Ratios of tokens per second, medians of the turns: (way, way that it is compared with, least).
BARS = ((EVEN, PIECES, 1.25), (EVEN, TORCH, 0.97), (SPLIT, PIECES, 1.1))


def measure(smoke: bool) -> tuple[dict[str, Any], list[Figure]]:
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        rows, tokens = (2, 32) if smoke else (ROWS, TOKENS)
        model = str(write_tiny_llama(folder / "tiny")) if smoke else "smollm2-135m"
        files = [write_long_examples(folder / f"{number}.jsonl", 10 * tokens) for number in (1, 2)]
        load = Load(
            model,
            (
                f"federation.batch_size={rows}", f"split.micro_batches={rows}", f"task.max_tokens={tokens}",
                "task.template=plain", "task.loss_on=all", "data.held_out=0.05",
            ),
            (files[0],),
        )  # fmt: skip
        ways = _ways(load, folder, files, stack, smoke)
        for one in ways.values():
            one.step(0)
        steps: dict[str, list[Step]] = {way: [] for way in ways}
        for turn in range(1 if smoke else TURNS):
            now = time.monotonic()
            for way in in_turn(list(ways), turn):
                steps[way].append(ways[way].step(turn + 1))
            if 2 * time.monotonic() - now - began > MOST_S:
                break
        figures = [figure for way, found in steps.items() for figure in _figures(way, found, ways[way])]
    figures += [] if smoke else [_ratio(steps, *one) for one in BARS]
    if not smoke:
        speeds = {way: [step.per_s for step in found] for way, found in steps.items()}
        plot = bars("Training SmolLM2-135M on two cores", "tokens per second", speeds, OURS)
        (RESULTS / "side_by_side.svg").write_text(plot, encoding="utf-8")
    settings = {
        "model": "tiny" if smoke else "SmolLM2-135M",
        "rows": rows,
        "tokens": tokens,
        "turns": len(steps[SPLIT]),
        "base": "fp32",
    }
    return settings, figures


def _ways(load: Load, folder: Path, files: Sequence[Path], stack: ExitStack, smoke: bool) -> dict[str, Way]:
    """Starts all ways; each is ready when it is returned."""

    def workers(*made: Worker) -> Workers:
        for one in made:
            one.answer()
        return Workers(made)

    def worker(*arguments: Any, **settings: Any) -> Worker:
        made = Worker(*arguments, **settings)
        stack.callback(made.close)
        return made

    whole = load.with_settings("split.micro_batches=1")
    cut = 2 if smoke else EVEN_CUT
    unsplit = load.with_settings("split.hosts=0")
    even = load.with_settings("split.front=6", "split.back=5", "split.window=4")
    half = f"federation.batch_size={load.config.federation.batch_size // 2}"
    pieces = f"split.micro_batches={load.config.pieces.micro_batches // 2}"
    each = Load(load.model, (*load.overrides, half, pieces, "split.hosts=0"), tuple(files))
    meeting = folder / "gloo"
    ways: dict[str, Way] = {
        PIECES: workers(worker(plain, load, 2)),
        SPLIT: stack.enter_context(product(load, folder / "split")),
        TORCH: workers(*[worker(pipelining, load, rank, meeting, cut, environment=ENVIRONMENT) for rank in (0, 1)]),
    }
    if smoke:  # the others are started in the same way, and the serial loop by `benchmarks.paced`
        return ways
    server = worker(serial_server, whole, 2)
    port = server.answer()
    device = worker(serial_device, whole, 0, ("127.0.0.1", port), 2)
    device.answer()
    return {
        BATCH: workers(worker(plain, whole, 2)),
        **ways,
        UNSPLIT: stack.enter_context(product(unsplit, folder / "unsplit", device_threads=2)),
        SERIAL: Workers([server, device]),
        EVEN: stack.enter_context(product(even, folder / "even")),
        FEDERATED: stack.enter_context(product(each, folder / "federated")),
    }


def _figures(name: str, steps: Sequence[Step], way: Way) -> list[Figure]:
    speeds, peaks = [step.per_s for step in steps], way.peak_bytes()
    figures = [
        Figure(f"{name}: speed", round(median(speeds), 1), "tokens/s"),
        Figure(f"{name}: speed, lowest", round(min(speeds), 1), "tokens/s"),
        Figure(f"{name}: speed, highest", round(max(speeds), 1), "tokens/s"),
        Figure(f"{name}: work", round(median(step.per_cpu_s for step in steps), 1), "tokens per CPU s"),
        Figure(f"{name}: memory of the largest process", round(max(peaks) / 1e6), "MB"),
        Figure(f"{name}: memory of the smallest process", round(min(peaks) / 1e6), "MB"),
    ]
    if isinstance(way, Product) and name != UNSPLIT:
        sent = way.tensor_bytes() / steps[-1].tokens
        figures.append(Figure(f"{name}: tensors on links", round(sent), "bytes per token"))
    return figures


def _ratio(steps: Mapping[str, Sequence[Step]], way: str, other: str, least: float) -> Figure:
    """Compares two ways turn by turn."""
    ratio = median(one.per_s / two.per_s for one, two in zip(steps[way], steps[other], strict=True))
    return Figure(f"{way}, over {other}", round(ratio, 3), "", f"at least {least:g}", ratio >= least)


if __name__ == "__main__":
    main("side_by_side", measure)
