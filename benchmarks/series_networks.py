"""Networks that learn to correct the series of a link, to compare a language model's layers with. Knows tensors alone.

Shapes: B links, T series, F values of a series: features, then the numbers of its places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import nn


class SeriesNetwork(nn.Module):
    """Three hidden layers on one series at a time."""

    def __init__(self, features: int, outputs: int, width: int) -> None:
        super().__init__()
        widths = (features, width, width, width)
        hidden = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.GELU())]
        self.layers, self.last, self.features = nn.Sequential(*hidden), _zero(width, outputs), features

    def forward(self, inputs_BTF: torch.Tensor) -> torch.Tensor:
        values: torch.Tensor = self.last(self.layers(inputs_BTF[..., : self.features]))
        return values


class Recurrent(nn.Module):
    """Two layers of GRU over the slots of one series at a time."""

    def __init__(self, features: int, outputs: int, width: int, slots: int = 16) -> None:
        super().__init__()
        self.slots, self.features = slots, features
        self.recurrent = nn.GRU(features - 2 * slots + 2, width, 2, batch_first=True)
        self.last = _zero(width, outputs)

    def forward(self, inputs_BTF: torch.Tensor) -> torch.Tensor:
        rows = inputs_BTF[..., : self.features].flatten(0, 1)
        slots = torch.stack([rows[:, : self.slots], rows[:, self.slots : 2 * self.slots]], -1)
        beside = rows[:, None, 2 * self.slots :].expand(-1, self.slots, -1)
        states, _ = self.recurrent(torch.cat([slots, beside], -1))
        values: torch.Tensor = self.last(states[:, -1])
        return values.unflatten(0, inputs_BTF.shape[:2])


class Transformer(nn.Module):
    """Two layers across the series of a link, which see all of each other."""

    def __init__(self, features: int, outputs: int, width: int, places: Sequence[int]) -> None:
        super().__init__()
        self.features, self.first = features, nn.Linear(features, width)
        self.places = nn.ModuleList(nn.Embedding(rows, width) for rows in places)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width), enable_nested_tensor=False)
        self.last = _zero(width, outputs)

    def forward(self, inputs_BTF: torch.Tensor) -> torch.Tensor:
        states = self.first(inputs_BTF[..., : self.features])
        for number, table in enumerate(self.places):
            states = states + table(inputs_BTF[..., self.features + number].long())
        values: torch.Tensor = self.last(self.layers(states))
        return values


def _zero(width: int, outputs: int) -> nn.Linear:
    last = nn.Linear(width, outputs)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return last


def of_size(make: Callable[[int], nn.Module], numbers: int) -> nn.Module:
    """Returns the widest network with at most so many numbers, at least one of width 16."""
    width = 16
    while count(make(width + 4)) <= numbers:
        width += 4
    return make(width)


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
