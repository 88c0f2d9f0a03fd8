"""Reads a causal model's hidden states token by token: tries likely tokens through the public front, and keeps the nearest.

The state at a position depends on the tokens up to it. With the tokens before it read, the attacker computes the state of each
candidate and compares. If one is far nearer than all others, it is the token; if none is, more candidates are tried. The
candidates come from a ridge map or an inverter, together with what the public model expects next. If the device's front is
not quite the one that the attacker has, nothing matches, and the distance is weighed against how likely the candidates are.

Shapes: B texts that reach a position, N tokens of all texts, K candidates, D hidden, V vocabulary, G guesses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import log_softmax

from edgelam_fl.privacy.attacks.front import Front, with_rows
from edgelam_fl.privacy.attacks.seen import GUESSES, Reading, Seen, cosines, reading

_OPENINGS = 2048  # first tokens at a time


@dataclass(frozen=True)
class Search:
    """Limits of the search: how widely candidates are tried, and how their distances are judged.

    widths: numbers of candidates; the next is tried as long as nothing matches. match: the nearest is a match if its squared
    distance is below this share of the next one's. trust: nats per squared distance, in shares of the least one; D / 2 if what
    is left between states is noise, less if it is a difference between fronts.
    """

    widths: tuple[int, ...] = (8, 64, 512)
    match: float = 0.25
    trust: float = 30.0


USUAL = Search()


@dataclass(frozen=True)
class Candidates:
    """The likeliest tokens of each position [N, K], likeliest first, and the logarithm of how likely each is."""

    ids_NK: torch.Tensor
    logs_NK: torch.Tensor

    def reading(self, private: Seen) -> Reading:
        return reading(self.ids_NK[:, :GUESSES], private)


def candidates(
    vectors_ND: torch.Tensor, directions_VD: torch.Tensor, scale: float,
    expected: Callable[[slice], torch.Tensor] | None = None, most: int = max(USUAL.widths),
) -> Candidates:  # fmt: skip
    """Ranks tokens by scale * cosine of the vectors of a ridge map or an inverter, and by what is expected beside it.

    expected: from a range of positions to logits [positions, V], for example of the public model's next token; None: nothing.
    """
    ids, logs, start = [], [], 0
    for cosines_NV in cosines(vectors_ND, directions_VD):
        part = slice(start, start := start + len(cosines_NV))
        likely_NV = scale * cosines_NV if expected is None else scale * cosines_NV + log_softmax(expected(part), dim=1)
        best = log_softmax(likely_NV, dim=1).topk(min(most, likely_NV.shape[1]), dim=1)
        ids.append(best.indices)
        logs.append(best.values)
    return Candidates(torch.cat(ids), torch.cat(logs))


def read(private: Seen, ranked: Candidates, front: Front, openings_K: torch.Tensor, search: Search = USUAL) -> Reading:
    """Reads all texts together, token by token.

    openings_K: tokens that may begin a text, tried beside the likeliest candidates there: a first state says little of its
    token to a map.
    """
    lengths, longest = torch.tensor(private.lengths_R), max(private.lengths_R)
    firsts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)[:-1]])
    best_NG = torch.zeros(len(private.ids_N), GUESSES, dtype=torch.long)
    texts = torch.arange(len(lengths))
    matching_R = torch.ones(len(lengths), dtype=torch.bool)  # a text that did not match is not searched widely any more
    prefix: Any = None if front.new_cache is None else front.new_cache()
    for position in range(longest):
        going = lengths[texts] > position
        texts, prefix = texts[going], with_rows(prefix, going)
        rows = firsts[texts] + position
        found = _Position(front, prefix, position, private.states_ND[rows], search)
        if position == 0:
            guesses_BG, matched_B = found.of_openings(openings_K, ranked.ids_NK[rows])
        else:
            guesses_BG, matched_B = found.of_candidates(ranked.ids_NK[rows], ranked.logs_NK[rows], matching_R[texts])
        best_NG[rows] = guesses_BG
        matching_R[texts] &= matched_B
        prefix = front.tried(prefix, position, guesses_BG[:, :1])[1]
    return reading(best_NG, private)


@dataclass(frozen=True)
class _Position:
    """One position of the texts that reach it: what was read before, and the states that a guess must explain."""

    front: Front
    prefix: Any
    tokens: int
    states_BD: torch.Tensor
    search: Search

    def of_openings(self, openings_K: torch.Tensor, ids_BK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the nearest first tokens [B, G], and whether they match. No candidate needs a prefix: all share one table."""
        tried_K = torch.cat([openings_K, ids_BK[:, : self.search.widths[-1]].flatten()]).unique()
        parts = [self.front.of_tokens(part[:, None], [1] * len(part))[:, 0] for part in tried_K.split(_OPENINGS)]
        squares_BK = _squares(self.states_BD, torch.cat(parts).expand(len(self.states_BD), -1, -1))
        nearest = squares_BK.topk(GUESSES, dim=1, largest=False)
        return tried_K[nearest.indices], self._match(nearest.values)

    def of_candidates(
        self, ids_BK: torch.Tensor, logs_BK: torch.Tensor, matching_B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the best tokens [B, G], and whether they match. Only texts of `matching_B` are searched widely."""
        guesses_BG = torch.zeros(len(ids_BK), GUESSES, dtype=torch.long)
        matched_B = torch.zeros(len(ids_BK), dtype=torch.bool)
        open_rows = torch.arange(len(ids_BK))
        for width in self.search.widths:
            some = replace(self, prefix=with_rows(self.prefix, open_rows), states_BD=self.states_BD[open_rows])
            tried_BK = ids_BK[open_rows, :width]
            states_BKD, _ = self.front.tried(some.prefix, self.tokens, tried_BK)
            squares_BK = _squares(some.states_BD, states_BKD)
            order_BG = some._scores(squares_BK, logs_BK[open_rows, :width]).topk(GUESSES, dim=1).indices
            guesses_BG[open_rows] = tried_BK.gather(1, order_BG)
            matched_B[open_rows] = self._match(squares_BK.topk(2, dim=1, largest=False).values)
            open_rows = open_rows[~matched_B[open_rows] & matching_B[open_rows]]
            if not len(open_rows):
                break
        return guesses_BG, matched_B

    def _match(self, squares_BK: torch.Tensor) -> torch.Tensor:
        return squares_BK[:, 0] < self.search.match * squares_BK[:, 1]

    def _scores(self, squares_BK: torch.Tensor, logs_BK: torch.Tensor) -> torch.Tensor:
        least_B1 = squares_BK.min(dim=1, keepdim=True).values.clamp_min(1e-12)
        likely_BK = logs_BK - self.search.trust * (squares_BK / least_B1 - 1)
        return torch.where(self._match(squares_BK.sort(dim=1).values)[:, None], -squares_BK, likely_BK)


def _squares(states_BD: torch.Tensor, tried_BKD: torch.Tensor) -> torch.Tensor:
    """Returns squared distances [B, K] in shares of the states' squared lengths."""
    return torch.stack(
        [
            ((tried_KD - state_D) ** 2).sum(1) / (state_D**2).sum()
            for state_D, tried_KD in zip(states_BD, tried_BKD, strict=True)
        ]
    )
