"""Small modules that replace parts of the whole model in a stage. They know nothing about slices or files.

Shapes: B rows, T tokens, D hidden.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import DynamicCache

_PASSED_ON = ("past_key_values", "hidden_states", "attentions", "cross_attentions", "router_logits")


class Pass(nn.Module):
    """Passes its input through, in place of a layer of another stage, or of what follows the last layer."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states


class Normed(nn.Module):
    """Passes hidden states through to the head, in place of the model's body: they come from the body already."""

    def forward(self, *_: Any, inputs_embeds: torch.Tensor, **__: Any) -> SimpleNamespace:
        """Returns what a body of any family returns, without what heads only pass on."""
        return SimpleNamespace(last_hidden_state=inputs_embeds, **dict.fromkeys(_PASSED_ON))


class Embedded(nn.Module):
    """Replaces an embedding that also adds positions and the like: its input was embedded on another stage."""

    def forward(self, inputs_embeds: torch.Tensor, **_: Any) -> torch.Tensor:
        return inputs_embeds


class NoPositions(nn.Module):
    """Replaces a table of positions: they were added on another stage."""

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros(())  # without dimensions, so that neither its dtype nor its chip has an effect


class TaskHead(nn.Linear):
    """A task head. It is trained as a whole, so it and its logits are fp32 whatever the frozen model computes in."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.to(self.weight.dtype))


class CarryFactors:
    """Frozen factors beside a frozen linear layer of any kind: they add B A x to its output (model.carry).

    The layer itself does not change. Shapes: M rank, I in, O out.
    """

    def __init__(self, linear: nn.Module, dtype: torch.dtype) -> None:
        self._linear, self._dtype = linear, dtype
        self._hook: Any = None
        self._a_MI, self._b_OM = torch.empty(0), torch.empty(0)
        self.arrays: tuple[np.ndarray, np.ndarray] | None = None  # A and B in fp32, as given

    def take(self, arrays: tuple[np.ndarray, np.ndarray] | None) -> None:
        """Uses these factors from now on; None: no factors."""
        if arrays is None or self.arrays is None or not all(map(np.array_equal, arrays, self.arrays)):
            self._put(arrays)

    def _put(self, arrays: tuple[np.ndarray, np.ndarray] | None) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = self.arrays = None
        if arrays is not None:
            a_MI, b_OM = (torch.tensor(array) for array in arrays)
            self.arrays = a_MI.numpy(), b_OM.numpy()
            chip = next(self._linear.parameters()).device
            self._a_MI, self._b_OM = a_MI.to(chip, self._dtype), b_OM.to(chip, self._dtype)
            self._hook = self._linear.register_forward_hook(self._add)

    def _add(self, _: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return output + functional.linear(functional.linear(inputs[0], self._a_MI), self._b_OM)


class CutDown(nn.Module):
    """A of the cut adapter, at the last host (model.cut): gives hidden states [B, T, D] with u = A h [B, T, R] beside them.

    The values u follow the hidden states in the last dimension.
    """

    def __init__(self, hidden: int, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rank, hidden))

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        u_BTR = functional.linear(hidden_BTD.to(self.weight.dtype), self.weight)
        return torch.cat([hidden_BTD, u_BTR.to(hidden_BTD.dtype)], dim=-1)


class CutUp(nn.Module):
    """B of the cut adapter, at the device (model.cut): takes what `CutDown` gives, and gives h + s B u [B, T, D]."""

    def __init__(self, hidden: int, rank: int, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden, rank))
        self._scale = scale

    def forward(self, both: torch.Tensor) -> torch.Tensor:
        hidden_BTD, u_BTR = both.split(list(self.weight.shape), dim=-1)
        added_BTD = self._scale * functional.linear(u_BTR.to(self.weight.dtype), self.weight)
        return hidden_BTD + added_BTD.to(hidden_BTD.dtype)


class UnitSeed:
    """The seed of the micro-batch that is being computed; None: no dropout."""

    def __init__(self) -> None:
        self.value: int | None = None
        self.dora: list[nn.Module] = []
        """Modules of peft that take their dropout into account only if they are in training mode."""

    @contextmanager
    def set_to(self, value: int | None) -> Iterator[None]:
        before = self.value
        self._put(value)
        try:
            yield
        finally:
            self._put(before)

    def _put(self, value: int | None) -> None:
        self.value = value
        for module in self.dora:
            module.training = value is not None  # its parts keep their own mode


class UnitDropout(nn.Module):
    """Dropout whose mask depends only on the micro-batch's seed, the module's name and the shape.

    The mask is therefore the same when a layer is recomputed, on any stage, and on any chip: it is drawn on the CPU.
    """

    def __init__(self, share: float, name: str, seed: UnitSeed) -> None:
        super().__init__()
        self.share, self.name, self.seed = share, name, seed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.seed.value is None:
            return x
        mixed = hashlib.sha256(f"{self.seed.value} {self.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(mixed[:8], "little"))
        dropped = (torch.rand(x.shape, generator=generator) < self.share).to(x.device)
        return x.masked_fill(dropped, 0) / (1 - self.share)


class StageCache(DynamicCache):
    """Keys and values of a stage's layers, and the number of tokens so far, even if no layer of the stage saw them.

    transformers asks the first layer of a kind (full or sliding) for lengths and masks; a stage may lack that layer.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.mask_BT: torch.Tensor | None = None  # 1 for real tokens, 0 for padding, over all so far; on the CPU

    @property
    def tokens(self) -> int:
        return 0 if self.mask_BT is None else self.mask_BT.shape[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        layer = self.layers[layer_idx]
        if not layer.is_sliding:
            return self.tokens + query_length, 0
        layer.cumulative_length = self.tokens  # the value it would have if this layer ran here
        sizes: tuple[int, int] = layer.get_mask_sizes(query_length)
        return sizes
