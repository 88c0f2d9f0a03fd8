"""What the frozen lower layers make of a text, computed once and kept: for every run and device that has the text again.

Each text goes through them alone or beside texts of its own length, never beside padding, so what is kept does not depend
on the batch that asked first. A batch that was padded as a whole differs from it by rounding, about 1e-6.
Shapes: B rows, T tokens, D hidden.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import torch

from edgelam_fl.model.adapter import Span, target_modules
from edgelam_fl.model.source import ModelSource, layer_number
from edgelam_fl.model.stage import LoraSettings, Stage

_ROWS_AT_ONCE = 64


def frozen_layers(source: ModelSource, lora: LoraSettings) -> int:
    """The layers below the lowest one with LoRA."""
    return min(layer_number(name) or 0 for name in target_modules(source, lora.targets))


class Activations:
    """Hidden states above the frozen layers, by the token ids of a text."""

    def __init__(self, below: Stage) -> None:
        self._below = below
        self._kept: dict[bytes, torch.Tensor] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def batch(self, ids_BT: torch.Tensor, row_lengths: list[int]) -> torch.Tensor:
        """[B, T, D], with zeros where padding is."""
        rows = [ids_BT[row, :length] for row, length in enumerate(row_lengths)]
        hidden = self._of(rows)
        padded_BTD = hidden[0].new_zeros(*ids_BT.shape, hidden[0].shape[1])
        for row, hidden_TD in enumerate(hidden):
            padded_BTD[row, : len(hidden_TD)] = hidden_TD
        return padded_BTD

    def warm(self, texts: Iterable[list[int]]) -> None:
        """Computes those that are not there yet."""
        self._of([torch.tensor(ids) for ids in texts])

    def _of(self, rows: list[torch.Tensor]) -> list[torch.Tensor]:
        keys = [row.numpy().tobytes() for row in rows]
        if any(key not in self._kept for key in keys):
            with self._lock:
                missing = {key: row for key, row in zip(keys, rows, strict=True) if key not in self._kept}
                self._compute(missing)
        return [self._kept[key] for key in keys]

    @torch.no_grad()
    def _compute(self, missing: dict[bytes, torch.Tensor]) -> None:
        by_length: dict[int, list[bytes]] = {}
        for key in missing:
            by_length.setdefault(len(missing[key]), []).append(key)
        for length, keys in by_length.items():
            for first in range(0, len(keys), _ROWS_AT_ONCE):
                some = keys[first : first + _ROWS_AT_ONCE]
                hidden_BTD = self._below(torch.stack([missing[key] for key in some]), [length] * len(some))
                self._kept.update(zip(some, hidden_BTD.unbind(), strict=True))


class OnFrozen(Stage):
    """The layers above, as a stage of the whole model: token ids in, what is below them looked up."""

    def __init__(self, top: Stage, dropout: float, activations: Activations) -> None:
        super().__init__(top.model, top.span, top.dtype, top._family, dropout)
        self.activations = activations

    def forward(self, inputs: torch.Tensor, row_lengths: list[int], **options: Any) -> torch.Tensor:
        return super().forward(self.activations.batch(inputs, row_lengths), row_lengths, **options)


def whole_model(span: Span, source: ModelSource) -> bool:
    return span == Span(0, source.num_layers, embed=True, head=True)
