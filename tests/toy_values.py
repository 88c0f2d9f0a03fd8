"""The smallest task of values: each token is a series whose last values are to be predicted from the first ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from edgelam_fl.array_files import Array
from edgelam_fl.model.value_ends import ValueEnds
from edgelam_fl.tasks.arrays import SAMPLES, Sample
from edgelam_fl.tasks.base import Made, Unit, ValueExample, real_rows, value_units
from edgelam_fl.tasks.kinds import TaskKind, Values
from edgelam_fl.wire import edgelam_pb2 as pb

KIND, SERIES = "toy-series", 5
SETTINGS = [f"task.kind={KIND}", "radio.history_slots=6", "radio.future_slots=2"]  # of a run file


class Toy:
    def __init__(self, _: Path, settings: pb.TaskSettings) -> None:
        self._past, self._future = settings.radio.history_slots, settings.radio.future_slots

    def examples(self, samples: Sequence[Sample]) -> Made:
        """Makes an example of each sample, without the series that are zero."""
        return Made([self._example(one.arrays["series"]) for one in samples])

    def _example(self, series_TS: np.ndarray) -> ValueExample:
        kept_T = np.flatnonzero(series_TS.any(axis=1))
        past_TF = series_TS[kept_T, : self._past]
        inputs = np.concatenate([past_TF, kept_T[:, None]], axis=1).astype(np.float32)
        return ValueExample(inputs, series_TS[kept_T, -self._future :], len(kept_T))

    def units(self, examples: Sequence[ValueExample], pieces: int) -> list[Unit]:
        return value_units(examples, pieces)

    def seen(self, example: ValueExample) -> list[tuple[str, bool]]:
        return [(f"{example.length} series of {self._past} values -> ", False), (f"{self._future} more", True)]

    def loss_rows(self, labels: torch.Tensor) -> torch.Tensor:
        return real_rows(labels)

    def loss(
        self, output: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor | None = None, *, training: bool = False
    ) -> tuple[torch.Tensor, dict[str, float]]:
        wanted_NO = labels.flatten(0, 1)[real_rows(labels) if rows is None else rows]
        error = (output - wanted_NO).square().sum()
        return error, {"nmse": float(error.detach()), "samples": float(wanted_NO.square().sum())}


TOY = TaskKind(
    "tests.toy_values:Toy",
    answers="values",
    values=Values(
        (Array("series", (SAMPLES, "tokens", "slots"), is_complex=False),),
        lambda radio: ValueEnds(radio.history_slots, radio.future_slots, places=(SERIES,), hidden_in=(8,)),
        settings=("history_slots", "future_slots", "series"),
    ),
)


def write_series(path: Path, samples: int, seed: int) -> Path:
    """Writes samples of up to `SERIES` sines of 8 values; some series are zero, so that rows are of unequal lengths."""
    rng = np.random.default_rng(seed)
    phase, step = rng.uniform(0, 6, (samples, SERIES, 1)), rng.uniform(0.2, 0.8, (samples, SERIES, 1))
    series = np.sin(phase + step * np.arange(8)) * (rng.random((samples, SERIES, 1)) < 0.8)
    series[:, 0] += 1e-3
    np.savez(path, series=series.astype(np.float32))
    return path
