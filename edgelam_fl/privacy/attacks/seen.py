"""Hidden states of one cut with the tokens behind them, and how well guesses of these tokens do.

Knows no attack and no model. Shapes: N tokens of all texts, R texts, D hidden, V vocabulary, G guesses, T longest text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

GUESSES = 5  # "among the first five"
_ROWS = 1024  # of a matrix of tokens by vocabulary at a time: 200 MB with 49,152 tokens
_DRAWS = 1000


@dataclass(frozen=True)
class Seen:
    """Hidden states of one cut, text after text, and their tokens: known of public text, looked for in private text."""

    states_ND: torch.Tensor
    ids_N: torch.Tensor
    lengths_R: tuple[int, ...]

    @property
    def states_of_texts(self) -> tuple[torch.Tensor, ...]:
        return self.states_ND.split(list(self.lengths_R))

    def padded(self) -> torch.Tensor:
        """Returns the states [R, T, D] of all texts, with zeros after the shorter ones."""
        return pad_sequence(list(self.states_of_texts), batch_first=True)

    def texts(self, numbers: Sequence[int]) -> Seen:
        """Returns the texts of these numbers, in this order."""
        states, ids = self.states_of_texts, self.ids_N.split(list(self.lengths_R))
        return Seen(
            torch.cat([states[n] for n in numbers]),
            torch.cat([ids[n] for n in numbers]),
            tuple(self.lengths_R[n] for n in numbers),
        )

    def seen_as(self, states_ND: torch.Tensor) -> Seen:
        """Returns the same texts with other states, for example those that a defence makes."""
        return Seen(states_ND, self.ids_N, self.lengths_R)


@dataclass(frozen=True)
class Reading:
    """The result of an attack: its first guess of each token, and the share of tokens that are among its first GUESSES."""

    ids_N: torch.Tensor
    among_five: float


def reading(best_NG: torch.Tensor, private: Seen) -> Reading:
    """Judges guesses, best first, against the tokens."""
    return Reading(best_NG[:, 0], share((best_NG[:, :GUESSES] == private.ids_N[:, None]).any(1)))


def share(hits_N: torch.Tensor) -> float:
    return hits_N.float().mean().item()


def share_read(reading: Reading, private: Seen) -> float:
    """Returns the share of tokens that the first guess reads."""
    return share(reading.ids_N == private.ids_N)


def chance(public: Seen, private: Seen) -> float:
    """Returns what is read without any state, if each guess is the commonest token of the public text."""
    return share(private.ids_N == public.ids_N.mode().values)


def interval(hits_N: torch.Tensor, lengths_R: Sequence[int]) -> tuple[float, float]:
    """Returns a 95 % interval of the share of hits, by drawing whole texts again (bootstrap, seeded).

    Tokens of one text depend on each other, so that an interval over tokens would be too narrow. `hits_N` may be means over
    seeds.
    """
    sums_R = torch.stack([part.sum() for part in hits_N.double().split(list(lengths_R))])
    lengths = torch.tensor(lengths_R, dtype=torch.float64)
    draws = torch.randint(len(lengths), (_DRAWS, len(lengths)), generator=torch.Generator().manual_seed(0))
    shares = sums_R[draws].sum(1) / lengths[draws].sum(1)
    low, high = torch.quantile(shares, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def scaled(states_ND: torch.Tensor) -> torch.Tensor:
    """Scales states to one length, that of random vectors of this width (the root of D).

    A few positions have states that are a thousand times longer than the others.
    """
    return normalize(states_ND, dim=-1) * states_ND.shape[-1] ** 0.5


def best_tokens(vectors_ND: torch.Tensor, directions_VD: torch.Tensor, guesses: int = GUESSES) -> torch.Tensor:
    """Returns the tokens [N, guesses] whose directions are nearest by angle, nearest first."""
    return torch.cat([scores.topk(guesses, dim=1).indices for scores in cosines(vectors_ND, directions_VD)])


def cosines(vectors_ND: torch.Tensor, directions_VD: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yields the cosines [rows, V] of vectors with unit directions, a part of the rows at a time."""
    for part in vectors_ND.split(_ROWS):
        yield normalize(part, dim=1) @ directions_VD.T
