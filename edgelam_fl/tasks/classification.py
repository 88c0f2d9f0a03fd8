"""Classification of texts: makes token ids and a number of a text and its class, and a loss sum and hits of logits.

Knows nothing about stages and links, nor where the logits come from. Shapes: B rows, T tokens, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from edgelam_fl.errors import DataError, nearest
from edgelam_fl.model.tokenizer import load_tokenizer
from edgelam_fl.tasks.base import Example, Made, Unit, cut, pad
from edgelam_fl.tasks.data import Pair, Prompt, TaskSettings


class Classification:
    """Predicts the class of a text: the prompt of a pair is the text, its answer is the class. All examples weigh the same."""

    def __init__(self, tokenizer_folder: Path, settings: TaskSettings) -> None:
        self._tokenizer_folder, self._skips = tokenizer_folder, settings.too_long == "skip"
        self.max_tokens, self.classes = settings.max_tokens, tuple(settings.classes)
        self._label_smoothing = settings.label_smoothing

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self._tokenizer_folder)

    def examples(self, pairs: Sequence[Pair]) -> Made:
        """Makes examples with the tokenizer's special tokens.

        A longer text is skipped, or its end is cut so that it has `max_tokens`, special tokens included.
        """
        made = [self._example(text, name) for text, name in pairs]
        long = sum(is_long for _, is_long in made)
        if self._skips:
            return Made([example for example, is_long in made if not is_long], skipped=long)
        return Made([example for example, _ in made], cut=long)

    def _example(self, text: Prompt, name: str) -> tuple[Example, bool]:
        """Returns an example and whether its text was too long."""
        if name not in self.classes:
            raise DataError(f"{name!r:.60} is none of task.classes ({nearest(name, self.classes)})", "unknown-class")
        ids = self.tokenizer(text)["input_ids"]
        is_long = len(ids) > self.max_tokens
        if is_long:  # again, so that the special tokens at the end stay
            ids = self.tokenizer(text, truncation=True, max_length=self.max_tokens)["input_ids"]
        return Example(ids, [self.classes.index(name)], 1), is_long

    def units(self, examples: Sequence[Example], pieces: int) -> list[Unit]:
        return [
            Unit(
                pad([row.ids for row in rows], 0),
                torch.tensor([row.labels[0] for row in rows]),
                [len(row.ids) for row in rows],
                len(rows),
            )
            for rows in cut(examples, pieces)
        ]

    def seen(self, example: Example) -> list[tuple[str, bool]]:
        text = str(self.tokenizer.decode(example.ids, clean_up_tokenization_spaces=False))
        return [(f"{text} -> ", False), (self.classes[example.labels[0]], True)]

    def loss_rows(self, labels: torch.Tensor) -> torch.Tensor | None:
        return None

    def loss(
        self, output: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor | None = None, *, training: bool = False
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Returns the sum of the cross-entropies of logits [B, C], and the number of rows that are "correct"."""
        smoothing, labels = self._label_smoothing if training else 0.0, labels.to(output.device)
        loss = functional.cross_entropy(output.float(), labels, reduction="sum", label_smoothing=smoothing)
        return loss, {"correct": float((output.argmax(-1) == labels).sum())}
