"""Reads hidden states by one linear map to the embedding table, solved in closed form on public text.

The map uses one position at a time: no context, no language model, no gradients. Shapes: N tokens, D hidden, I = D + 1,
V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from edgelam_fl.privacy.attacks.seen import Reading, Seen, best_tokens, reading, scaled

RIDGE = 1.0


@dataclass(frozen=True)
class RidgeMap:
    """A fitted map, with the unit directions of the embeddings that it points at."""

    map_ID: torch.Tensor
    directions_VD: torch.Tensor

    def vectors(self, states_ND: torch.Tensor) -> torch.Tensor:
        """Returns for each state a vector whose direction is near that of its token's embedding."""
        return _inputs(states_ND) @ self.map_ID


def fit(public: Seen, embeddings_VD: torch.Tensor) -> RidgeMap:
    """Solves the ridge regression from the public text's states to the embeddings of its tokens."""
    directions_VD = normalize(embeddings_VD, dim=1)
    x_NI = _inputs(public.states_ND)
    target_ND = scaled(embeddings_VD[public.ids_N])
    map_ID = torch.linalg.solve(x_NI.T @ x_NI + RIDGE * torch.eye(x_NI.shape[1]), x_NI.T @ target_ND)
    return RidgeMap(map_ID, directions_VD)


def read(public: Seen, private: Seen, embeddings_VD: torch.Tensor) -> Reading:
    """Guesses the private text's tokens from its states, by a map that is fitted to the public text."""
    fitted = fit(public, embeddings_VD)
    return reading(best_tokens(fitted.vectors(private.states_ND), fitted.directions_VD), private)


def _inputs(states_ND: torch.Tensor) -> torch.Tensor:
    return torch.cat([scaled(states_ND), torch.ones(len(states_ND), 1)], dim=1)
