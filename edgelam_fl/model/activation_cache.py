"""Caches the output of frozen lower layers: computed once per text, whatever the number of runs and devices that have it.

Knows no adapters and no batches. Shapes: B rows, T tokens, D hidden, N tokens of all rows.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

import torch

from edgelam_fl.model.stage import Stage

_ROWS_AT_ONCE = 64


class Activations:
    """The hidden states after the frozen layers, by the token ids of a text. Safe for use from any thread."""

    def __init__(self, below: Stage) -> None:
        """`below`: the embedding and the frozen layers."""
        self._below = below
        self._kept: dict[bytes, torch.Tensor] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def batch(
        self, ids_BT: torch.Tensor, row_lengths: list[int], segments: Sequence[Sequence[int]] = ()
    ) -> torch.Tensor:
        """Returns the hidden states [B, T, D] of a padded batch, with zeros for padding. segments: as of `Stage.forward`."""
        texts = [
            (row, sum(lengths[:number]), length)
            for row, lengths in enumerate(segments or [[length] for length in row_lengths])
            for number, length in enumerate(lengths)
        ]
        hidden = self._of([ids_BT[row, first : first + length] for row, first, length in texts])
        padded_BTD = hidden[0].new_zeros(*ids_BT.shape, hidden[0].shape[1])
        for (row, first, length), hidden_TD in zip(texts, hidden, strict=True):
            padded_BTD[row, first : first + length] = hidden_TD
        return padded_BTD

    def packed(self, ids_BT: torch.Tensor, row_lengths: list[int]) -> torch.Tensor:
        """Returns the hidden states [1, N, D] of a batch, row after row, without padding."""
        return torch.cat(self._of(_rows(ids_BT, row_lengths)))[None]

    def warm(self, texts: Iterable[list[int]]) -> None:
        """Computes the texts that are not in the cache yet."""
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


def _rows(ids_BT: torch.Tensor, row_lengths: list[int]) -> list[torch.Tensor]:
    return [ids_BT[row, :length] for row, length in enumerate(row_lengths)]
