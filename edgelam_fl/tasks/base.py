"""The parts of every task: examples, micro-batches, and a loss as a sum together with its divisor.

Knows nothing about stages and links. Sums and counts, never means: means of unequal pieces do not add up.
Shapes: B rows, T tokens, F values per token, N positions that carry loss, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class Example:
    """One prompt and its answer, ready for a model."""

    ids: list[int]
    labels: list[int]  # causal-lm: one per token; classification: only the number of the class
    count: int  # weight of its loss: the number of labelled tokens, or 1

    @property
    def length(self) -> int:
        """The number of its tokens."""
        return len(self.ids)


@dataclass(frozen=True)
class ValueExample:
    """One sample as a row of tokens that are values, ready for a model."""

    inputs: np.ndarray  # [T, F] float32
    labels: np.ndarray  # [T, L] float32
    count: int  # weight of its loss

    @property
    def length(self) -> int:
        """The number of its tokens."""
        return len(self.inputs)


_Example = TypeVar("_Example", Example, ValueExample)


@dataclass(frozen=True)
class Made:
    """The examples that a task made of pairs or samples, in their order, and the counts of those that are not whole."""

    examples: list[Any]  # of the task's own kind: Example or ValueExample
    cut: int = 0
    """Examples that lost a part because they were too long."""
    skipped: int = 0
    """Pairs of which no example was made because they were too long."""
    refused: int = 0
    """Pairs of which no example was made because the model's chat template refuses them (data.bad_lines = "skip")."""
    cut_answers: int = 0
    """Examples among `cut` whose answer lost a part."""
    remarks: tuple[str, ...] = ()
    """What else the owner of the data should know of them, in words without a full stop."""


def template_refuses(made: Made) -> str:
    """Says how many pairs the chat template refuses, as the end of a sentence; empty if none."""
    return f" (the model's chat template refuses {made.refused} examples)" if made.refused else ""


@dataclass(frozen=True)
class Unit:
    """One micro-batch, padded on the right."""

    inputs: torch.Tensor  # token ids [B, T], or values [B, T, F] in float32
    labels: torch.Tensor  # [B, T] causal-lm, [B] classification, [B, T, L] values
    row_lengths: list[int]
    count: int  # weight of the micro-batch: labelled tokens, or examples
    segments: Sequence[
        Sequence[int]
    ] = ()  # of packed rows: the tokens of each example in a row; empty: a row is one example

    @property
    def shape(self) -> tuple[int, int]:
        """Its rows and the tokens of each, padding included."""
        return self.inputs.shape[0], self.inputs.shape[1]


class Task(Protocol):
    """A task with the settings of one run, made as `class(tokenizer_folder, settings)`.

    The tokenizer is loaded at the first call of `examples`, not before: a host that gets labels has none. A task of values makes
    each `ValueExample` of a `tasks.arrays.Sample`, where one of texts makes an `Example` of a pair.
    """

    def examples(self, pairs: Sequence[Any]) -> Made:
        """Makes examples of pairs or samples, perhaps none. Raises DataError for one that the task cannot use."""
        ...

    def units(self, examples: Sequence[Any], pieces: int) -> list[Unit]:
        """Cuts a batch into at most `pieces` micro-batches."""
        ...

    def seen(self, example: Any) -> list[tuple[str, bool]]:
        """Returns an example as the model gets it: texts in their order, each with whether it is learned."""
        ...

    def loss_rows(self, labels: torch.Tensor) -> torch.Tensor | None:
        """Returns the positions [N] of a micro-batch's outputs that carry loss: b T + t, ascending; perhaps none.

        Head and loss are then computed for these alone. None: `loss` gets all outputs, as those of a classifier, one per row. A
        function of labels only: a host that gets the labels calls it too.
        """
        ...

    def loss(
        self, output: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor | None = None, *, training: bool = False
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Returns a loss sum in fp32 (to be divided by counts), and the sums of other metrics by name.

        output: logits [N, V], or values [N, O], at the positions `rows`, some or all of `loss_rows` (None: all of them); if `loss_rows`
        is None, the head's whole output. labels: of the whole micro-batch. A function of tensors only, as `loss_rows` is. training:
        whether the loss is learned from, with task.label_smoothing; what is only measured is without it.
        """
        ...


def segments_of(lengths: Sequence[int], row_lengths: Sequence[int]) -> list[list[int]]:
    """Splits the lengths of packed examples up by row. Empty lengths: no row is packed. Raises ValueError if they do not fill the rows."""
    if not lengths:
        return []
    segments: list[list[int]] = []
    left = iter(lengths)
    for row in row_lengths:
        segments.append([])
        filled = 0
        while filled < row:
            length = next(left, 0)
            if not 0 < length <= row - filled:
                raise ValueError("an example without tokens, or beyond its row")
            segments[-1].append(length)
            filled += length
    if next(left, 0):
        raise ValueError("an example beyond the rows")
    return segments


def cut(examples: Sequence[_Example], pieces: int) -> list[list[_Example]]:
    """Cuts a batch into the rows of at most `pieces` micro-batches, sorted by length so that padding is small."""
    ordered = sorted(examples, key=lambda example: example.length)
    size, larger = divmod(len(ordered), pieces)
    parts, start = [], 0
    for number in range(pieces):
        rows = ordered[start : start + size + (number < larger)]
        start += len(rows)
        if rows:
            parts.append(rows)
    return parts


def pad(rows: Sequence[list[int]], fill: int) -> torch.Tensor:
    """Stacks `rows` to [B, T], with `fill` after the shorter ones."""
    padded_BT = torch.full((len(rows), max(map(len, rows))), fill, dtype=torch.long)
    for number, row in enumerate(rows):
        padded_BT[number, : len(row)] = torch.tensor(row)
    return padded_BT


def value_units(examples: Sequence[ValueExample], pieces: int) -> list[Unit]:
    """Cuts a batch of values into at most `pieces` micro-batches. Padding is 0 in the inputs, and not a number in the labels."""
    return [
        Unit(
            _padded([row.inputs for row in rows], 0.0),
            _padded([row.labels for row in rows], torch.nan),
            [row.length for row in rows],
            sum(row.count for row in rows),
        )
        for rows in cut(examples, pieces)
    ]


def _padded(rows: Sequence[np.ndarray], fill: float) -> torch.Tensor:
    """Stacks rows [T, F] to [B, T, F], with `fill` after the shorter ones."""
    return pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True, padding_value=fill)


def real_rows(labels_BTL: torch.Tensor) -> torch.Tensor:
    """Returns the positions [N] of a micro-batch of values that are no padding: b T + t, ascending."""
    return (~labels_BTL[..., 0].isnan()).flatten().nonzero().flatten()
