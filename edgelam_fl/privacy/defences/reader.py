"""A reader that a device keeps of itself: a linear map from its own hidden states to its tokens, as a host would fit one.

The front is trained against it: `information` is what the reader learns about the tokens, and its gradient says how states
would have to change to say less. The idea of an adapter that is trained to carry less mutual information is ADMI's (arXiv
2606.14210); the bound here is InfoNCE (arXiv 1807.03748). Knows states and token ids; knows no layers.

Shapes: N tokens, D hidden, V vocabulary, C candidates.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn import functional

from edgelam_fl.privacy.mechanism import secret_generator

_CANDIDATES = 1024  # that the reader chooses among: all of the vocabulary would cost as much as the model's head
_SHARPNESS = 20.0  # of its choice: times the cosine of guess and embedding
_MEMORY = 0.9  # how much of what it learned counts after the next micro-batch: the front moves
_RIDGE = 1.0


class Reader:
    """The ridge map of everything that it saw, newer tokens counting more."""

    def __init__(self, hidden: int, generator: np.random.Generator | None = None) -> None:
        """`hidden`: the width of states. `generator`: chooses candidates; None: from the machine's entropy."""
        self._generator = secret_generator() if generator is None else generator
        self._inputs_DD, self._outputs_DD = torch.zeros(hidden, hidden), torch.zeros(hidden, hidden)
        self._map_DD = torch.eye(hidden)

    def information(self, states_ND: torch.Tensor, ids_N: torch.Tensor, embeddings_VD: torch.Tensor) -> torch.Tensor:
        """Returns what the reader knows of a token on average: nats, 0 to the logarithm of the number of candidates.

        A lower bound of the information between state and token; differentiable by the states.
        """
        ids_C, own_N = self._candidates(ids_N, len(embeddings_VD))
        guesses_ND = functional.normalize(_scaled(states_ND) @ self._map_DD, dim=1)
        scores_NC = _SHARPNESS * guesses_ND @ functional.normalize(embeddings_VD[ids_C].float(), dim=1).T
        missed_N = functional.cross_entropy(scores_NC, own_N, reduction="none")
        return (math.log(len(ids_C)) - missed_N).clamp(min=0).mean()

    def learn(self, states_ND: torch.Tensor, ids_N: torch.Tensor, embeddings_VD: torch.Tensor) -> None:
        """Fits the map again, with these tokens too."""
        inputs_ND = _scaled(states_ND.detach())
        targets_ND = functional.normalize(embeddings_VD[ids_N].float(), dim=1)
        self._inputs_DD = self._inputs_DD * _MEMORY + inputs_ND.T @ inputs_ND
        self._outputs_DD = self._outputs_DD * _MEMORY + inputs_ND.T @ targets_ND
        ridge_DD = _RIDGE * torch.eye(len(self._map_DD))
        self._map_DD = torch.linalg.solve(self._inputs_DD + ridge_DD, self._outputs_DD)

    def _candidates(self, ids_N: torch.Tensor, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the candidates and the place of each token's own among them."""
        others = torch.from_numpy(self._generator.integers(vocabulary, size=min(_CANDIDATES, vocabulary)))
        ids_C, places = torch.cat([ids_N, others]).unique(return_inverse=True)
        return ids_C, places[: len(ids_N)]


def _scaled(states_ND: torch.Tensor) -> torch.Tensor:
    """Returns the states in one length, the root of their width: some are a hundred times longer than the rest."""
    return functional.normalize(states_ND.float(), dim=1) * states_ND.shape[1] ** 0.5
