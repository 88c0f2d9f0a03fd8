"""What stands in the places of embedding and head of a model that takes and gives values: sizes, tensors and first values.

Imports no torch, but for a network of our own: the server draws these tensors, and `model.task_modules` computes with them. Knows no task.
"""

from __future__ import annotations

import importlib
import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

INPUT_MODULE, OUTPUT_MODULE, NETWORK = "input_module", "output_module", "network"
MOST_VALUES = 65536
"""The most values per token that a node computes with, so that a plan cannot ask for all of its memory."""


@dataclass(frozen=True)
class ValueEnds:
    """The sizes of the module before the first layer, and of the one after the last norm; both compute token by token."""

    features: int
    """Values of a token that the input module maps to a hidden state."""
    outputs: int
    """Values that the output module gives per token."""
    places: tuple[int, ...] = ()
    """Rows of each table of learned places. A token names one row per table, in as many further values."""
    hidden_in: tuple[int, ...] = ()
    """Widths of the input module's hidden layers; none: it is linear."""
    hidden_out: tuple[int, ...] = ()
    """The same of the output module."""
    scale: float = 0.1
    """Factor of what the input module gives, as a language model's embeddings are small."""

    def sizes(self, hidden_size: int) -> dict[str, tuple[int, ...]]:
        """Returns the widths of each module's maps, from its inputs to its outputs. `hidden_size`: of the model."""
        return {
            INPUT_MODULE: (self.features, *self.hidden_in, hidden_size),
            OUTPUT_MODULE: (hidden_size, *self.hidden_out, self.outputs),
        }

    def shapes(self, hidden_size: int) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of all tensors by their names in the model."""
        shapes: dict[str, tuple[int, ...]] = {
            f"{INPUT_MODULE}.places.{number}": (rows, hidden_size) for number, rows in enumerate(self.places)
        }
        for module, widths in self.sizes(hidden_size).items():
            for number, (width, following) in enumerate(pairwise(widths)):
                shapes[f"{module}.maps.{number}.weight"] = (following, width)
                shapes[f"{module}.maps.{number}.bias"] = (following,)
        return shapes

    def count(self, hidden_size: int) -> int:
        """Counts the numbers of all tensors."""
        return sum(map(math.prod, self.shapes(hidden_size).values()))

    def first_values(self, hidden_size: int, seed: int) -> Iterator[tuple[str, np.ndarray]]:
        """Yields each tensor as a run begins with it, from the seed and the tensor's name alone, in fp32.

        Matrices are uniform in +-1/sqrt(in) and biases zero; so is the last map, that an untrained model gives zeros. Places are
        normal.
        """
        last = f"{OUTPUT_MODULE}.maps.{len(self.hidden_out)}."
        for name, shape in self.shapes(hidden_size).items():
            rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
            if name.endswith(".bias") or name.startswith(last):
                drawn = np.zeros(shape)
            elif name.endswith(".weight"):
                drawn = rng.uniform(-(shape[1] ** -0.5), shape[1] ** -0.5, shape)
            else:
                drawn = rng.normal(0, _PLACE_DEVIATION, shape)
            yield name, drawn.astype(np.float32)


_PLACE_DEVIATION = 0.3


@dataclass(frozen=True)
class OwnNetwork:
    """A network of our own in the place of a language model, for a model without layers: all of its parameters are the adapter."""

    path: str
    """The module and class of the network, a torch module that takes and gives the values [B, T, F] of whole micro-batches."""
    weights: int
    """Number of its parameters, so that plans need not make it."""
    outputs: int = 1
    """Values that it gives per token, as far as plans count them."""

    def make(self, seed: int = 0) -> Any:
        """Makes the network, with torch's first values of this seed. Imports torch, which takes seconds."""
        import torch

        module, _, name = self.path.partition(":")
        network = getattr(importlib.import_module(module), name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return network()

    def shapes(self, _: int) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of all tensors by their names in the model."""
        return {f"{NETWORK}.{name}": tuple(tensor.shape) for name, tensor in self.make().named_parameters()}

    def count(self, _: int) -> int:
        """Counts the numbers of all tensors, without making the network."""
        return self.weights

    def first_values(self, _: int, seed: int) -> Iterator[tuple[str, np.ndarray]]:
        """Yields each tensor as a run begins with it, in fp32."""
        for name, tensor in self.make(seed).named_parameters():
            yield f"{NETWORK}.{name}", tensor.detach().numpy().copy()


ValueModel = ValueEnds | OwnNetwork  # what takes and gives values: a language model with these ends, or a network


def is_of_values(name: str) -> bool:
    """Returns whether a tensor, by its name in an adapter or a model, is one of these modules'."""
    return any(f".{module}." in f".{name}" for module in (INPUT_MODULE, OUTPUT_MODULE, NETWORK))


def is_of_input(name: str) -> bool:
    """Returns whether a tensor is one of the input module's."""
    return f".{INPUT_MODULE}." in f".{name}"


def is_of_module(name: str, modules: Iterable[str]) -> bool:
    """Returns whether a tensor belongs to one of the modules, "input" or "output"."""
    return any(f".{module}_module." in f".{name}" for module in modules)
