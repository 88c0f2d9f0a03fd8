"""Trains three devices over one host behind links of 5, 20 and 100 Mbit/s and 20 ms, and without limits: ours against a serial loop.

The demo's data, batches and model; every process has one thread. The product cuts batches as the planner chooses for the links. These are
proxies (`benchmarks.compared.shaped`), one per device, for both alike; the product also knows the rate and keeps to it, as a run file's
wire.capacity has it do. Steps are made in turns. A step is compared with the planner's cost model, whose speeds were learned without
limits; as all processes share this machine, with the work of all over its cores if that takes longer. It takes seven minutes, and
measures time. Draws results/paced.svg.
--smoke: one step of a tiny random model at one rate, no bars, no files.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import RESULTS, Figure, main
from benchmarks.compared.bars import bars
from benchmarks.compared.load import Load
from benchmarks.compared.planner import Predictions, cut_by_planner, on_this_machine, tokens_per_row, with_layer_times
from benchmarks.compared.product import Product, product
from benchmarks.compared.serial import serial_device, serial_server
from benchmarks.compared.shaped import UNSHAPED, Shape, shaped
from benchmarks.compared.workers import Step, Worker, Workers
from edgelam_fl.config import Pieces
from edgelam_fl.tasks.docstrings import write_device_files
from tests.support import write_data_files, write_tiny_llama

DEVICES, TURNS, ROUND_TRIP_S, LEARNED_STEPS = 3, 5, 0.02, 4
SHAPES = {"no limit": UNSHAPED, **{f"{rate} Mbit/s": Shape(rate, ROUND_TRIP_S) for rate in (100, 20, 5)}}
FASTER = {"100 Mbit/s": 1.8, "20 Mbit/s": 2.2}  # bars: than the serial loop
OFF = {"20 Mbit/s": 0.1}  # bar: of the formula
OTHERS_OFF = 0.2


def measure(smoke: bool) -> tuple[dict[str, Any], list[Figure]]:
    figures, plotted = list[Figure](), dict[str, list[float]]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = str(write_tiny_llama(folder / "tiny")) if smoke else "smollm2-135m"
        files = write_data_files(folder)[:2] if smoke else write_device_files(folder, DEVICES)
        held_out = f"data.held_out={0.1 if smoke else 0.002}"  # one or two examples: rounds begin by measuring them
        settings = (
            "federation.batch_size=4", "split.micro_batches=2", "task.max_tokens=80", held_out,
            "optimizer.lr=2e-3", "split.cuts=auto",
        )  # fmt: skip
        load = Load(model, settings, tuple(files))
        shapes = {"100 Mbit/s": SHAPES["100 Mbit/s"]} if smoke else SHAPES
        with product(load, folder / "paced") as started:
            profiles, learned = with_layer_times(load.source, started.profiles()), dict[Pieces, Predictions]()
            for words, shape in shapes.items():
                cut = cut_by_planner(load, profiles, shape)
                ours, pieces = started.cut_as(cut), cut.config.pieces
                if pieces not in learned:
                    learned[pieces] = _predictions(cut, ours)
                predictions = learned[pieces]
                mine, serial = _steps(cut, ours, shape, 1 if smoke else TURNS)
                plotted |= {f"{words}: ours": _speeds(mine), f"{words}: serial loop": _speeds(serial)}
                work_s = median(step.cpu_s for step in mine)
                tokens = tokens_per_row(cut, mine, len(files))
                formula_s = on_this_machine(predictions.cost(len(files), tokens, shape).step_s, work_s)
                figures.append(Figure(f"{words}: pieces of a batch, as planned", pieces.micro_batches, ""))
                figures += _figures(words, mine, serial, formula_s, bars_hold=not smoke)
    if not smoke:
        plot = bars(
            "Three devices over one host", "tokens per second", plotted, [way for way in plotted if "ours" in way]
        )
        (RESULTS / "paced.svg").write_text(plot, encoding="utf-8")
    return {"devices": len(files), "turns": 1 if smoke else TURNS, "round_trip_ms": 1e3 * ROUND_TRIP_S}, figures


def _predictions(load: Load, ours: Product) -> Predictions:
    alone = ours.of_devices(1)
    alone.step(0)  # brings weights and memory
    alone.step(1, LEARNED_STEPS)  # the first units of a round take longer
    return Predictions(load, ours.profiles(), alone.plans(), alone.reports)


def _steps(load: Load, ours: Product, shape: Shape, turns: int) -> tuple[list[Step], list[Step]]:
    """Returns the product's and the serial loop's steps behind links of this shape, after one step of each that does not count."""
    count = len(load.files)
    with ExitStack() as stack:
        lines = stack.enter_context(shaped([ours.host_address()] * count, shape))
        product_way = ours.behind(lines, shape)
        server = Worker(serial_server, load, 1)
        stack.callback(server.close)
        port = server.answer()
        serial_lines = stack.enter_context(shaped([f"127.0.0.1:{port}"] * count, shape))
        devices = []
        for number, line in enumerate(serial_lines):
            host, _, line_port = line.rpartition(":")
            devices.append(Worker(serial_device, load, number, (host, int(line_port)), 1))
            stack.callback(devices[-1].close)
        for device in devices:
            device.answer()
        serial = Workers([server, *devices], all_tokens=True)
        mine, others = [], []
        for turn in range(turns + 1):
            mine.append(product_way.step(turn))
            others.append(serial.step(turn))
    return mine[1:], others[1:]


def _speeds(steps: Sequence[Step]) -> list[float]:
    return [step.per_s for step in steps]


def _figures(
    words: str, mine: Sequence[Step], serial: Sequence[Step], formula_s: float, bars_hold: bool
) -> list[Figure]:
    step_s = median(step.wall_s for step in mine)
    ratio = median(one.per_s / two.per_s for one, two in zip(mine, serial, strict=True))
    off, least, most_off = step_s / formula_s, FASTER.get(words), OFF.get(words, OTHERS_OFF)
    return [
        Figure(f"{words}: speed", round(median(_speeds(mine)), 1), "tokens/s"),
        Figure(f"{words}: speed of the serial loop", round(median(_speeds(serial)), 1), "tokens/s"),
        Figure(
            f"{words}: over the serial loop", round(ratio, 2), "",
            f"at least {least:g}" if bars_hold and least else None, ratio >= least if bars_hold and least else None,
        ),
        Figure(f"{words}: a step", round(step_s, 3), "s"),
        Figure(f"{words}: a step by the formula", round(formula_s, 3), "s"),
        Figure(
            f"{words}: measured step over formula", round(off, 3), "",
            f"within {most_off:.0%} of 1" if bars_hold else None, abs(off - 1) <= most_off if bars_hold else None,
        ),
    ]  # fmt: skip


if __name__ == "__main__":
    main("paced", measure)
