"""Causal language modelling: makes examples of prompts and answers by a template, and a loss sum of logits.

Knows nothing about stages and links. Shapes: B rows, T tokens, N positions that carry loss, V vocabulary.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from edgelam_fl.errors import DataError
from edgelam_fl.model.generation import stop_ids
from edgelam_fl.model.tokenizer import load_tokenizer
from edgelam_fl.tasks.base import Example, Made, Unit, cut, pad
from edgelam_fl.tasks.chat_template import ChatTemplate, Stretch, count_turns, without_oldest
from edgelam_fl.tasks.data import Chat, Message, Pair, Prompt, TaskSettings
from edgelam_fl.tasks.masking import IGNORED, Labelled, Opening, Written, cut_prompt, labelled_text, opening
from edgelam_fl.tasks.packing import packed_unit


class _Lost(NamedTuple):
    """The part that an example lost because it was too long."""

    a_part: bool = False
    of_answer: bool = False


class CausalLm:
    """Predicts the tokens of answers.

    With the weighting "labels" every labelled token has the same weight; with "examples" every example has, by its mean token
    loss.
    """

    def __init__(self, tokenizer_folder: Path, settings: TaskSettings) -> None:
        self._tokenizer_folder = tokenizer_folder
        self.template, self.max_tokens = settings.template, settings.max_tokens
        self.loss_on, self.weighting, self.too_long = settings.loss_on, settings.weighting, settings.too_long
        self._label_smoothing, self._packs = settings.label_smoothing, settings.packing
        self._skips_refused = (
            getattr(settings, "bad_lines", "refuse") == "skip"
        )  # the section of a run file has no such key

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self._tokenizer_folder)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """The tokens at which generation stops."""
        return stop_ids(self._tokenizer_folder) | ({self.tokenizer.eos_token_id} - {None})

    @cached_property
    def _chats(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer)

    # ---------------------------------------------------------------- what generation begins with

    def prompt_text(self, prompt: Prompt) -> str:
        """Writes what comes before the answer: nothing for a passage, which has no prompt."""
        if self.template == "chat":
            chat = _chat(prompt, "")
            return self._chats.prompt(chat.messages[:-1], chat.tools)[0]
        if not isinstance(prompt, str):
            raise DataError(f"a chat needs task.template = 'chat', got {self.template!r}", "chat")
        if self.template == "plain":
            return f"{prompt}\n" if prompt else ""
        return self.template.replace("{prompt}", prompt).removesuffix("{answer}")

    def opening(self, messages: Sequence[Message]) -> Opening:
        """Returns what generation of the next answer begins with. Without the template "chat" only the last message counts."""
        if self.template == "chat":
            return opening(self.tokenizer, *self._chats.prompt(messages), bare=False)
        return opening(self.tokenizer, self.prompt_text(str(messages[-1]["content"])), "", bare=True)

    # ---------------------------------------------------------------- what is learned

    def examples(self, pairs: Sequence[Pair]) -> Made:
        """Makes examples of pairs. Counts those that `max_tokens` cuts, and skips those of which nothing is left to learn.

        With data.bad_lines = "skip" it leaves out those that the chat template refuses, and counts them.
        """
        made = []
        for prompt, answer in pairs:
            try:
                made.append(self._example(prompt, answer))
            except DataError as error:
                if not self._skips_refused or error.fault != "template":
                    raise
        kept = [(example, lost) for example, lost in made if example is not None and example.count]
        return Made(
            [example for example, _ in kept],
            cut=sum(lost.a_part for _, lost in kept),
            skipped=len(made) - len(kept),
            refused=len(pairs) - len(made),
            cut_answers=sum(lost.of_answer for _, lost in kept),
        )

    def seen(self, example: Example) -> list[tuple[str, bool]]:
        is_learned = [False, *(label != IGNORED for label in example.labels[1:])]
        found, end, before = list[tuple[str, bool]](), 0, ""
        for learned, stretch in groupby(is_learned):
            end += len(list(stretch))
            text = str(self.tokenizer.decode(example.ids[:end], clean_up_tokenization_spaces=False))
            found.append((text[len(before) :], learned))
            before = text
        return found

    def _example(self, prompt: Prompt, answer: str) -> tuple[Example | None, _Lost]:
        """Returns an example, None if it is too long and skipped, and what it lost."""
        whole = self._labelled(prompt, answer)
        is_long = len(whole.ids) > self.max_tokens
        if is_long and self.too_long == "skip":
            return None, _Lost()
        of_answer = len(whole.ids) - whole.answer if prompt else 0  # a passage answers nothing
        if is_long and self.too_long == "cut-end":
            whole = Labelled(whole.ids[: self.max_tokens], whole.labels[: self.max_tokens], whole.kept, whole.answer)
        elif is_long:
            whole = cut_prompt(self._shortened(prompt) if isinstance(prompt, Chat) else whole, self.max_tokens)
        count = labelled(whole.labels)
        lost = _Lost(is_long, len(whole.ids) - whole.answer < of_answer)
        return Example(whole.ids, whole.labels, min(count, 1) if self._by_example else count), lost

    def _shortened(self, chat: Chat) -> Labelled:
        """Leaves out as many of a chat's oldest turns as it takes to fit; at most all but the last."""

        def after(turns: int) -> Labelled:
            return self._labelled(Chat(tuple(without_oldest(chat.messages, turns)), chat.tools), "")

        turns = max(1, count_turns(chat.messages))
        fitting = bisect_left(range(turns), True, key=lambda number: len(after(number).ids) <= self.max_tokens)
        return after(min(fitting, turns - 1))

    def _labelled(self, prompt: Prompt, answer: str) -> Labelled:
        return labelled_text(self.tokenizer, self._written(prompt, answer), self.stop_ids, self.loss_on == "all")

    def _written(self, prompt: Prompt, answer: str) -> Written:
        """Writes prompt and answer as one text by the template."""
        if self.template == "chat":
            chat = _chat(prompt, answer)
            text = self._chats.whole(chat)
            find = self._chats.turns if self.loss_on == "assistant" else self._chats.answers
            return Written(text, tuple(find(chat, text)), bare=False)
        before = self.prompt_text(prompt)
        end = len(before) + len(answer)
        return Written(before + answer, (Stretch(len(before), end, end),), bare=True, is_passage=not before)

    @property
    def _by_example(self) -> bool:
        return self.weighting == "examples"

    def units(self, examples: Sequence[Example], pieces: int) -> list[Unit]:
        return make_units(examples, pieces, self.max_tokens if self._packs else 0)

    def loss_rows(self, labels: torch.Tensor) -> torch.Tensor | None:
        return loss_rows(labels)

    def loss(
        self, output: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor | None = None, *, training: bool = False
    ) -> tuple[torch.Tensor, dict[str, float]]:
        smoothing = self._label_smoothing if training else 0.0
        rows_N = (loss_rows(labels) if rows is None else rows).to(output.device)
        labels = labels.to(output.device)
        return (sum_of_means if self._by_example else loss_sum)(output, labels, rows_N, smoothing), {}


