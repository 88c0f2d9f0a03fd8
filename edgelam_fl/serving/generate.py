"""Generates text from a model greedily: each new token is the likeliest, after what its generation_config.json forbids or rewards.

`greedy` knows neither models nor texts: it asks a function for logits, which may be a model in this process
(`LocalSpeaker`) or a route over other nodes (`federation.remote.RouteSpeaker`). Knows no network. Shapes: V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from edgelam_fl.config import ModelSection, RunConfig, TaskSection
from edgelam_fl.errors import ConfigError, ModelError
from edgelam_fl.model.chip import CPU, off
from edgelam_fl.model.generation import GENERATION, applied, left_out
from edgelam_fl.model.limits import positions_of
from edgelam_fl.model.source import find_model
from edgelam_fl.model.whole import CutOnWhole, load_whole, put_on
from edgelam_fl.tasks.causal_lm import CausalLm
from edgelam_fl.tasks.chat_template import count_turns, without_oldest
from edgelam_fl.tasks.data import Message
from edgelam_fl.tasks.masking import Opening

Step = Callable[[Sequence[int], int], torch.Tensor]
"""(ids, position) -> logits [V] after the last of `ids`, whose first is at `position` of the text.

Called with the whole prompt at position 0, then with each new token alone: a KV cache keeps the earlier tokens.
"""
_HALF_A_CHARACTER = "\ufffd"


Change = Callable[[Sequence[int], torch.Tensor], torch.Tensor]
"""(all ids so far, logits [V]) -> logits [V] as the model's generation_config.json wants them."""


def greedy(
    step: Step, ids: Sequence[int], max_tokens: int, stop_ids: Collection[int], change: Change | None = None
) -> Iterator[int]:
    """Yields at most `max_tokens` tokens that follow `ids`; ends before the first of `stop_ids`."""
    feed, position, text = list(ids), 0, list(ids)
    for _ in range(max_tokens):
        logits_V = step(feed, position)
        token = int((change(text, logits_V) if change else logits_V).argmax())
        if token in stop_ids:
            return
        yield token
        feed, position = [token], position + len(feed)
        text.append(token)


def change_of(settings: Mapping[str, Any], prompt_tokens: int, stop_ids: Collection[int]) -> Change | None:
    """Returns what `generation.applied` asks for, computed by transformers; None if it asks for nothing.

    Raises ModelError for a value that transformers refuses.
    """
    ends = sorted(stop_ids)
    kinds: dict[str, Callable[[Any], LogitsProcessor]] = {
        "sequence_bias": SequenceBiasLogitsProcessor,
        "repetition_penalty": RepetitionPenaltyLogitsProcessor,
        "no_repeat_ngram_size": NoRepeatNGramLogitsProcessor,
        "bad_words_ids": lambda words: NoBadWordsLogitsProcessor(words, ends),
        "min_length": lambda length: MinLengthLogitsProcessor(length, ends),
        "min_new_tokens": lambda length: MinNewTokensLengthLogitsProcessor(prompt_tokens, length, ends),
        "suppress_tokens": SuppressTokensLogitsProcessor,
        "begin_suppress_tokens": lambda tokens: SuppressTokensAtBeginLogitsProcessor(tokens, prompt_tokens),
    }
    processors = LogitsProcessorList()
    for key, value in settings.items():
        try:
            processors.append(kinds[key](value))
        except (ValueError, TypeError) as error:
            raise ModelError(f"{GENERATION}: {key} = {str(value)[:60]} is refused by transformers: {error}") from error

    def change(ids: Sequence[int], logits_V: torch.Tensor) -> torch.Tensor:
        scores_1V: torch.Tensor = processors(torch.tensor([list(ids)]), logits_V[None].float().clone())
        return scores_1V[0]

    return change if processors else None


def pieces(tokens: Iterable[int], decode: Callable[[list[int]], str]) -> Iterator[str]:
    """Yields the text of `tokens` in pieces as it grows. A character of several tokens is yielded once complete."""
    taken: list[int] = []
    said = ""
    for token in tokens:
        taken.append(token)
        text = decode(taken)
        if not text.endswith(_HALF_A_CHARACTER):
            yield text[len(said) :]
            said = text
    rest = decode(taken)[len(said) :]
    if rest:
        yield rest


def behind(given: str, said: Iterable[str]) -> Iterator[str]:
    """Yields the pieces of an answer without `given`, if the answer begins with it: the prompt's last characters, said again.

    The white space that `given` begins with may be missing, since some tokenizers leave it out of the first word.
    """
    forms, begun, is_open = sorted({given, given.lstrip()}, key=len, reverse=True), "", True
    for piece in said:
        begun += piece
        if is_open and any(form != begun and form.startswith(begun) for form in forms):
            continue  # it may yet become one of them
        if is_open:
            begun = begun[len(next((form for form in forms if begun.startswith(form)), "")) :]
        if begun:
            yield begun
        begun, is_open = "", False
    if begun and begun not in forms:
        yield begun


