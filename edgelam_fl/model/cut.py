"""The cut adapter by name: h' = h + s B (A h) where hidden states return from the last host to the device.

A [rank, hidden] learns on the last host, on the output of its last layer; B [hidden, rank] is frozen and stays on the
devices, equal on all of them. The gradient of A needs no more than that of u = A h, s B^T dL/dh', so `rank` numbers per token
go back instead of `hidden` (arXiv 2407.02924). A starts at zero, so that h' = h.

A is `base_model.model.model.layers.27.cut_A.weight`, with the layer before the cut; B is `base_model.model.cut_B.weight`. An
aggregation sees A as a whole tensor: as B is the same everywhere, the mean of A is the mean of what devices learned. Other
tools do not know the cut adapter. Knows only names and arrays; `model.modules` computes with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

CUT_A, CUT_B = ".cut_A.weight", ".cut_B.weight"


@dataclass(frozen=True)
class CutAdapter:
    """Place and size of a cut adapter."""

    layer: int  # the last layer before the device's back
    rank: int
    scale: float


def is_cut(name: str) -> bool:
    """Whether a tensor belongs to a cut adapter."""
    return name.endswith((CUT_A, CUT_B))


def cut_of(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the tensors of the cut adapter, by name; none if there is no cut adapter."""
    return {name: array for name, array in tensors.items() if is_cut(name)}


def without_cut(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns all tensors but those of the cut adapter."""
    return {name: array for name, array in tensors.items() if not is_cut(name)}
