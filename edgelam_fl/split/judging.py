"""The judgement of numbers that came from another node, before they touch anything that several nodes share.

Knows tensors, sizes and directions; knows neither devices nor steps. `split.lane` asks about the gradients of a turn,
`split.turns` about the norms that devices report, `split.step` and `split.driver` about what a host sent, and
`server.judging` about updates.

A gradient is judged by its size, in two measures: what it adds to the step's sum, and what it is per label of its device. A
device with many labels is large in the first, a device with few labels is noisy in the second, and both are honest: a gradient
is too large only if it exceeds the factor in both. It is compared with the largest that each device had in the round, not with
the newest: once nearly all is learned, those are tiny, and an example that nobody expects stands out, the very one to learn from.
With fewer than three devices nobody can say which of them is the odd one, so there only `MOST_NORM` bounds a gradient.

A flipped sign has an honest size. So directions are judged as well: by the cosine of a source's direction with the sum of the
others' directions, in which each source has one vote whatever its size. In a single step honest gradients often point against
each other, if only because the step before went too far. In a round's first step, at the adapter that all start from, and in the
sum over several steps they hardly ever do, as long as there is something to learn; near the optimum, where all directions together
vanish, the others do not agree either. So a source is opposed only by the sum over the steps so far, in the round's first step or
after a few, and only if the others agree. For that at least two others are needed.

Where few answers are possible, a device of which most have another answer than all others points against them, and is honest. So
whoever asks about directions leaves out tasks that answer with classes or values. In the others such a device shows itself by its
size: the farther the others go, the larger is its gradient and the smaller are theirs, until all balance. What is much larger than
the others is not opposed.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MOST_NORM = 1e4  # of a gradient per label: training that is any good stays far below, whatever the model
LEAST_SOURCES = 3  # for a median, and for others who can agree
_FEW_STEPS = 4  # below so many, but for the first alone, sums of directions say little
_OPPOSED, _AGREED = -0.7, 0.5  # measured with a flipped sign: below -0.85 in a first step, below -0.7 as an update
_MOST_TIMES = 2.0  # the others' mean size: a flipped sign has about that of the others
_CANCELLED = 1e-6  # squared norm of a sum of directions: below it, they cancel out


@dataclass(frozen=True)
class Size:
    """The size of what one of several sources adds: a device's gradient, or an update."""

    added: float  # norm of what it adds to the sum
    per_unit: float  # the same per unit of what is behind it: a gradient's per label, an update's per learning rate

    def at_least(self, other: Size) -> Size:
        """Returns the larger of the two in each measure."""
        return Size(max(self.added, other.added), max(self.per_unit, other.per_unit))


NO_SIZE = Size(0.0, 0.0)


@dataclass(frozen=True)
class Bearing:
    """How the direction of one source lies to those of the others, as two cosines, and its size."""

    along: float = 0.0  # of the source with the sum of the others
    agreed: float = 0.0  # of one of the others with the sum of the rest of them
    times: float = 0.0  # its size, over the mean of the others'

    @property
    def is_opposed(self) -> bool:
        """Whether the source points against others that agree, without pulling much harder than they do."""
        return self.along <= _OPPOSED and self.agreed >= _AGREED and self.times <= _MOST_TIMES


def bearings(votes: Sequence[float], sizes: Sequence[float]) -> list[Bearing]:
    """Returns the bearing of each of several sources; zeros if they are fewer than three.

    `votes`: the dot product of each source's direction, a vector of norm 1, with the sum of all directions. `sizes`: of the
    sources, in any one measure; positive.
    """
    if len(votes) < LEAST_SOURCES:
        return [Bearing()] * len(votes)
    whole, others = math.fsum(votes), len(votes) - 1  # the squared norm of the sum
    times = [size * others / (math.fsum(sizes) - size) for size in sizes]
    return [_bearing(vote, max(0.0, whole - 2 * vote + 1), others, one) for vote, one in zip(votes, times, strict=True)]


def _bearing(vote: float, squared: float, others: int, times: float) -> Bearing:
    """Returns the bearing of a source. `squared`: the squared norm of the sum of the other sources' directions."""
    cosine = (squared - others) / (others * (others - 1))  # mean of two of the others
    rest = others - 1
    agreed = cosine * rest / math.sqrt(max(_CANCELLED, rest + rest * (rest - 1) * cosine))
    return Bearing((vote - 1) / math.sqrt(squared) if squared > _CANCELLED else 0.0, agreed, times)


@dataclass
class Course:
    """The sum of the directions of one source's gradients, over steps."""

    steps: int = 0
    """The steps whose gradients are summed."""
    size: float = 0.0
    """The sum of the gradients' norms per label."""
    sums: dict[int, torch.Tensor] = field(default_factory=dict)  # by parameter

    def says_much(self, step: int) -> bool:
        """Returns whether the sum may be compared with the others' in a step of the round."""
        return step == 0 or self.steps >= _FEW_STEPS

    def add(self, gradient: Sequence[torch.Tensor | None], size: Size) -> None:
        """Adds a step's gradient, which is one vector over all parameters. `size`: its size; the norm is finite and not zero."""
        import torch  # as in norm_of

        self.steps += 1
        self.size += size.per_unit
        for number, part in enumerate(gradient):
            if part is not None:
                self.sums.setdefault(number, torch.zeros_like(part)).add_(part.detach(), alpha=1 / size.added)


def bearings_of(courses: Sequence[Course]) -> list[Bearing]:
    """Returns the bearing of each of several courses; zeros if they are fewer than three."""
    norms = [norm_of(course.sums.values()) for course in courses]
    if len(courses) < LEAST_SOURCES or not all(norms):
        return [Bearing()] * len(courses)
    whole = Course()
    for course, norm in zip(courses, norms, strict=True):
        whole.add([course.sums.get(number) for number in range(1 + max(course.sums))], Size(norm, norm))
    dots = [[(part * whole.sums[number]).sum() for number, part in course.sums.items()] for course in courses]
    votes = [math.fsum(dot.item() for dot in of_one) / norm for of_one, norm in zip(dots, norms, strict=True)]
    return bearings(votes, [course.size for course in courses])


def is_finite(tensor: torch.Tensor) -> bool:
    """Returns whether no element is infinite or not a number. The tensor has at least one element."""
    least, most = tensor.aminmax()  # one pass without a copy; an element that is not a number is both
    return math.isfinite(least.item()) and math.isfinite(most.item())


def norm_of(gradients: Iterable[torch.Tensor | None]) -> float:
    """Returns the norm over all gradients; infinite or not a number if an element is, or if fp32 cannot hold the norm."""
    import torch  # not at the top: a ServerApp judges sizes alone, and starts a second earlier without

    here = [gradient.detach() for gradient in gradients if gradient is not None]
    return torch.stack(torch._foreach_norm(here)).norm().item() if here else 0.0


def direction_problem(bearing: Bearing, setting: str) -> str:
    """Returns why a source is not used whose direction lies like this to the others'; empty if it is. `setting`: of the run file, which turns this off."""
    return (
        f"against the direction in which the others agree ({setting} = 0 would allow it)" if bearing.is_opposed else ""
    )


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
