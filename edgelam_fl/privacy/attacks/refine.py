"""Refines guesses by gradients: mixes the likely tokens so that the public front makes the states that were seen.

After the second half of BiSR (arXiv 2409.00960), which inverts the bottom layers by optimising their input. Here the input is a
mixture of the candidates' embeddings per position, so that it stays near tokens; any front will do, also that of an encoder.

Shapes: B texts, T tokens, N tokens of all texts, K candidates, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from edgelam_fl.privacy.attacks.front import Front
from edgelam_fl.privacy.attacks.replay import Candidates
from edgelam_fl.privacy.attacks.seen import GUESSES, Reading, Seen, reading


@dataclass(frozen=True)
class Descent:
    """Settings of the optimisation of mixtures. `texts`: how many together, which changes the time alone."""

    candidates: int = 16
    steps: int = 40
    rate: float = 0.3
    texts: int = 8


USUAL = Descent()


def read(
    private: Seen, ranked: Candidates, front: Front, embeddings_VD: torch.Tensor, descent: Descent = USUAL
) -> Reading:
    """Reads all texts; a position's guesses are its candidates, ordered by their shares of the mixture.

    A text is left as the candidates rank it if its refined tokens make states farther from those that were seen.
    """
    width = max(descent.candidates, GUESSES)
    ids, logs = (part_NK[:, :width].split(list(private.lengths_R)) for part_NK in (ranked.ids_NK, ranked.logs_NK))
    best: list[torch.Tensor] = []
    for start in range(0, len(ids), descent.texts):
        some = slice(start, start + descent.texts)
        best += _refined(ids[some], logs[some], private.states_of_texts[some], front, embeddings_VD, descent)
    return reading(torch.cat(best), private)


def _refined(
    ids: Sequence[torch.Tensor], logs: Sequence[torch.Tensor], states: Sequence[torch.Tensor], front: Front,
    embeddings_VD: torch.Tensor, descent: Descent,
) -> list[torch.Tensor]:  # fmt: skip
    lengths = [len(part) for part in ids]
    ids_BTK, start_BTK, seen_BTD = (pad_sequence(list(parts), batch_first=True) for parts in (ids, logs, states))
    weights_BTK = start_BTK.clone().requires_grad_(True)
    table_BTKD = embeddings_VD[ids_BTK]
    optimizer = torch.optim.Adam([weights_BTK], descent.rate)
    for _ in range(descent.steps):
        mixed_BTD = (weights_BTK.softmax(2)[..., None] * table_BTKD).sum(2)
        optimizer.zero_grad()
        _distances(front.of_embeddings(mixed_BTD, lengths), seen_BTD, lengths).sum().backward()
        optimizer.step()
    order_BTK = weights_BTK.detach().argsort(dim=2, descending=True)
    refined_BTK = ids_BTK.gather(2, order_BTK)
    before_B, after_B = (
        _distances(front.of_tokens(guess_BTK[:, :, 0], lengths), seen_BTD, lengths)
        for guess_BTK in (ids_BTK, refined_BTK)
    )
    kept_BTK = torch.where((after_B < before_B)[:, None, None], refined_BTK, ids_BTK)
    return [part[:length, :GUESSES] for part, length in zip(kept_BTK, lengths, strict=True)]


def _distances(states_BTD: torch.Tensor, seen_BTD: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Returns for each text the sum of its squared distances, each in shares of the seen state's squared length."""
    real_BT = torch.arange(seen_BTD.shape[1]) < torch.tensor(lengths)[:, None]
    squares_BT = ((states_BTD - seen_BTD) ** 2).sum(2) / (seen_BTD**2).sum(2).clamp_min(1e-12)
    return (squares_BT * real_BT).sum(1)
