"""Causal language modelling: makes token ids and labels of a prompt and its answer, and a loss sum of logits.

Knows nothing about stages and links. Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch.nn import functional

from edgelam_fl.errors import ConfigError, DataError
from edgelam_fl.tasks.base import Example, Made, Unit, cut, pad
from edgelam_fl.tasks.data import Message, Pair, Prompt, TaskSettings

IGNORED = -100  # a position without a label


class CausalLm:
    """Predicts the tokens of answers.

    With the weighting "labels" every labelled token has the same weight; with "examples" every example has, by its mean token
    loss.
    """

    def __init__(self, tokenizer_folder: Path, settings: TaskSettings) -> None:
        self._tokenizer_folder = tokenizer_folder
        self.template, self.max_tokens = settings.template, settings.max_tokens
        self.loss_on, self.weighting = settings.loss_on, settings.weighting

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._tokenizer_folder)

    def prompt_text(self, prompt: Prompt) -> str:
        """Writes what comes before the answer: nothing for a passage, which has no prompt."""
        if self.template == "chat":
            return self._chat_text(_messages(prompt), add_generation_prompt=True)
        if not isinstance(prompt, str):
            raise DataError(f"a chat needs task.template = 'chat', got {self.template!r}", "chat")
        if self.template == "plain":
            return f"{prompt}\n" if prompt else ""
        return self.template.replace("{prompt}", prompt).removesuffix("{answer}")

    def _answer_text(self, prompt: Prompt, answer: str) -> str:
        if self.template != "chat":
            return answer + (self.tokenizer.eos_token or "")
        before = self.prompt_text(prompt)
        whole = self._chat_text([*_messages(prompt), {"role": "assistant", "content": answer}])
        if not whole.startswith(before):
            raise ConfigError(
                "task.template = 'chat': the model's own template writes a chat with its answer differently from the prompt "
                f"alone, {before[-40:]!r}; give a text with {{prompt}} and {{answer}} instead"
            )
        return whole.removeprefix(before)

    def _chat_text(self, turns: list[Message], **how: bool) -> str:
        if not self.tokenizer.chat_template:
            raise ConfigError("task.template = 'chat', but the model has no chat template; set 'plain' or a text")
        try:
            return self.tokenizer.apply_chat_template(turns, tokenize=False, **how)
        except TemplateError as error:
            roles = ", ".join(turn["role"] for turn in turns)
            raise DataError(f"the model's chat template refuses a chat of {roles:.80}: {error}", "template") from error

    def examples(self, pairs: Sequence[Pair]) -> Made:
        """Makes examples of pairs; skips those of whose answer `max_tokens` leaves nothing."""
        made = [self._example(prompt, answer) for prompt, answer in pairs]
        kept = [(example, was_cut) for example, was_cut in made if example.count]
        return Made([example for example, _ in kept], sum(was_cut for _, was_cut in kept), len(made) - len(kept))

    def _example(self, prompt: Prompt, answer: str) -> tuple[Example, bool]:
        """Returns an example and whether it was cut."""
        before = self.tokenizer(self.prompt_text(prompt), add_special_tokens=False)["input_ids"]
        after = self.tokenizer(self._answer_text(prompt, answer), add_special_tokens=False)["input_ids"]
        labels = before + after if self.loss_on == "all" else [IGNORED] * len(before) + after
        labels = labels[: self.max_tokens]
        count = labelled(labels)
        ids = (before + after)[: self.max_tokens]
        was_cut = len(ids) < len(before + after)
        return Example(ids, labels, min(count, 1) if self._by_example else count), was_cut

    @property
    def _by_example(self) -> bool:
        return self.weighting == "examples"

    def units(self, examples: Sequence[Example], pieces: int) -> list[Unit]:
        return make_units(examples, pieces)

    def loss(self, output: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        return (sum_of_means if self._by_example else loss_sum)(output, labels), {}


def _messages(prompt: Prompt) -> list[Message]:
    """Returns the messages before the answer."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt.messages[:-1])


def labelled(labels: Sequence[int]) -> int:
    """Counts the tokens that are learned; the first token has nothing to be predicted from."""
    return sum(label != IGNORED for label in labels[1:])


def make_units(examples: Sequence[Example], pieces: int) -> list[Unit]:
    """Cuts a batch into at most `pieces` micro-batches."""
    return [
        Unit(
            pad([row.ids for row in rows], 0),
            pad([row.labels for row in rows], IGNORED),
            [len(row.ids) for row in rows],
            sum(row.count for row in rows),
        )
        for rows in cut(examples, pieces)
    ]


def loss_sum(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Sums the token losses over labelled positions, in fp32; position t predicts token t + 1."""
    predicted = logits_BTV[:, :-1].flatten(0, 1).float()
    return functional.cross_entropy(predicted, labels_BT[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")


def sum_of_means(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Sums the mean token loss of each row, in fp32; a row without labels adds nothing."""
    targets_BT = labels_BT[:, 1:]
    scores_BVT = logits_BTV[:, :-1].float().transpose(1, 2)
    losses_BT = functional.cross_entropy(scores_BVT, targets_BT, ignore_index=IGNORED, reduction="none")
    return (losses_BT.sum(1) / (targets_BT != IGNORED).sum(1).clamp(min=1)).sum()
