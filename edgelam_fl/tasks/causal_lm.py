"""Causal language modelling: pairs of text -> token ids and labels; logits -> a loss sum and a label count.

Knows nothing about stages and links. Sums and counts, never means: means of unequal pieces do not add up.
Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoTokenizer

from edgelam_fl.errors import DataError

IGNORED = -100  # a position without a label


@dataclass(frozen=True)
class Example:
    ids: list[int]
    labels: list[int]  # ids, or IGNORED where nothing is learned

    @property
    def label_count(self) -> int:
        return sum(label != IGNORED for label in self.labels[1:])  # the first token is predicted from nothing


@dataclass(frozen=True)
class Unit:
    """One micro-batch: padded on the right."""

    ids_BT: torch.Tensor
    labels_BT: torch.Tensor
    row_lengths: list[int]
    label_count: int


class CausalLm:
    """The task of one device: a tokenizer and the run's settings."""

    def __init__(self, tokenizer_folder: Path, *, template: str, max_tokens: int, loss_on: str) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer_folder)
        self.template, self.max_tokens, self.loss_on = template, max_tokens, loss_on

    def prompt_text(self, prompt: str) -> str:
        """What stands before the answer."""
        if self.template == "chat":
            return self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
        template = "{prompt}\n{answer}" if self.template == "plain" else self.template
        return template.replace("{prompt}", prompt).removesuffix("{answer}")

    def _answer_text(self, prompt: str, answer: str) -> str:
        if self.template != "chat":
            return answer + (self.tokenizer.eos_token or "")
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        whole = self.tokenizer.apply_chat_template(turns, tokenize=False)
        return whole.removeprefix(self.prompt_text(prompt))

    def examples(self, pairs: list[tuple[str, str]]) -> list[Example]:
        """Raises DataError where `max_tokens` leaves no room for any answer."""
        made = [self._example(prompt, answer) for prompt, answer in pairs]
        kept = [example for example in made if example.label_count]
        if not kept:
            raise DataError(f"no example has an answer within task.max_tokens = {self.max_tokens}; raise it")
        return kept

    def _example(self, prompt: str, answer: str) -> Example:
        before = self.tokenizer(self.prompt_text(prompt), add_special_tokens=False)["input_ids"]
        after = self.tokenizer(self._answer_text(prompt, answer), add_special_tokens=False)["input_ids"]
        ids = before + after
        labels = ids if self.loss_on == "all" else [IGNORED] * len(before) + after
        limit = self.max_tokens
        return Example(ids[:limit], labels[:limit])


def make_units(examples: list[Example], pieces: int) -> list[Unit]:
    """A batch in at most `pieces` micro-batches, rows sorted by length so that little is padding."""
    ordered = sorted(examples, key=lambda example: len(example.ids))
    size, larger = divmod(len(ordered), pieces)
    units, start = [], 0
    for number in range(pieces):
        rows = ordered[start : start + size + (number < larger)]
        start += len(rows)
        if rows:
            units.append(_pad(rows))
    return units


def _pad(rows: list[Example]) -> Unit:
    tokens = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), tokens, dtype=torch.long)
    labels = torch.full((len(rows), tokens), IGNORED, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row.ids)] = torch.tensor(row.ids)
        labels[number, : len(row.ids)] = torch.tensor(row.labels)
    return Unit(ids, labels, [len(row.ids) for row in rows], sum(row.label_count for row in rows))


def loss_sum(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Sum of the token losses over labelled positions, in fp32: position t predicts token t + 1."""
    predicted = logits_BTV[:, :-1].flatten(0, 1).float()
    return functional.cross_entropy(predicted, labels_BT[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")
