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
from bisect import insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MOST_NORM = 1e4  # of a gradient per label: training that is any good stays far below, whatever the model
LEAST_SOURCES = 3  # for a median


@dataclass(frozen=True)
class Size:
    """The size of what one of several sources adds: a device's gradient, or an update."""

    added: float  # norm of what it adds to the sum
    per_unit: float  # the same per unit of what is behind it: a gradient's per label, an update's per learning rate


def is_finite(tensor: torch.Tensor) -> bool:
    """Returns whether no element is infinite or not a number. The tensor has at least one element."""
    least, most = tensor.aminmax()  # one pass without a copy; an element that is not a number is both
    return math.isfinite(least.item()) and math.isfinite(most.item())


def norm_of(gradients: Iterable[torch.Tensor | None]) -> float:
    """Returns the norm over all gradients; infinite or not a number if an element is, or if fp32 cannot hold the norm."""
    import torch  # not at the top: a ServerApp judges sizes alone, and starts a second earlier without

    here = [gradient.detach() for gradient in gradients if gradient is not None]
    return torch.stack(torch._foreach_norm(here)).norm().item() if here else 0.0


def size_problem(own: Size, group: Sequence[Size], factor: float) -> str:
    """Returns why a gradient is not used; empty if it is.

    `group`: the sizes of all devices that share the adapter, this one included. `factor`: how many times the group's median
    is still fine; 0: any.
    """
    if not (math.isfinite(own.added) and math.isfinite(own.per_unit)):
        return "a gradient that is not finite"
    if own.per_unit > MOST_NORM:
        return f"a gradient of norm {own.per_unit:.3g}, more than {MOST_NORM:g}"
    times = times_the_median(own, group) if factor else 0.0
    if times <= factor:
        return ""
    return (
        f"a gradient of {times:.0f} times the median of {len(group)} devices (federation.gradient_factor = {factor:g})"
    )


def times_the_median(own: Size, group: Sequence[Size]) -> float:
    """Returns how many times the median a size is, in the measure in which that is less; 0 if the group has no median.

    `group`: the sizes of all, this one included.
    """
    sizes = Sizes()
    for one in group:
        sizes.add(one)
    return sizes.times_the_median(own)


class Sizes:
    """A group's sizes in order, so that the median of many is not looked for again for each of them."""

    def __init__(self) -> None:
        self._added: list[float] = []
        self._per_unit: list[float] = []

    def __len__(self) -> int:
        return len(self._added)

    def add(self, size: Size) -> None:
        for ordered, value in ((self._added, size.added), (self._per_unit, size.per_unit)):
            insort(ordered, value if math.isfinite(value) else math.inf)

    def times_the_median(self, own: Size) -> float:
        """Returns how many times the median `own`, one of the group, is, as the function of this name."""
        if len(self) < LEAST_SOURCES:
            return 0.0
        return min(_times(own.added, self._added), _times(own.per_unit, self._per_unit))


def _times(own: float, ordered: Sequence[float]) -> float:
    """Returns 0 if the median is 0: then nothing can be said."""
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return own / middle if middle > 0 else 0.0
