"""What every task is made of: examples, micro-batches of them, and a loss as a sum with what it is divided by.

Knows nothing about stages and links. Sums and counts, never means: means of unequal pieces do not add up.
Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from edgelam_fl.tasks.data import Pair


@dataclass(frozen=True)
class Example:
    ids: list[int]
    labels: list[int]  # causal-lm: one a token; classification: the class's number, alone
    count: int  # what its loss is weighted by: labelled tokens, or 1


@dataclass(frozen=True)
class Unit:
    """One micro-batch: padded on the right."""

    ids_BT: torch.Tensor
    labels: torch.Tensor  # [B, T] causal-lm, [B] classification
    row_lengths: list[int]
    count: int  # n of the unit: labelled tokens, or examples


class Task(Protocol):
    """The settings of one run's task. A tokenizer is loaded when `examples` is first asked for, and not before."""

    def examples(self, pairs: Sequence[Pair]) -> list[Example]:
        """Raises DataError where nothing can be learned from them."""
        ...

    def units(self, examples: Sequence[Example], pieces: int) -> list[Unit]:
        """A batch in at most `pieces` micro-batches."""
        ...

    def loss(self, output: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        """A unit's loss sum in fp32 (to be divided by counts), and the sums of its other metrics by name.

        A function of tensors only: a host that is sent the labels calls it too.
        """
        ...


def cut(examples: Sequence[Example], pieces: int) -> list[list[Example]]:
    """The rows of at most `pieces` micro-batches, sorted by length so that little is padding."""
    ordered = sorted(examples, key=lambda example: len(example.ids))
    size, larger = divmod(len(ordered), pieces)
    parts, start = [], 0
    for number in range(pieces):
        rows = ordered[start : start + size + (number < larger)]
        start += len(rows)
        if rows:
            parts.append(rows)
    return parts


def pad(rows: Sequence[list[int]], fill: int) -> torch.Tensor:
    """[B, T]: `rows` with `fill` behind the shorter ones."""
    padded_BT = torch.full((len(rows), max(map(len, rows))), fill, dtype=torch.long)
    for number, row in enumerate(rows):
        padded_BT[number, : len(row)] = torch.tensor(row)
    return padded_BT
