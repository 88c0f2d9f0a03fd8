"""What the frozen lower layers make of a text, computed once and kept: for every run and device that has the text again.

Each text goes through them alone or beside texts of its own length, never beside padding, so what is kept does not depend
on the batch that asked first. A batch that was padded as a whole differs from it by rounding, about 1e-6.
Shapes: B rows, T tokens, D hidden.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch.nn import functional
from transformers.models.bert.modeling_bert import BertLayer

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
        last = self._layers[top.span.last - 1]
        if isinstance(last, BertLayer):  # its pooler reads the first token alone
            last.forward = partial(_first_token, last)

    def forward(self, inputs: torch.Tensor, row_lengths: list[int], **options: Any) -> torch.Tensor:
        return super().forward(self.activations.batch(inputs, row_lengths), row_lengths, **options)


def _first_token(
    layer: Any, hidden_BTD: torch.Tensor, mask: torch.Tensor | None = None, *_: Any, **__: Any
) -> torch.Tensor:
    """A BertLayer's output at the first token, [B, 1, D]: nothing else of the last layer is used. Equal but for rounding."""
    attention, first_B1D = layer.attention.self, hidden_BTD[:, :1]

    def heads(projected: torch.Tensor) -> torch.Tensor:
        return projected.unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)

    context = functional.scaled_dot_product_attention(
        heads(attention.query(first_B1D)), heads(attention.key(hidden_BTD)), heads(attention.value(hidden_BTD)),
        attn_mask=None if mask is None else mask[..., :1, :], scale=attention.scaling,
    )  # fmt: skip
    seen_B1D = layer.attention.output(context.transpose(1, 2).flatten(2), first_B1D)
    output: torch.Tensor = layer.feed_forward_chunk(seen_B1D)
    return output


def whole_model(span: Span, source: ModelSource) -> bool:
    return span == Span(0, source.num_layers, embed=True, head=True)
