"""What the frozen lower layers make of a text, computed once and kept: for every run and device that has the text again.

Each text goes through them alone or beside texts of its own length, never beside padding, so what is kept does not depend
on the batch that asked first. A batch that was padded as a whole differs from it by rounding, about 1e-6.
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
from edgelam_fl.model.adapter import Span, target_modules
from edgelam_fl.model.index import layer_number
from edgelam_fl.model.source import ModelSource
from edgelam_fl.model.stage import LoraSettings, Stage

_ROWS_ATTEND = 4  # to themselves at once


def frozen_layers(source: ModelSource, lora: LoraSettings) -> int:
    """The layers below the lowest one with LoRA."""
    return min(layer_number(name) or 0 for name in target_modules(source, lora.targets))


class OnFrozen(Stage):
    """The layers above, as a stage of the whole model: token ids in, what is below them looked up.

    BERT's compute rows one after the other as one, without padding, and the last layer at each row's first token alone,
    which is all that the pooler reads: a third less to compute, and equal but for rounding. Not with dropout, whose masks
    are those of padded rows.
    """

    def __init__(self, top: Stage, dropout: float, activations: Activations) -> None:
        super().__init__(top.model, top.span, top.dtype, top._family, dropout)
        self.activations = activations
        layers: list[Any] = [self._layers[number] for number in range(top.span.first, top.span.last)]
        self._packs = not dropout and all(isinstance(layer, BertLayer) for layer in layers)
        self._starts_B, self._same_row_NN = torch.empty(0), torch.empty(0)  # of the rows that are computed
        if self._packs:
            for layer in layers[:-1]:
                layer.attention.self.forward = partial(self._attention, layer.attention.self)
            layers[-1].forward = partial(self._first_tokens, layers[-1])

    def forward(self, inputs: torch.Tensor, row_lengths: list[int], **options: Any) -> torch.Tensor:
        if not self._packs:
            return super().forward(self.activations.batch(inputs, row_lengths), row_lengths, **options)
        lengths_B = torch.tensor(row_lengths)
        row_N = torch.arange(len(row_lengths)).repeat_interleave(lengths_B)
        self._starts_B, self._same_row_NN = lengths_B.cumsum(0) - lengths_B, row_N[:, None] == row_N
        return super().forward(self.activations.packed(inputs, row_lengths), [len(row_N)], **options)

    def _attention(self, attention: Any, hidden_1ND: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        """Of each row to itself; a few rows at a time, because what is masked is computed too."""
        query, key, value = (
            _heads(attention, of(hidden_1ND)) for of in (attention.query, attention.key, attention.value)
        )
        ends = [*self._starts_B[_ROWS_ATTEND::_ROWS_ATTEND].tolist(), hidden_1ND.shape[1]]
        context = [
            functional.scaled_dot_product_attention(
                query[:, :, a:b], key[:, :, a:b], value[:, :, a:b],
                attn_mask=self._same_row_NN[a:b, a:b], scale=attention.scaling,
            )
            for a, b in pairwise([0, *ends])
        ]  # fmt: skip
        return torch.cat(context, dim=2).transpose(1, 2).flatten(2), None

    def _first_tokens(self, layer: Any, hidden_1ND: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """[B, 1, D]"""
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
    return span == Span(0, source.num_layers, embed=True, head=True)