class Speaker(ABC):
    """Answers questions in text, put as a run's task puts them. Subclasses know where the model is."""

    def __init__(self, model: ModelSection, task: TaskSection) -> None:
        self._source = find_model(model.name)
        self._task = CausalLm(self._source.folder, task)
        self.omitted: list[str] = []
        """What was left out in the latest answer, as sentences without a full stop."""

    @abstractmethod
    def opened(self, tuned: bool) -> AbstractContextManager[Step]:
        """Begins a new text; gives the function for its logits. tuned: with the run's adapter, else without."""

    @property
    def remembers(self) -> bool:
        """Whether the answer depends on earlier turns of a conversation; only the model's own chat template has turns."""
        return self._task.template == "chat"

    @property
    def remark(self) -> str:
        """Says which settings of the model's generation_config.json are not computed here; "" if all are."""
        asked = ", ".join(f"{key} = {str(value)[:40]}" for key, value in left_out(self._source.folder).items())
        return (
            f"{GENERATION} of {self._source.name} asks for {asked}, which is left out: answers are greedy"
            if asked
            else ""
        )

    def say(self, conversation: Sequence[Message], max_tokens: int, *, tuned: bool = True) -> Iterator[str]:
        """Yields the answer to the last message in pieces. Raises ConfigError if the message is too long for the model."""
        self.omitted = []
        begin = self._opening(conversation, max_tokens)
        tokenizer = self._task.tokenizer
        with torch.no_grad(), self.opened(tuned) as step:
            ends = self._source.stop_ids
            change = change_of(applied(self._source.folder), len(begin.ids), ends)
            tokens = self._counted(greedy(step, begin.ids, max_tokens, ends, change), max_tokens)
            said = pieces(tokens, lambda taken: tokenizer.decode(taken, skip_special_tokens=True))
            yield from behind(begin.given, said)

    def _counted(self, tokens: Iterable[int], max_tokens: int) -> Iterator[int]:
        """Passes the tokens of an answer on, and remarks an answer that did not end by itself."""
        count = 0
        for count, token in enumerate(tokens, 1):  # noqa: B007 - the last one counts
            yield token
        if count == max_tokens:
            self.omitted.append(f"the answer was cut at {max_tokens} tokens (--max-tokens)")

    def _opening(self, conversation: Sequence[Message], max_tokens: int) -> Opening:
        """Returns what the answer comes after; leaves out the oldest turns if the model's context is too short for all."""
        positions = positions_of(self._source)
        room = (positions.most if positions else 2**31) - max_tokens
        turns = list(conversation) if self.remembers else [conversation[-1]]
        begin = self._task.opening(turns)
        for gone in range(1, count_turns(turns)):
            if len(begin.ids) <= room:
                break
            begin = self._task.opening(without_oldest(turns, gone))
            left_out = f"the oldest {gone} of {count_turns(turns)} turns were left out"
            self.omitted = [f"{left_out}: {self._source.name} holds {room + max_tokens} tokens with the answer"]
        if len(begin.ids) > room:
            raise ConfigError(
                f"the question takes {len(begin.ids)} tokens and the answer up to {max_tokens}; {self._source.name} holds "
                f"{room + max_tokens} together. Ask something shorter or lower --max-tokens"
            )
        return begin


class LocalSpeaker(Speaker):
    """A run's whole model on a chip of this machine: the base, with the run's adapter after `put_on`."""

    def __init__(self, model: ModelSection, task: TaskSection, chip: torch.device = CPU) -> None:
        super().__init__(model, task)
        self._chip = chip
        self._model: Any = load_whole(self._source, "fp32" if model.base == "auto" else model.base, chip)
        self._adapter: Path | None = None
        self._cut: CutOnWhole | None = None

    def put_on(self, adapter: Path) -> None:
        """Puts the adapter of a folder on the base, in place of an earlier one."""
        if adapter != self._adapter:
            base = self._model.unload() if isinstance(self._model, PeftModel) else self._model
            self._model, self._adapter, self._cut = put_on(base, adapter), adapter, CutOnWhole(adapter)

    @contextmanager
    def opened(self, tuned: bool) -> Iterator[Step]:
        cache = None

        def step(ids: Sequence[int], position: int) -> torch.Tensor:
            nonlocal cache
            inputs = torch.tensor([list(ids)]).to(self._chip)
            positions = torch.arange(position, position + len(ids))[None].to(self._chip)
            output = self._model(input_ids=inputs, position_ids=positions, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            return off(output.logits[0, -1])

        without = self._model.disable_adapter() if self._adapter and not tuned else nullcontext()
        with without, self._cut.on(self._model) if self._cut and tuned else nullcontext():
            yield step


def answer(config: RunConfig, adapter: Path | None, question: str, max_tokens: int) -> str:
    """Returns the whole answer to one question. adapter: a run's adapter folder; None: the base alone."""
    speaker = _speaker(config.model, config.task, find_model(config.model.name).digest)
    if adapter is not None:
        speaker.put_on(adapter)
    asked = [{"role": "user", "content": question}]
    return "".join(speaker.say(asked, max_tokens, tuned=adapter is not None)).strip()


@lru_cache(maxsize=1)
def _speaker(model: ModelSection, task: TaskSection, _: str) -> LocalSpeaker:
    """Loads a model once for the same settings and identity."""
    return LocalSpeaker(model, task)
