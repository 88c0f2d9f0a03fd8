"""Turns a whole text into token ids and labels: the one function for all that a model of language learns or is asked.

The ids are the tokenizer's ids of the whole text, never of parts put together, since a tokenizer writes parts differently:
a model would learn answers that begin with tokens which it never sees. The places of the tokens in the text say which of
them are learned. Knows no messages and no settings of a run.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from edgelam_fl.errors import ConfigError
from edgelam_fl.tasks.chat_template import Stretch

IGNORED = -100  # a position without a label
_LIKELY = "A"  # a letter, as most answers begin with one


@dataclass(frozen=True)
class Written:
    """A whole text, and the turns in it that are learned."""

    text: str
    turns: tuple[Stretch, ...]  # in their order; the last one is the answer
    bare: bool  # without special tokens of its own, which the tokenizer adds as it does to any text
    is_passage: bool = False  # a text that answers nothing, and may go without an end


@dataclass(frozen=True)
class Labelled:
    """The tokens of a whole text, ready to be learned."""

    ids: list[int]
    labels: list[int]
    kept: (
        int  # first tokens that stay when the prompt is cut: what the tokenizer or the template begins every text with
    )
    answer: int  # number of the answer's first token


@dataclass(frozen=True)
class Opening:
    """What generation begins with."""

    ids: list[int]
    given: str
    """Text between the last of the tokens and the answer's own words; an answer that begins with it repeats the template."""


class _Tokens:
    """The token ids of a text, and the places of characters among them."""

    def __init__(self, tokenizer: Any, text: str) -> None:
        self._tokenizer, self._text = tokenizer, text
        offsets = {"return_offsets_mapping": True} if tokenizer.is_fast else {}
        found = tokenizer(text, add_special_tokens=False, **offsets)
        self.ids: list[int] = list(found["input_ids"])
        places = found.get("offset_mapping")
        self._places = None if places is None else ([start for start, _ in places], [end for _, end in places])

    def reaching(self, place: int) -> int:
        """Returns the number of the first token that reaches behind a place in the text.

        A token on both sides of the border of prompt and answer thus belongs to the answer: it is the one that the model has to
        say after the tokens before it.
        """
        return self._shared(place) if self._places is None else bisect_right(self._places[1], place)

    def behind(self, place: int) -> int:
        """Returns the number of the first token that lies behind a place in the text."""
        if place >= len(self._text):
            return len(self.ids)
        return self._shared(place) if self._places is None else bisect_left(self._places[0], place)

    def end(self, number: int) -> int:
        """Returns where a token ends in the text."""
        if self._places is not None:
            return self._places[1][number]
        return next(n for n in range(len(self._text) + 1) if self._shared(n) > number)

    def _shared(self, place: int) -> int:
        """Counts the first tokens that the text up to a place has in common with the whole: for a tokenizer without offsets."""
        part = self._tokenizer(self._text[:place], add_special_tokens=False)["input_ids"]
        pairs = enumerate(zip(part, self.ids, strict=False))
        return next((n for n, (one, other) in pairs if one != other), min(len(part), len(self.ids)))


def labelled_text(tokenizer: Any, written: Written, stop_ids: Collection[int], everything: bool) -> Labelled:
    """Returns ids and labels of a whole text. everything: all tokens are learned, not the turns alone.

    The answer ends with one of `stop_ids`: if none comes after its words, the tokenizer's end token is appended, and learned.
    Raises ConfigError if it has none.
    """
    tokens = _Tokens(tokenizer, written.text)
    ids = list(tokens.ids)
    before: list[int] = _added(tokenizer, ids) if written.bare else []
    spans = [_span(tokens, turn, stop_ids, written) for turn in written.turns]
    behind = tokens.behind(written.turns[-1].words_end)
    stop = next((number for number in range(behind, len(ids)) if ids[number] in stop_ids), None)
    if stop is None:
        ids += _end(tokenizer, stop_ids, written.is_passage)
        stop = len(ids) - 1
    spans[-1] = spans[-1][0], max(spans[-1][1], stop + 1)
    whole = before + ids
    labels = list(whole) if everything else [IGNORED] * len(whole)
    for start, end in spans:
        labels[len(before) + start : len(before) + end] = ids[start:end]
    return Labelled(whole, labels, _kept(tokenizer, whole, before), len(before) + spans[-1][0])


