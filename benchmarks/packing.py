"""Measures what packing saves and whether it changes what is learned (task.packing): perplexity and tokens per second beside without.

One device with docstrings of Python, one host, in one process with one thread; the same examples make the same steps in both arms,
which take turns. Tokens per second are of processor time, so that another program beside does not count. --smoke: one small step of a
tiny random model.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Figure, main
from edgelam_fl.config import RunConfig, parse_run_file
from edgelam_fl.model.adapter import initial_adapter
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.tasks.docstrings import write_device_files
from edgelam_fl.telemetry.events import Evaluated, Event, StepDone
from tests.fleet import check_done, device_batches, joined, memory_fleet
from tests.support import write_tiny_llama

SETTINGS = (
    "split.hosts=1", "split.micro_batches=2", "federation.batch_size=16", "task.max_tokens=256", "task.loss_on=all",
    "task.template=plain", "federation.evaluate_examples=32", "optimizer.lr=2e-3",
)  # fmt: skip
FEW, SMALL = 60, ("federation.batch_size=4", "federation.evaluate_examples=4")  # examples and settings of a smoke run
ARMS = {"without packing": False, "with packing": True}
STEPS, ROUNDS = 4, 2
MOST_APART = 0.01  # relative, of the perplexities after training: both arms round differently in every step


def measure(smoke: bool) -> tuple[dict[str, Any], list[Figure]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (file,) = write_device_files(folder / "data", 1)
        if smoke:
            file.write_text("".join(file.read_text("utf-8").splitlines(keepends=True)[:FEW]), encoding="utf-8")
        source = find_model(str(write_tiny_llama(folder / "tiny")) if smoke else "smollm2-135m")
        steps, rounds, more = (1, 1, SMALL) if smoke else (STEPS, ROUNDS, ())
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            figures = _figures(source, file, steps, rounds, more)
        finally:
            torch.set_num_threads(threads)
    return {"model": source.name, "settings": SETTINGS, "steps": steps, "rounds": rounds}, figures


def _figures(source: ModelSource, file: Path, steps: int, rounds: int, more: Sequence[str]) -> list[Figure]:
    arms = {name: Arm(source, file, _config(source, more, packing=packing)) for name, packing in ARMS.items()}
    for _ in range(rounds):
        for arm in arms.values():
            arm.train(steps)
    figures = []
    for name, arm in arms.items():
        tokens, positions = arm.positions(steps * rounds)
        figures += [
            Figure(f"tokens per second, {name}", round(arm.tokens / arm.seconds, 1), "1/s"),
            Figure(f"positions that are padding, {name}", round(100 * (1 - tokens / positions), 1), "%"),
            Figure(f"perplexity before, {name}", round(arm.perplexities[0], 4), ""),
            Figure(f"perplexity after, {name}", round(arm.measured(), 4), ""),
        ]
    without, packed = arms.values()
    apart = abs(packed.perplexities[-1] / without.perplexities[-1] - 1)
    faster = (packed.tokens / packed.seconds) / (without.tokens / without.seconds)
    return [
        *figures,
        Figure("speed with packing by that without", round(faster, 3), "times"),
        Figure(
            "perplexities apart after training",
            round(apart, 6),
            "relative",
            f"at most {MOST_APART}",
            apart <= MOST_APART,
        ),
    ]


def _config(source: ModelSource, more: Sequence[str], *, packing: bool) -> RunConfig:
    overrides = [f"model.name={source.name}", *SETTINGS, *more, f"task.packing={'true' if packing else 'false'}"]
    return parse_run_file("", source="the benchmark", overrides=overrides)


class Arm:
    """The training with or without packing, round by round."""

    def __init__(self, source: ModelSource, file: Path, config: RunConfig) -> None:
        self._source, self._file, self._config = source, file, config
        self._adapter = initial_adapter(source, config.lora.targets, config.lora.rank, 1)
        self._steps = 0
        self.tokens, self.seconds, self.perplexities = 0, 0.0, list[float]()

    def train(self, steps: int) -> None:
        """Makes steps, and measures the adapter that they start from."""
        moments: list[float] = []

        def watch(event: Event) -> None:
            if isinstance(event, Evaluated | StepDone):
                moments.append(time.process_time())

        with memory_fleet(self._source, self._config, [self._file]) as fleet:
            fleet.watch = watch
            reports = fleet.run(self._adapter, steps, step_offset=self._steps)
        check_done(reports)
        report = reports["device-1"]
        self.perplexities.append(math.exp(report.eval_loss_sum / report.eval_labels))
        self.tokens, self.seconds = self.tokens + report.tokens_trained, self.seconds + moments[-1] - moments[0]
        self._adapter, self._steps = {**self._adapter, **joined(reports)}, self._steps + steps

    def measured(self) -> float:
        """Returns the perplexity of the adapter after all steps."""
        with memory_fleet(self._source, self._config, [self._file]) as fleet:
            report = fleet.run(self._adapter, 0)["device-1"]
        self.perplexities.append(math.exp(report.eval_loss_sum / report.eval_labels))
        return self.perplexities[-1]

    def positions(self, steps: int) -> tuple[int, int]:
        """Returns the tokens of all steps, and the positions that are computed for them."""
        batches = device_batches(self._source, self._config, self._file, "device-1", steps)
        units = [unit for step in batches for unit in step]
        return sum(sum(unit.row_lengths) for unit in units), sum(unit.inputs.numel() for unit in units)


if __name__ == "__main__":
    main("packing", measure)
