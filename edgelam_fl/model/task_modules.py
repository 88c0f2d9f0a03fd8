"""The modules that stand in the places of embedding and head of a model that takes and gives values. They know no task.

Both are trained as a whole, so they are fp32 whatever the frozen model computes in. Their first values come with the adapter.
Shapes: B rows, T tokens, F values per token, D hidden, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional

from edgelam_fl.model.modules import TaskHead
from edgelam_fl.model.value_ends import INPUT_MODULE, OUTPUT_MODULE, ValueEnds


class _Maps(nn.Module):
    """Linear maps with GELU between them; zero until an adapter is loaded."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.maps = nn.ModuleList(TaskHead(width, following) for width, following in pairwise(widths))
        for parameter in self.maps.parameters():
            nn.init.zeros_(parameter)

    def mapped(self, states: torch.Tensor) -> torch.Tensor:
        for number, each in enumerate(self.maps):
            states = each(functional.gelu(states) if number else states)
        return states


class InputModule(_Maps):
    """Gives a hidden state of each token's values: of its features, and of the places that it names."""

    def __init__(self, ends: ValueEnds, hidden_size: int) -> None:
        super().__init__(ends.sizes(hidden_size)[INPUT_MODULE])
        self._features, self._scale = ends.features, ends.scale
        self.places = nn.ParameterList(torch.zeros(rows, hidden_size) for rows in ends.places)

    def forward(self, values_BTF: torch.Tensor) -> torch.Tensor:
        """Returns hidden states [B, T, D]. `values_BTF`: features, then a row number per table of places."""
        states_BTD = self.mapped(values_BTF[..., : self._features])
        for number, table_PD in enumerate(self.places):
            states_BTD = states_BTD + functional.embedding(values_BTF[..., self._features + number].long(), table_PD)
        return states_BTD * self._scale


class OutputModule(_Maps):
    """Gives the values [..., O] of hidden states [..., D] after the last norm."""

    def __init__(self, ends: ValueEnds, hidden_size: int) -> None:
        super().__init__(ends.sizes(hidden_size)[OUTPUT_MODULE])

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.mapped(states)
