"""Carry factors by name: low-rank factors that an aggregation added to a module for good, frozen beside the base (s = 1).

`....q_proj.lora_carry_A.weight` is [M, in], `....lora_carry_B.weight` is [out, M]. Other tools do not know carry factors, so a peft
folder holds them stacked with the adapter as one LoRA. Knows only arrays; `model.modules` computes with them.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgelam_fl.model.lora import A, B

CARRY_A, CARRY_B = ".lora_carry_A.weight", ".lora_carry_B.weight"


def is_carry(name: str) -> bool:
    """Whether a tensor is a carry factor."""
    return name.endswith((CARRY_A, CARRY_B))


def modules_of(tensors: Mapping[str, np.ndarray]) -> list[str]:
    """Lists the modules that have carry factors."""
    return [name.removesuffix(CARRY_A) for name in tensors if name.endswith(CARRY_A)]


def without_carry(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns all tensors but the carry factors."""
    return {name: array for name, array in tensors.items() if not is_carry(name)}


def stacked(adapter: Mapping[str, np.ndarray], scales: Mapping[str, float]) -> dict[str, np.ndarray]:
    """Stacks adapter and carry factors to one LoRA per module, still scaled as the adapter's factors are.

    The B of the carry is divided by that scale, of `scales` by module; all other arrays are kept.
    """
    joined = without_carry(adapter)
    for module in modules_of(adapter):
        a_RI, b_OR = adapter[module + A], adapter[module + B]
        joined[module + A] = np.concatenate([a_RI, adapter[module + CARRY_A]])
        carry_b_OM = adapter[module + CARRY_B] * np.float32(1 / scales[module])
        joined[module + B] = np.concatenate([b_OR, carry_b_OM], axis=1)
    return joined


def unstacked(
    joined: Mapping[str, np.ndarray], scales: Mapping[str, float], ranks: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """Separates what `stacked` joined. `ranks`: the adapter's own rank, for each module that has carry factors."""
    adapter = dict(joined)
    for module, rank in ranks.items():
        a_MI, b_OM = joined[module + A], joined[module + B]
        adapter[module + A], adapter[module + B] = a_MI[:rank], b_OM[:, :rank]
        adapter[module + CARRY_A], adapter[module + CARRY_B] = a_MI[rank:], b_OM[:, rank:] * np.float32(scales[module])
    return adapter