def _span(tokens: _Tokens, turn: Stretch, stop_ids: Collection[int], written: Written) -> tuple[int, int]:
    """Returns the numbers of a turn's first token and of the first one behind it, with the end token if one is next."""
    end = turn.end
    if end is None:  # up to the first end token, and the white space behind it
        bound = min((other.start for other in written.turns if other.start > turn.start), default=len(written.text))
        found = range(tokens.behind(turn.words_end), tokens.reaching(bound))
        stop = next((number for number in found if tokens.ids[number] in stop_ids), None)
        end = turn.words_end if stop is None else tokens.end(stop)
        if stop is not None:
            end += len(written.text[end:]) - len(written.text[end:].lstrip())
    first, behind = tokens.reaching(turn.start), tokens.behind(end)
    ended = any(token in stop_ids for token in tokens.ids[tokens.behind(turn.words_end) : behind])
    return first, behind + (not ended and behind < len(tokens.ids) and tokens.ids[behind] in stop_ids)


def _end(tokenizer: Any, stop_ids: Collection[int], may_lack: bool) -> list[int]:
    """Returns the token to append to an answer that nothing ends; none only if it may lack one."""
    marks = [tokenizer.eos_token_id, *sorted(set(tokenizer.all_special_ids) & set(stop_ids))]
    ends = [token for token in marks if token is not None][:1]
    if not ends and not may_lack:
        raise ConfigError(
            "nothing ends an answer: the model's tokenizer names no eos_token, and the template writes no token at which "
            "generation stops, so the model would never learn to stop; name an eos_token in tokenizer_config.json of a copy of "
            "the model's folder"
        )
    return ends


def _added(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """Returns the special tokens that the tokenizer itself writes before a text; none if the text begins with them already."""
    plain, own = (tokenizer(_LIKELY, add_special_tokens=special)["input_ids"] for special in (False, True))
    count = next((number for number in range(len(own)) if own[number : number + len(plain)] == plain), 0)
    return [] if list(ids[:count]) == own[:count] else list(own[:count])


def _kept(tokenizer: Any, ids: Sequence[int], before: Sequence[int]) -> int:
    return len(before) or int(tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id])


def opening(tokenizer: Any, text: str, given: str, bare: bool) -> Opening:
    """Returns the tokens that come before an answer in a whole text that begins with `text`.

    A token that the prompt's last characters share with an answer is the answer's, as in training, so it is not here; its
    characters come first in `given`, then what the template writes before an answer's words.
    """
    tokens = _Tokens(tokenizer, text + given + _LIKELY)
    count = tokens.reaching(len(text))
    ids = tokens.ids[:count]
    said = tokens.end(count - 1) if count else 0
    marks = _added(tokenizer, ids) if bare else []
    rest = text[said:] + given
    for token in tokenizer.all_special_tokens:
        rest = rest.replace(token, "")
    return Opening(marks + ids, rest)


def cut_prompt(whole: Labelled, max_tokens: int) -> Labelled:
    """Cuts the oldest tokens of the prompt behind those that every text begins with.

    An answer that is too long alone is cut at its end; then the prompt keeps its newest tokens in a half of the room.
    """
    room = max_tokens - whole.kept - (len(whole.ids) - whole.answer)
    if room < 0:
        room = max(0, max_tokens // 2 - whole.kept)
    first = max(whole.kept, whole.answer - room)
    ids, labels = ((row[: whole.kept] + row[first:])[:max_tokens] for row in (whole.ids, whole.labels))
    return Labelled(ids, labels, whole.kept, whole.answer - first + whole.kept)
