"""What the codecs `int8` and `int4` have in common: whole numbers in units of a scale per group, after the group was turned.

A few channels of hidden states are many times larger than the others, and would set the scale for all. So each group of numbers
is multiplied by a Hadamard matrix, which spreads a large number evenly over its group, and by the matrix's inverse at the
receiver (as QuaRot does with weights and activations, arXiv 2404.00456).

Shapes: R rows, D numbers of a row, G groups, N numbers of a group.
"""

from __future__ import annotations

from functools import cache

import torch
from torch.nn import functional

from edgelam_fl.wire.codecs.rows import LEAST_SCALE, largest, scaled


def turned(rows_RD: torch.Tensor, group: int, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a bfloat16 scale per group [G, 1] and the groups' whole numbers [G, N], from -most to most, as int8."""
    filled_RD = functional.pad(rows_RD, (0, -rows_RD.shape[1] % group))
    # By the matrix over its size, so that no sum is larger than the numbers; what is left out comes back with the inverse.
    turned_GN = filled_RD.view(-1, group) @ (_hadamard(group) / group)
    scales_G1 = (largest(turned_GN) / most).clamp_(min=LEAST_SCALE).to(torch.bfloat16)
    # Clamped before they are int8: the largest number by a scale that was rounded down may be more than `most`.
    return scales_G1, scaled(turned_GN, scales_G1.float(), most)


def turned_back(scales_G1: torch.Tensor, numbers_GN: torch.Tensor, width: int) -> torch.Tensor:
    """Returns the rows [R, width] as float32. `numbers_GN`: of any element type."""
    group = numbers_GN.shape[1]
    rows_RD = (numbers_GN * scales_G1.float()) @ _hadamard(group)
    return rows_RD.view(-1, -(-width // group) * group)[:, :width]


@cache
def _hadamard(size: int) -> torch.Tensor:
    """Returns the Hadamard matrix [N, N] of ones and minus ones. It is its own inverse, but for the factor N."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return matrix
