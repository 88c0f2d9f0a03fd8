"""Reads labels from the gradient that a device sends back, with the public layers after the host.

For cross-entropy the gradient at the logits is (p - onehot(label)) / divisor, with probabilities p that the host can compute
itself. The gradient at the states is linear in that, and a state's gradient comes from its own label and from those of later
positions. So labels are solved from the last position to the first: the gradients that likely labels would cause are
compared with what is left of the device's, and the part of the label that is found is taken away.

Shapes: T tokens of one text, D hidden, V vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch.nn.functional import cosine_similarity, softmax

NONE = -1  # a position without label
_STEP = 1e-2  # of a finite difference, in shares of a state's length; it only makes the list of candidates
_LEAST = 0.3  # of the usual factor; a position whose gradient fits with less has no label


@dataclass(frozen=True)
class Back:
    """The layers after the host as the attacker has them. `features`: states [B, T, D] to what the head gets [B, T, D]."""

    features: Callable[[torch.Tensor], torch.Tensor]
    head_VD: torch.Tensor


def read(states_TD: torch.Tensor, gradient_TD: torch.Tensor, back: Back, candidates: int = 4) -> torch.Tensor:
    """Returns each position's label [T], NONE for a position without one.

    The divisor need not be known: it is estimated from the positions that were solved before.
    """
    solver = _Solver(states_TD, back, candidates)
    left_TD, labels_T = gradient_TD.clone(), torch.full((len(gradient_TD),), NONE)
    factors: list[float] = []
    for position in reversed(range(len(labels_T))):
        if not left_TD[position].norm():
            continue
        label, caused_TD, factor = solver.solve(position, left_TD[position])
        if factors and factor < _LEAST * median(factors):
            continue
        labels_T[position] = label
        factors.append(factor)
        left_TD[: position + 1] -= median(factors) * caused_TD
    return labels_T


class _Solver:
    """Finds the label of one position, once those of later positions are taken away."""

    def __init__(self, states_TD: torch.Tensor, back: Back, candidates: int) -> None:
        self._states_TD, self._back, self._candidates = states_TD.detach(), back, candidates
        with torch.no_grad():
            self._features_TD = back.features(self._states_TD[None])[0]
            self._mean_TD = softmax(self._features_TD @ back.head_VD.T, dim=1) @ back.head_VD

    def solve(self, position: int, left_D: torch.Tensor) -> tuple[int, torch.Tensor, float]:
        """Returns the label, the gradient [position + 1, D] that it causes, and the factor that fits this to what is left."""
        ids_K = self._likely(position, left_D)
        caused_KTD = self._caused(position, self._mean_TD[position] - self._back.head_VD[ids_K])
        own_KD = caused_KTD[:, position]
        best = int(cosine_similarity(own_KD, left_D[None]).argmax())
        factor = float((left_D @ own_KD[best]) / (own_KD[best] @ own_KD[best]))
        return int(ids_K[best]), caused_KTD[best], factor

    @torch.no_grad()
    def _likely(self, position: int, left_D: torch.Tensor) -> torch.Tensor:
        """Ranks all labels by how far the gradient moves the features in the direction that each label would."""
        moved_TD = self._states_TD[: position + 1].clone()
        moved_TD[position] += _STEP * self._states_TD[position].norm() * left_D / left_D.norm()
        change_D = self._back.features(moved_TD[None])[0, position] - self._features_TD[position]
        wanted_VD = self._mean_TD[position] - self._back.head_VD
        return ((wanted_VD @ change_D) / wanted_VD.norm(dim=1)).topk(self._candidates).indices

    def _caused(self, position: int, wanted_KD: torch.Tensor) -> torch.Tensor:
        """Returns the gradients [K, position + 1, D] at the states, if these are the gradients at the features of a position."""
        states_KTD = self._states_TD[: position + 1].repeat(len(wanted_KD), 1, 1).requires_grad_(True)
        features_KD = self._back.features(states_KTD)[:, position]
        return torch.autograd.grad((features_KD * wanted_KD).sum(), states_KTD)[0]
