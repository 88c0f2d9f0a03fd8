"""Measures on an accelerator: split against unsplit, to the bit and in time, a GPU edge server for devices on the CPU, and frames.

All nodes are in one process, with links inside it, so what is measured is computing and carrying, not a network. Rates are medians of
interleaved rounds, so that what else the machine does meets all of them. Takes less than 5 minutes with SmolLM2 on a GPU.
--dry-run: the same with a tiny random model, a few steps and the CPU in place of the accelerator; its figures say nothing of one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Figure, main
from edgelam_fl.model.adapter import Adapter, initial_adapter
from edgelam_fl.model.base_names import BASES
from edgelam_fl.model.bases import usable_bases, working_chip
from edgelam_fl.model.chip import CPU, chip_name, deterministic_kernels, finish, off, onto
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.wire import edgelam_pb2 as pb
from tests.fleet import Fleet, check_done, joined, memory_fleet, same_bits
from tests.support import run_config, write_tiny_llama

EXACT = "equal to the bit"
_SPLIT, _WHOLE = ("split.hosts=1", "split.front=2", "split.back=2"), ("split.hosts=0",)


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    rows: int
    tokens: int
    steps: int  # of a round
    rounds: int  # of each kind, after one that warms up
    frame_bytes: int
    bases: tuple[str, ...]


FULL, DRY = Size(8, 256, 8, 3, 1 << 20, BASES), Size(4, 64, 2, 1, 1 << 16, ("fp32",))


def measure(smoke: bool, options: argparse.Namespace) -> tuple[dict[str, Any], list[Figure]]:
    chip = CPU if smoke else working_chip(options.chip)[0]
    if chip == CPU and not smoke:
        raise SystemExit("no accelerator that computes is here; --dry-run runs all of this on the CPU")
    size = DRY if smoke else replace(FULL, bases=usable_bases(chip))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = find_model(str(write_tiny_llama(folder / "tiny"))) if smoke else find_model("smollm2-135m")
        files = write_texts(folder, size, devices=2)
        with deterministic_kernels():
            figures = exact(source, files, chip, size)
        figures += [*split_against_whole(source, files, chip, size), *edge_server(source, files, chip, size)]
    figures += frames(chip, size)
    settings = {
        "model": source.name, "chip": f"{chip} {chip_name(chip)}", "bases": list(size.bases), "rows": size.rows,
        "tokens": size.tokens, "steps": size.steps, "rounds": size.rounds, "cpu_threads": torch.get_num_threads(),
    }  # fmt: skip
    return settings, figures


def write_texts(folder: Path, size: Size, devices: int) -> list[Path]:
    """Writes a file of long examples for each device, enough for a batch that holds none twice."""
    files = [folder / f"device-{number}.jsonl" for number in range(1, devices + 1)]
    for number, file in enumerate(files):
        words = [f"{'river stone letter window '[number:] * (size.tokens // 4)}{row}." for row in range(2 * size.rows)]
        lines = [json.dumps({"question": f"Text {row}?", "answer": answer}) for row, answer in enumerate(words)]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return files


# ---------------------------------------------------------------- rates


class Run:
    """A fleet whose rounds are measured one by one."""

    def __init__(self, fleet: Fleet, start: Adapter, size: Size) -> None:
        self._fleet, self._start, self._size = fleet, start, size
        self.rates: list[float] = []  # trained tokens of all devices per second
        self.reports = self._round()  # warms up

    def _round(self) -> dict[str, pb.JobReport]:
        reports = self._fleet.run(self._start, self._size.steps)
        check_done(reports)
        return reports

    def measure(self) -> None:
        """Runs one more round from the same adapter."""
        self.reports = self._round()
        devices = [report for report in self.reports.values() if report.tokens_trained]
        slowest_s = max(report.train_seconds for report in devices)
        self.rates.append(sum(report.tokens_trained for report in devices) / slowest_s)

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)


def fleets(
    source: ModelSource,
    files: Sequence[Path],
    size: Size,
    kinds: Mapping[str, tuple[Sequence[str], Mapping[str, torch.device]]],
) -> dict[str, Run]:
    """Measures fleets of the same model and data in turns. `kinds`: of each, its settings, and the nodes that are not on the CPU."""
    with ExitStack() as open_fleets:
        runs: dict[str, Run] = {}
        for name, (settings, chips) in kinds.items():
            common = ("task.loss_on=all", f"task.max_tokens={size.tokens}", f"federation.batch_size={size.rows}")
            config = run_config(source.name, *common, f"split.micro_batches={size.rows // 2}", *settings)
            start = initial_adapter(source, config.lora.targets, config.lora.rank, 1)
            fleet = open_fleets.enter_context(memory_fleet(source, config, files, chips=chips))
            runs[name] = Run(fleet, start, size)
        for _ in range(size.rounds):
            for run in runs.values():
                run.measure()
        return runs


def both(source: ModelSource, files: Sequence[Path], chip: torch.device, size: Size, base: str) -> dict[str, Run]:
    """Trains one device alone and over one host, all on the chip."""
    everywhere = dict.fromkeys(("device-1", "edge-1"), chip)
    kinds = {name: ((*how, f"model.base={base}"), everywhere) for name, how in (("whole", _WHOLE), ("split", _SPLIT))}
    return fleets(source, files[:1], size, kinds)


def exact(source: ModelSource, files: Sequence[Path], chip: torch.device, size: Size) -> list[Figure]:
    """Compares split and unsplit on the chip, in each base."""
    figures = []
    for base in size.bases:
        runs = both(source, files, chip, replace(size, steps=2, rounds=0), base)
        equal = same_bits(joined(runs["split"].reports), joined(runs["whole"].reports))
        figures.append(Figure(f"{base}: split and unsplit on the chip are equal", float(equal), "", EXACT, equal))
    return figures


def split_against_whole(source: ModelSource, files: Sequence[Path], chip: torch.device, size: Size) -> list[Figure]:
    """Compares the rates of split and unsplit on the chip, in each base."""
    figures = []
    for base in size.bases:
        runs = both(source, files, chip, size, base)
        split, whole = runs["split"], runs["whole"]
        peak = max(report.peak_rss_bytes for report in split.reports.values())
        figures += [
            Figure(f"{base}: unsplit", whole.rate, "tokens/s"),
            Figure(f"{base}: split 2/2", split.rate, "tokens/s"),
            Figure(f"{base}: split over unsplit", split.rate / whole.rate, "x"),
            Figure(f"{base}: most memory of the process so far", peak / 1e6, "MB"),
        ]
    return figures


def edge_server(source: ModelSource, files: Sequence[Path], chip: torch.device, size: Size) -> list[Figure]:
    """Trains two devices on the CPU over an edge server on the CPU, and over one on the chip."""
    runs = fleets(source, files, size, {"CPU": (_SPLIT, {}), "chip": (_SPLIT, {"edge-1": chip})})
    return [
        Figure("two devices on the CPU, edge server on the CPU", runs["CPU"].rate, "tokens/s"),
        Figure("two devices on the CPU, edge server on the chip", runs["chip"].rate, "tokens/s"),
        Figure("what the edge server's chip gains", runs["chip"].rate / runs["CPU"].rate, "x"),
    ]


def frames(chip: torch.device, size: Size) -> list[Figure]:
    """Carries a frame's tensor to the chip and back."""
    tensor, times = torch.randn(size.frame_bytes // 4), {"to": list[float](), "from": list[float]()}
    for _ in range(50):
        began = time.perf_counter()
        there = onto(tensor, chip)
        finish(chip)
        arrived = time.perf_counter()
        off(there)
        times["to"].append(arrived - began)
        times["from"].append(time.perf_counter() - arrived)
    mib = size.frame_bytes / 2**20
    return [
        Figure(f"{way} the chip", 1e3 * statistics.median(taken) / mib, "ms per MiB") for way, taken in times.items()
    ]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", dest="smoke", action="store_true", help="the same as --smoke: on the CPU, tiny")
    parser.add_argument("--chip", default="auto", help="as --device of a node")


if __name__ == "__main__":
    main("gpu", measure, add_options)
