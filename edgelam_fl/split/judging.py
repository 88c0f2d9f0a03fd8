"""The judgement of numbers that came from another node, before they touch anything that several nodes share.

Knows tensors and sizes; knows neither devices nor steps. `split.lane` asks about the gradients of a turn, `split.turns` about
the norms that devices report, `split.step` and `split.driver` about what a host sent.

A gradient is judged by its size, in two measures: what it adds to the step's sum, and what it is per label of its device. A
device with many labels is large in the first, a device with few labels is noisy in the second, and both are honest: a gradient
is too large only if it exceeds the factor in both. With fewer than three devices nobody can say which of them is the odd one,
so there only `MOST_NORM` bounds a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

MOST_NORM = 1e4  # of a gradient per label: training that is any good stays far below, whatever the model
LEAST_DEVICES = 3  # for a median


@dataclass(frozen=True)
class Size:
    """The size of one device's gradient."""

    in_sum: float  # norm of what it adds to the step's gradient
    per_label: float  # norm of the mean over the device's own labels


def is_finite(tensor: torch.Tensor) -> bool:
    """Returns whether no element is infinite or not a number. The tensor has at least one element."""
    least, most = tensor.aminmax()  # one pass without a copy; an element that is not a number is both
    return math.isfinite(least.item()) and math.isfinite(most.item())


def norm_of(gradients: Iterable[torch.Tensor | None]) -> float:
    """Returns the norm over all gradients; infinite or not a number if an element is, or if fp32 cannot hold the norm."""
    here = [gradient.detach() for gradient in gradients if gradient is not None]
    return torch.stack(torch._foreach_norm(here)).norm().item() if here else 0.0


def size_problem(own: Size, group: Sequence[Size], factor: float) -> str:
    """Returns why a gradient is not used; empty if it is.

    `group`: the sizes of all devices that share the adapter, this one included. `factor`: how many times the group's median
    is still fine; 0: any.
    """
    if not (math.isfinite(own.in_sum) and math.isfinite(own.per_label)):
        return "a gradient that is not finite"
    if own.per_label > MOST_NORM:
        return f"a gradient of norm {own.per_label:.3g}, more than {MOST_NORM:g}"
    if not factor or len(group) < LEAST_DEVICES:
        return ""
    times = min(
        _times(own.in_sum, [one.in_sum for one in group]), _times(own.per_label, [one.per_label for one in group])
    )
    if times <= factor:
        return ""
    return (
        f"a gradient of {times:.0f} times the median of {len(group)} devices (federation.gradient_factor = {factor:g})"
    )


def _times(own: float, group: Sequence[float]) -> float:
    """Returns how many times the median `own` is; 0 if the median is, so that nothing can be said."""
    middle = median(one if math.isfinite(one) else math.inf for one in group)
    return own / middle if middle > 0 else 0.0
