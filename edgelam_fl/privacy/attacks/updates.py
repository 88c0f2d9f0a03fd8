"""Rare words from an adapter's update: which tokens were in the data that the first layer's factor A learned from.

The gradient of A is a sum over positions of (B^T g) x^T, where x is the input of the adapted module and g the gradient of its
output. In the first layer x depends on the token alone, not on its place or neighbours, so everybody who has the public
model knows x of every token. The rows of A's change lie near the span of the x that were there; a token is scored by
the share of its x that lies in this span. Knows no optimizer: a change by AdamW is treated like a gradient.

Shapes: V candidate tokens, P positions of public text, D inputs of the module, R rows of a factor or of a gradient.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

RIDGE = 1.0  # what is added to the mean square of public inputs in every direction, over the mean of all directions
_NOTHING = 1e-6  # of the largest singular value


def whitening(public_PD: np.ndarray, ridge: float = RIDGE) -> np.ndarray:
    """Returns the matrix [D, D] after which the inputs of public text have about the same size in all directions.

    Without it, what all tokens have in common would drown what tells them apart.
    """
    square_DD = public_PD.T @ public_PD / len(public_PD)
    values_D, directions_DD = np.linalg.eigh(square_DD)
    return (directions_DD / np.sqrt(values_D + ridge * values_D.mean())) @ directions_DD.T


def token_scores(changes: Iterable[np.ndarray], inputs_VD: np.ndarray, whitening_DD: np.ndarray) -> np.ndarray:
    """Returns, per candidate token, the share of its whitened input in the span of a change's rows, summed over changes.

    `changes`: [R, D] of each module that reads these inputs: of its factor A, or the gradient of its whole weight. A change
    of zero, as at the first step of a run (B is zero), scores nothing.
    """
    directions_VD = inputs_VD @ whitening_DD
    directions_VD /= np.linalg.norm(directions_VD, axis=1, keepdims=True)
    scores_V = np.zeros(len(inputs_VD))
    for change_RD in changes:
        _, sizes_R, rows_RD = np.linalg.svd(change_RD @ whitening_DD, full_matrices=False)
        span_RD = rows_RD[sizes_R > _NOTHING * sizes_R.max()]
        scores_V += np.square(directions_VD @ span_RD.T).sum(axis=1)
    return scores_V


def share_of_best(scores_V: np.ndarray, present_V: np.ndarray, best: int) -> float:
    """Returns the share of the `best` highest-ranked tokens that were in the data; by chance, the share of all tokens that were."""
    return float(present_V[np.argsort(-scores_V, kind="stable")[:best]].mean())
