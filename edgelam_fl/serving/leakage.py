"""Measures what a host could read of a text at the cuts of a model: plays the host, on this machine, with the attacks.

The private side is the user's own text, the attacker's side is public text: docstrings of Python's standard library, which every machine has. An
attacker with public text that is more like the private one reads more. Only the front layers are loaded, in fp32 and without adapters. Knows
no run folder and prints nothing.

Shapes: B rows, T tokens of the longest row, D hidden, N tokens of all texts, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from edgelam_fl.config import RunConfig
from edgelam_fl.errors import DataError, EnvironmentProblem
from edgelam_fl.machine import memory_free_bytes
from edgelam_fl.model.adapter import Span
from edgelam_fl.model.memory import weights_bytes
from edgelam_fl.model.source import ModelSource
from edgelam_fl.model.stage import Stage, load_stages
from edgelam_fl.model.tokenizer import load_tokenizer
from edgelam_fl.plan.making import task_settings
from edgelam_fl.privacy.attacks import inverter, nearest, replay, ridge
from edgelam_fl.privacy.attacks.front import Front
from edgelam_fl.privacy.attacks.replay import candidates
from edgelam_fl.privacy.attacks.seen import GUESSES, Seen, best_tokens, chance, reading, share_read
from edgelam_fl.privacy.known import KnownLeakage
from edgelam_fl.tasks.data import Prompt, pairs_by
from edgelam_fl.tasks.docstrings import docstring_pairs, split_by_module
from edgelam_fl.tasks.named import local_data
from edgelam_fl.telemetry.human import human_count

BUILT_IN_TEXT = "docstrings of Python's standard library"
LEAST_TOKENS, MOST_TOKENS, LEAST_TEXTS = 4, 96, 8
_LEAST_PRIVATE = 2000  # tokens that are read, if there are so many
_OWNERS = 8  # of the built-in text: one of so many parts is private
_ROWS = 16
_REPLAYED = 500  # private tokens that are tried one by one through the front
_TRAINING = inverter.Training(width=96, epochs=3, negatives=512, rate=4e-3)  # seconds per number of layers
_SEED = 0
_SHOWN, _SHOWN_TOKENS = 3, 24

Tell = Callable[[str], None]  # takes what is being done, in words


@dataclass(frozen=True)
class LayerReading:
    """Shares of the private tokens that are read with one number of layers in front, in [0, 1], by attack."""

    front: int
    nearest: float
    ridge: float
    inverter: float
    replay: float | None
    """Share that is read by trying tokens through the front, on some of the texts; None: not tried, as with no layer in front or
    with a model that reads a text from both sides."""
    among_five: float
    """Share that is among the first five guesses of the attack that has the most."""

    @property
    def best(self) -> float:
        return max(self.nearest, self.ridge, self.inverter, self.replay or 0.0)


@dataclass(frozen=True)
class TextCounts:
    """What became of the texts on one side."""

    read: int
    cut: int
    """Those of the read ones that lost their end, beyond `MOST_TOKENS`."""
    short: int
    """Texts that were left out, with fewer than `LEAST_TOKENS`."""
    spare: int
    """Texts that were not needed."""


@dataclass(frozen=True)
class MeasuredLeakage:
    """The shares that were read, per number of layers."""

    model: str
    digest: str
    public_tokens: int
    private_tokens: int
    chance: float
    """Share of the tokens that are the commonest one of the public text."""
    readings: tuple[LayerReading, ...]
    shown_front: int
    """Layers at which the examples were read."""
    examples: tuple[tuple[str, str], ...]
    """Pairs of a private text's beginning and what the best attack reads of it."""
    private_texts: TextCounts

    def reading(self, front: int) -> LayerReading:
        """Returns the shares at one of the measured numbers of layers."""
        return next(reading for reading in self.readings if reading.front == front)

    def known(self) -> KnownLeakage:
        """Returns the numbers as they are kept for later runs."""
        read = {reading.front: round(reading.best, 4) for reading in self.readings}
        return KnownLeakage(self.model, self.digest, read, {}, round(self.chance, 4))


# ---------------------------------------------------------------- texts


def texts_of_file(file: Path, config: RunConfig) -> list[str]:
    """Returns a device's examples as texts: prompt and answer, without the words of a template, which everybody knows.

    Raises DataError if the file cannot be read or holds too little.
    """
    pairs = pairs_by(task_settings(config), local_data(file)).pairs
    parts = [
        _prompt_text(prompt) if config.task.classes else f"{_prompt_text(prompt)} {answer}" for prompt, answer in pairs
    ]
    return list(dict.fromkeys(text.strip() for text in parts if text.strip()))