def _chat(prompt: Prompt, answer: str) -> Chat:
    """Returns a whole chat; of a text as prompt, one with the answer."""
    if isinstance(prompt, Chat):
        return prompt
    return Chat(({"role": "user", "content": prompt}, {"role": "assistant", "content": answer}))


def labelled(labels: Sequence[int]) -> int:
    """Counts the tokens that are learned; the first token has nothing to be predicted from."""
    return sum(label != IGNORED for label in labels[1:])


def question(example: Example) -> tuple[list[int], list[int]] | None:
    """Splits an example into the tokens before its last answer, and those of that answer; None if no token is before it."""
    labelled_at = [place for place, label in enumerate(example.labels) if label != IGNORED]
    if not labelled_at:
        return None
    first = end = labelled_at[-1] + 1
    while first and example.labels[first - 1] != IGNORED:
        first -= 1
    return (example.ids[:first], example.ids[first:end]) if first else None


def make_units(examples: Sequence[Example], pieces: int, packed: int = 0) -> list[Unit]:
    """Cuts a batch into at most `pieces` micro-batches. packed: tokens of the longest row of several examples; 0: none are packed."""
    return [(packed_unit(rows, packed) if packed else None) or _padded_unit(rows) for rows in cut(examples, pieces)]


def _padded_unit(rows: Sequence[Example]) -> Unit:
    return Unit(
        pad([row.ids for row in rows], 0),
        pad([row.labels for row in rows], IGNORED),
        [len(row.ids) for row in rows],
        sum(row.count for row in rows),
    )


def loss_rows(labels_BT: torch.Tensor) -> torch.Tensor:
    """Returns the positions [N], b T + t, whose next token is labelled; ascending."""
    is_labelled_BT = functional.pad(labels_BT[:, 1:] != IGNORED, (0, 1))
    return is_labelled_BT.flatten().nonzero().flatten()


def loss_sum(
    logits_NV: torch.Tensor, labels_BT: torch.Tensor, rows_N: torch.Tensor, smoothing: float = 0.0
) -> torch.Tensor:
    """Sums the token losses at the positions `rows_N`, in fp32; position t predicts token t + 1. smoothing: of labels, 0 to 1."""
    return _token_losses(logits_NV, labels_BT, rows_N, smoothing, "sum")


def sum_of_means(
    logits_NV: torch.Tensor, labels_BT: torch.Tensor, rows_N: torch.Tensor, smoothing: float = 0.0
) -> torch.Tensor:
    """Sums the mean token loss of each example, in fp32; one without labels adds nothing. smoothing: as of `loss_sum`."""
    count_B = (labels_BT[:, 1:] != IGNORED).sum(1)
    losses_N = _token_losses(logits_NV, labels_BT, rows_N, smoothing, "none")
    return (losses_N / count_B[rows_N // labels_BT.shape[1]].to(losses_N.device)).sum()


def _token_losses(
    logits_NV: torch.Tensor, labels_BT: torch.Tensor, rows_N: torch.Tensor, smoothing: float, reduction: str
) -> torch.Tensor:
    targets_N = labels_BT.flatten()[rows_N + 1].to(logits_NV.device)
    return functional.cross_entropy(logits_NV.float(), targets_N, reduction=reduction, label_smoothing=smoothing)
