"""Trains the upper layers of a model on cached output of its frozen lower layers. Knows no rounds and no plans.

The lower layers compute a text once for all runs and devices that have it (`model.activation_cache`): alone or together
with texts of the same length, never with padding, so the cached output does not depend on the batch that asked first. The
output in a padded batch differs by rounding, about 1e-6.
Shapes: B rows, T tokens, D hidden, N tokens of all rows.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional
from transformers.models.bert.modeling_bert import BertLayer

from edgelam_fl.model.activation_cache import Activations
from edgelam_fl.model.adapter import Span, saved_tensors, target_modules
from edgelam_fl.model.index import layer_number
from edgelam_fl.model.source import ModelSource
from edgelam_fl.model.stage import LoraSettings, Stage

_ROWS_PER_CALL = 4  # of attention, in which each row attends to itself


def frozen_layers(source: ModelSource, lora: LoraSettings) -> int:
    """Counts the layers below the lowest layer in which something may learn."""
    names = [*target_modules(source, lora.targets, lora.kind.layers), *saved_tensors(source, lora.kind.saved)]
    return min(layer for name in names if (layer := layer_number(name)) is not None)


class OnFrozen(Stage):
    """The upper layers of a model as a stage of the whole model: takes token ids, looks up the lower layers' output.

    BERT layers compute a batch as one row without padding, and the last layer only the first token of each row, as the
    pooler reads no other: a third less to compute, and equal except for rounding. With dropout the batch stays padded,
    because the masks are drawn for padded rows.
    """

    def __init__(self, top: Stage, dropout: float, activations: Activations) -> None:
        """Changes the layers of `top` in place. `activations`: the output of the layers below."""
        super().__init__(top.model, top.span, top.dtype, top.family, dropout, adapted=top.adapted, saved=top.saved)
        self.activations = activations
        layers: list[Any] = [self.layers[number] for number in range(top.span.first, top.span.last)]
        self._packs = not dropout and all(isinstance(layer, BertLayer) for layer in layers)
        self._starts_B, self._same_row_NN = torch.empty(0), torch.empty(0)  # of the current batch
        if self._packs:
            for layer in layers[:-1]:
                layer.attention.self.forward = partial(self._attention, layer.attention.self)
            layers[-1].forward = partial(self._first_tokens, layers[-1])

    def forward(self, inputs: torch.Tensor, row_lengths: list[int], **options: Any) -> torch.Tensor:
        """Computes a padded batch of token ids [B, T], as `Stage.forward` does for the whole model."""
        if not self._packs:
            known = self.activations.batch(inputs, row_lengths, options.get("segments", ()))
            return super().forward(known, row_lengths, **options)
        lengths_B = torch.tensor(row_lengths)
        row_N = torch.arange(len(row_lengths)).repeat_interleave(lengths_B)
        self._starts_B, self._same_row_NN = lengths_B.cumsum(0) - lengths_B, row_N[:, None] == row_N
        return super().forward(self.activations.packed(inputs, row_lengths), [len(row_N)], **options)

    def _attention(self, attention: Any, hidden_1ND: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        """Attends within each row; takes a few rows at a time, because masked pairs of tokens are computed too."""
        query, key, value = (
            _heads(attention, of(hidden_1ND)) for of in (attention.query, attention.key, attention.value)
        )
        ends = [*self._starts_B[_ROWS_PER_CALL::_ROWS_PER_CALL].tolist(), hidden_1ND.shape[1]]
        context = [
            functional.scaled_dot_product_attention(
                query[:, :, a:b], key[:, :, a:b], value[:, :, a:b],
                attn_mask=self._same_row_NN[a:b, a:b], scale=attention.scaling,
            )
            for a, b in pairwise([0, *ends])
        ]  # fmt: skip
        return torch.cat(context, dim=2).transpose(1, 2).flatten(2), None

    def _first_tokens(self, layer: Any, hidden_1ND: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Computes a layer for the first token of each row; returns [B, 1, D]."""
        attention, first_1BD = layer.attention.self, hidden_1ND[:, self._starts_B]
        context = functional.scaled_dot_product_attention(
            _heads(attention, attention.query(first_1BD)), _heads(attention, attention.key(hidden_1ND)),
            _heads(attention, attention.value(hidden_1ND)),
            attn_mask=self._same_row_NN[self._starts_B], scale=attention.scaling,
        )  # fmt: skip
        seen_1BD = layer.attention.output(context.transpose(1, 2).flatten(2), first_1BD)
        output_1BD: torch.Tensor = layer.feed_forward_chunk(seen_1BD)
        return output_1BD.transpose(0, 1)


def _heads(attention: Any, projected: torch.Tensor) -> torch.Tensor:
    return projected.unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)


def whole_model(span: Span, source: ModelSource) -> bool:
    """Returns whether a span is the whole model, with embedding and head."""
    return span == Span(0, source.num_layers, embed=True, head=True)
