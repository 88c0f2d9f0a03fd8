"""Greedy answers of the model as it is, over a device's own route: one token after the other.

A host needs to know nothing of it: for each token, all tokens so far travel as in an evaluation. That costs a forward pass of the
whole text per token, and needs neither a cache at the hosts nor their leave. Knows token ids; knows no texts and no links.
Neighbour: `split.driver`, which takes micro-batches over the route.

Shapes: B rows, T tokens, N rows' last tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch

from edgelam_fl.tasks.base import Example, Made, Task, Unit, pad
from edgelam_fl.tasks.data import Pair
from edgelam_fl.tasks.masking import IGNORED

Cut = Callable[[Sequence[Example]], list[list[Example]]]  # cuts texts into micro-batches that the plan allows
Ask = Callable[[list[Unit], Task], None]  # takes micro-batches over the route, to the loss of a task


class NextToken:
    """A task without a loss: notes the likeliest next token of each row, under the number that is the row's only label."""

    def __init__(self) -> None:
        self.chosen: dict[int, int] = {}

    def examples(self, pairs: Sequence[Pair]) -> Made:
        """Makes nothing: what is asked is made by `greedy_answers`."""
        return Made([])

    def units(self, examples: Sequence[Example], pieces: int) -> list[Unit]:
        """Makes one micro-batch, in which each row's last token has the row's number as its label."""
        ids_BT = pad([row.ids for row in examples], 0)
        labels_BT = torch.full_like(ids_BT, IGNORED)
        for row, example in enumerate(examples):
            labels_BT[row, len(example.ids) - 1] = example.labels[0]
        return [Unit(ids_BT, labels_BT, [len(row.ids) for row in examples], len(examples))]

    def seen(self, example: Example) -> list[tuple[str, bool]]:
        """Shows nothing: it knows no texts."""
        return []

    def loss_rows(self, labels: torch.Tensor) -> torch.Tensor | None:
        return (labels != IGNORED).flatten().nonzero().flatten()

    def loss(
        self, output: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor | None = None, *, training: bool = False
    ) -> tuple[torch.Tensor, dict[str, float]]:
        rows_N = self.loss_rows(labels) if rows is None else rows
        numbers = labels.flatten()[rows_N].tolist()
        self.chosen.update(zip(numbers, output.argmax(-1).tolist(), strict=True))
        return torch.zeros(()), {}


def greedy_answers(
    prompts: Sequence[list[int]], *, most: int, longest: int, stop_ids: Collection[int], cut: Cut, ask: Ask
) -> list[list[int]]:
    """Returns the answers to some prompts, each up to a token of `stop_ids`, which is left out.

    An answer has at most `most` tokens, and with its prompt at most `longest`.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    is_open = {number for number, prompt in enumerate(prompts) if len(prompt) < longest}
    for _ in range(most):
        if not is_open:
            break
        texts = [Example([*prompts[number], *answers[number]], [number], 1) for number in sorted(is_open)]
        choice = NextToken()
        ask([unit for batch in cut(texts) for unit in choice.units(batch, 1)], choice)
        for number, token in choice.chosen.items():
            if token in stop_ids:
                is_open.discard(number)
                continue
            answers[number].append(token)
            if len(prompts[number]) + len(answers[number]) >= longest:
                is_open.discard(number)
    return answers