def _prompt_text(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    return " ".join(str(message.get("content") or "") for message in prompt.messages[:-1])


def built_in_texts() -> tuple[list[str], list[str]]:
    """Returns (public, private) docstrings, of different modules."""
    private, *public = split_by_module(docstring_pairs(), _OWNERS)
    return [pair.answer for part in public for pair in part], [pair.answer for pair in private]


def public_texts(private: Sequence[str]) -> list[str]:
    """Returns docstrings that are in none of the private texts."""
    everything = "\n".join(private)
    return [pair.answer for pair in docstring_pairs() if pair.answer not in everything]


# ---------------------------------------------------------------- measuring


def measure_leakage(
    source: ModelSource,
    fronts: Sequence[int],
    shown_front: int,
    texts: tuple[Sequence[str], Sequence[str]],
    most_tokens: int,
    tell: Tell,
) -> MeasuredLeakage:
    """Reads the private text with each number of layers in front, by three attacks, and a causal model's by a fourth.

    fronts: rising; `shown_front` is among them. texts: (public, private). most_tokens: of the public text that the attacker learns from; of the
    private text a quarter as many are read, or 2,000. Raises DataError if the private text is too short, EnvironmentProblem if memory is.
    """
    torch.manual_seed(_SEED)
    _check_memory(source, fronts, most_tokens)
    tell("loading the tokenizer")
    tokenizer = load_tokenizer(source.folder)
    (public_ids, _), (private_ids, counts) = (
        _tokens(tokenizer, each, most)
        for each, most in zip(texts, (most_tokens, max(_LEAST_PRIVATE, most_tokens // 4)), strict=True)
    )
    if len(private_ids) < LEAST_TEXTS:
        raise DataError(
            f"the data hold {len(private_ids)} texts of at least {LEAST_TOKENS} tokens, and {LEAST_TEXTS} are needed to measure; "
            f"without --data a built-in text is used",
            "few-examples",
        )
    tell(f"loading {fronts[-1]} layers of {source.name}")
    classes = 2 if source.family.task_head else 0  # of a head that is not loaded
    (stage,) = load_stages(source, [Span(0, fronts[-1], embed=True)], "fp32", None, classes=classes)
    public = look(stage, public_ids, fronts, lambda done: tell(f"running the layers over public text, {done:.0%}"))
    private = look(stage, private_ids, fronts, lambda done: tell(f"running the layers over private text, {done:.0%}"))
    embeddings_VD = stage.model.get_input_embeddings().weight.detach()  # type: ignore[operator]
    readings, guesses_N = [], private[fronts[0]].ids_N
    for number, front in enumerate(fronts, 1):
        tell(f"reading with {human_count(front, 'layer')} in front, {number} of {len(fronts)}")
        shares, best_N = _read(front, public[front], private[front], embeddings_VD, _front_of(source, front))
        readings.append(shares)
        if front == shown_front:
            guesses_N = best_N
    examples = _examples(tokenizer, private[shown_front], guesses_N)
    return MeasuredLeakage(
        source.name, source.leakage_key, len(public[fronts[0]].ids_N), len(private[fronts[0]].ids_N),
        chance(public[fronts[0]], private[fronts[0]]), tuple(readings), shown_front, examples, counts,
    )  # fmt: skip


def _front_of(source: ModelSource, layers: int) -> Front | None:
    """Loads the layers through which tokens are tried one by one; None if that says nothing of this model or of no layer."""
    if not layers or source.family.task_head:
        return None
    (stage,) = load_stages(source, [Span(0, layers, embed=True)], "fp32", None)
    return Front(stage.model, stage.new_cache)


def _read(
    layers: int, public: Seen, private: Seen, embeddings_VD: torch.Tensor, front: Front | None
) -> tuple[LayerReading, torch.Tensor]:
    """Returns the shares at one number of layers, and the tokens [N] that the best attack on all texts reads."""
    trained = inverter.train(public, embeddings_VD, _SEED, _TRAINING)
    guesses_NG = best_tokens(trained.vectors(private), trained.directions_VD, GUESSES)
    readings = [
        nearest.read(private, embeddings_VD),
        ridge.read(public, private, embeddings_VD),
        reading(guesses_NG, private),
    ]
    shares = [share_read(each, private) for each in readings]
    best = readings[shares.index(max(shares))]
    among_five, replayed = max(each.among_five for each in readings), None
    if front is not None:
        some = private.texts(range(_texts_within(private, _REPLAYED)))
        scale = float(trained.log_scale.detach().exp())
        likely = candidates(trained.vectors(some), trained.directions_VD, scale)
        tried = replay.read(some, likely, front, public.ids_N.unique())
        replayed, among_five = share_read(tried, some), max(among_five, tried.among_five)
    return LayerReading(layers, shares[0], shares[1], shares[2], replayed, among_five), best.ids_N


def _texts_within(seen: Seen, most_tokens: int) -> int:
    """Returns how many of the first texts have `most_tokens` tokens together at most; 1 at least."""
    together = list(accumulate(seen.lengths_R))
    return max(1, sum(tokens <= most_tokens for tokens in together))


@torch.no_grad()
def look(
    stage: Stage, texts: Sequence[Sequence[int]], fronts: Sequence[int], tell: Callable[[float], None]
) -> dict[int, Seen]:
    """Runs the front layers on texts; returns what a host sees after each number of layers. `tell`: takes the part done."""
    caught: dict[int, torch.Tensor] = {}

    def catch(front: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            caught[front] = args[0] if args else kwargs["hidden_states"]

        return hook

    inner = [front for front in fronts if front < stage.span.last]
    hooks = [stage.layers[front].register_forward_pre_hook(catch(front), with_kwargs=True) for front in inner]
    states: dict[int, list[torch.Tensor]] = {front: [] for front in fronts}
    try:
        for number in range(0, len(texts), _ROWS):
            rows = texts[number : number + _ROWS]
            lengths = [len(row) for row in rows]
            ids_BT = torch.zeros(len(rows), max(lengths), dtype=torch.long)
            for row, ids in enumerate(rows):
                ids_BT[row, : len(ids)] = torch.tensor(ids)
            caught[fronts[-1]] = stage(ids_BT, lengths)
            for front in fronts:
                states[front] += [caught[front][row, :length].float() for row, length in enumerate(lengths)]
            tell(min(1.0, (number + _ROWS) / len(texts)))
    finally:
        for each in hooks:
            each.remove()
    ids_N = torch.tensor([token for text in texts for token in text])
    lengths_R = tuple(len(text) for text in texts)
    return {front: Seen(torch.cat(parts), ids_N, lengths_R) for front, parts in states.items()}


def _tokens(tokenizer: Any, texts: Sequence[str], most: int) -> tuple[list[list[int]], TextCounts]:
    """Returns the tokens of texts from all over, about `most` together, and what became of all texts.

    Marks that a tokenizer adds are left out: all know them.
    """
    found, count, cut, short = list[list[int]](), 0, 0, 0
    for text in random.Random(_SEED).sample(list(texts), len(texts)):
        ids = tokenizer(text, add_special_tokens=False, truncation=True, max_length=MOST_TOKENS + 1)["input_ids"]
        if len(ids) < LEAST_TOKENS:
            short += 1
        elif count < most:
            cut += len(ids) > MOST_TOKENS
            found.append(ids[:MOST_TOKENS])
            count += len(found[-1])
    return found, TextCounts(len(found), cut, short, len(texts) - len(found) - short)


def _examples(tokenizer: Any, private: Seen, guesses_N: torch.Tensor) -> tuple[tuple[str, str], ...]:
    """Returns the beginnings of some texts, spread over all, with what was read of each."""
    lengths = list(private.lengths_R)
    pairs = list(zip(private.ids_N.split(lengths), guesses_N.split(lengths), strict=True))
    chosen = pairs[:: max(1, len(pairs) // _SHOWN)][:_SHOWN]
    return tuple(tuple(_line(tokenizer, ids[:_SHOWN_TOKENS]) for ids in pair) for pair in chosen)  # type: ignore[misc]


def _line(tokenizer: Any, ids_T: torch.Tensor) -> str:
    return " ".join(tokenizer.decode(ids_T.tolist()).split())


def _check_memory(source: ModelSource, fronts: Sequence[int], most_tokens: int) -> None:
    weights = weights_bytes(source, [Span(0, fronts[-1], embed=True)], "fp32", "float32")
    states = len(fronts) * round(1.25 * most_tokens) * source.hidden_size * 4
    needed, free = 2 * weights + 2 * states, memory_free_bytes()
    if needed > free:
        raise EnvironmentProblem(
            f"{fronts[-1]} layers of {source.name} in fp32 and their hidden states take about {needed / 2**30:.1f} GiB, and "
            f"{free / 2**30:.1f} GiB are free: measure fewer layers (--cuts) or fewer tokens (--tokens)"
        )
