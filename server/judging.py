"""Which contributions are left out of an aggregate: those whose update is far larger than the others', or against it.

An update is what a source trained minus what it started from. Its size is the root mean square over all its numbers, so that
sources with unlike layers compare; devices are compared with devices, sites with sites. As at a host, there are two measures,
and only what exceeds the factor in both is too large: the size, and the size per learning rate, since a source that made more
steps went farther. Of a round whose updates are kept, the directions are judged too if the task answers with texts, as those of
gradients at a host (`split.judging`). With fewer than three sources nobody can say which is the odd one. Knows no rule of aggregation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from edgelam_fl.model.adapter import WIDE_BLOCK, Adapter, Joined, JoinedLayout, blocks
from edgelam_fl.plan.layout import Layout, site_source
from edgelam_fl.plan.modes import host_mode
from edgelam_fl.split.judging import LEAST_SOURCES, Size, Sizes, bearings, direction_problem
from edgelam_fl.wire import edgelam_pb2 as pb
from server.global_adapter import at_rank
from strategies.aggregation.factors import A, is_factor
from strategies.api import Contribution

QUIET = np.errstate(
    over="ignore", invalid="ignore"
)  # as a decorator: to enter it for each tensor would take longer than its sum
_VANISHING = 1e-30  # of an fp32 square: far above the smallest, so that a sum of larger ones is exact enough


@dataclass
class UpdateJudge:
    """The sizes of a round's updates so far, and what follows from them."""

    start: Adapter
    """The global adapter that the round started from."""
    personal: Mapping[str, Adapter]
    """Per source, the tensors that it started from instead."""
    site_sources: frozenset[str]
    """The sources that are sites; all others are devices."""
    factor: float
    """How many times the median is still fine; 0: any size (federation.update_factor)."""
    rslora: bool = False
    """Whether factors are scaled by the root of their rank (lora.use_rslora)."""
    directions: bool = False
    """Whether honest updates do not point against each other in this task."""
    _sizes: dict[bool, Sizes] = field(default_factory=lambda: {False: Sizes(), True: Sizes()})  # of devices, of sites
    _starts: dict[JoinedLayout, tuple[np.ndarray, float]] = field(
        default_factory=dict
    )  # the start's numbers and the largest of their magnitudes, by layout

    @QUIET
    def measure(self, contributions: Sequence[Contribution]) -> Size:
        """Returns the size of one source's update, and remembers it for the medians."""
        source = contributions[0].source
        own, total, count = self.personal.get(source, {}), 0.0, 0
        for contribution in contributions:
            tensors = contribution.tensors
            if isinstance(tensors, Joined) and not own:
                total += self._moved(tensors)
                count += len(tensors.numbers)
                continue
            for name, array in tensors.items():
                total += square_sum(array - self._like(name, own.get(name, self.start[name]), array))
                count += array.size
        rms = (total / max(1, count)) ** 0.5
        lr_sum = max(contribution.lr_sum for contribution in contributions)
        size = Size(rms, rms / lr_sum if lr_sum else rms)
        self._sizes[source in self.site_sources].add(size)
        return size

    def update(self, contributions: Sequence[Contribution]) -> Iterator[tuple[str, np.ndarray]]:
        """Yields what a source's tensors gained, without those that are its own and that nobody else gets."""
        own = self.personal.get(contributions[0].source, {})
        for contribution in contributions:
            for name, array in contribution.tensors.items():
                if name not in own:
                    yield name, array - self._like(name, self.start[name], array)

    @QUIET
    def is_bounded(self, tensors: Joined, most: float) -> bool:
        """Returns whether all numbers are finite and at most `most`, by how far they are from the start; False: that does not say.

        `measure` needs that distance anyway, and takes it from here. All of `tensors` must be in the start.
        """
        _, largest = self._joined_start(tensors)
        return largest + self._moved(tensors) ** 0.5 <= most

    def _moved(self, tensors: Joined) -> float:
        """Returns the sum of squares of an update, which its tensors remember."""
        start, _ = self._joined_start(tensors)
        if tensors.moved is None or tensors.moved[0] is not start:
            room, total = np.empty(WIDE_BLOCK, np.float32), 0.0
            for block in blocks(len(start), WIDE_BLOCK):
                numbers = tensors.numbers[block]
                moved = np.subtract(numbers, start[block], out=room[: len(numbers)])
                total += sum(square_sum(moved[part]) for part in blocks(len(moved)))
            tensors.moved = start, total
        return tensors.moved[1]

    def _joined_start(self, tensors: Joined) -> tuple[np.ndarray, float]:
        """Returns the numbers that those of `tensors` started from, and the largest of their magnitudes."""
        found = self._starts.get(tensors.layout)
        if found is None:
            likes = [self._like(name, self.start[name], array).ravel() for name, array in tensors.items()]
            numbers = np.concatenate(likes, dtype=np.float32)
            found = self._starts[tensors.layout] = numbers, float(np.abs(numbers).max(initial=0.0))
        return found

    def _like(self, name: str, start: np.ndarray, trained: np.ndarray) -> np.ndarray:
        """Returns the start of a factor in the rank in which it was trained."""
        if start.shape == trained.shape or not is_factor(name):
            return start
        rank = len(trained) if name.endswith(A) else trained.shape[1]
        return at_rank(name, start, rank, rslora=self.rslora)

    def problem(self, source: str, size: Size) -> str:
        """Returns why an update is left out; empty if it counts."""
        group = self._sizes[source in self.site_sources]
        times = group.times_the_median(size) if self.factor else 0.0
        if times <= self.factor:
            return ""
        return f"an update of {times:.0f} times the median of {len(group)} (federation.update_factor = {self.factor:g})"


def without_outliers(
    contributions: Sequence[Contribution], judge: UpdateJudge, layout: Layout
) -> tuple[list[Contribution], dict[str, str]]:
    """Returns the contributions that count, and why each source that does not is left out.

    The devices of a site that is left out do not count either: they trained against its layers.
    """
    by_source: dict[str, list[Contribution]] = {}
    for contribution in contributions:
        by_source.setdefault(contribution.source, []).append(contribution)
    sizes = {source: judge.measure(found) for source, found in by_source.items()}
    problems = {source: problem for source, size in sizes.items() if (problem := judge.problem(source, size))}
    if judge.factor and judge.directions:
        problems |= _against_the_others({one: by_source[one] for one in by_source if one not in problems}, judge)
    for site in layout.sites:
        if site_source(site.name) in problems:
            problems |= {name: f"its {site_source(site.name)} is left out" for name in site.members}
    return [one for one in contributions if one.source not in problems], problems


@QUIET
def _against_the_others(by_source: Mapping[str, Sequence[Contribution]], judge: UpdateJudge) -> dict[str, str]:
    """Returns the sources whose updates point against those of the others of their kind, devices or sites, with the reason.

    Looks at the tensors that sources share, and at factors of one rank.
    """
    norms = {one: sum(square_sum(part) for _, part in judge.update(by_source[one])) ** 0.5 for one in by_source}
    problems = {}
    for of_sites in (False, True):
        alike = [one for one in by_source if norms[one] > 0 and (one in judge.site_sources) == of_sites]
        if len(alike) < LEAST_SOURCES:
            continue
        votes = _votes([(by_source[one], norms[one]) for one in alike], judge)
        for source, bearing in zip(alike, bearings(votes, [norms[one] for one in alike]), strict=True):
            if problem := direction_problem(bearing, "federation.update_factor"):
                problems[source] = f"an update {problem}"
    return problems


def _votes(updates: Sequence[tuple[Sequence[Contribution], float]], judge: UpdateJudge) -> list[float]:
    """Returns the dot product of each update's direction with the sum of all directions. `updates`: each with its norm."""
    total: dict[tuple[str, tuple[int, ...]], np.ndarray] = {}
    for update, norm in updates:
        for name, part in judge.update(update):
            key = name, part.shape
            total[key] = total.get(key, np.float32(0.0)) + part / np.float32(norm)
    return [
        sum(float(np.vdot(part, total[name, part.shape])) for name, part in judge.update(update)) / norm
        for update, norm in updates
    ]


def spoilers(
    layout: Layout, plans: Mapping[str, pb.Plan], reports: Mapping[str, pb.JobReport], refused: Mapping[str, str]
) -> dict[str, str]:
    """Returns the devices that others have trained one adapter with, and whose numbers were found out too late for that.

    `reports`: of hosts, by name, which name the devices of their site that they found out after some steps. `refused`: why what a source has
    trained is not taken; if it gave that, its gradients are not to be trusted either.
    """
    late = {
        host: {one.device: one.reason for one in report.host.left_out if one.was_counted}
        for host, report in reports.items()
    }
    found = {}
    for site in layout.sites:
        of_site = {name: why for host in site.hosts for name, why in late.get(host.name, {}).items()}
        for name in site.members if site.hosts and site_source(site.name) not in refused else ():
            plan, reason = plans[name], of_site.get(name) or refused.get(name)
            if reason and plan.lora.train_hosts and host_mode(plan.host_mode).is_shared("site"):
                found[name] = reason
    return found


def square_sum(array: np.ndarray) -> float:
    """Returns the sum of squares to about seven digits. Not finite if the array is not; may be infinite for values above 1e17, which numpy warns of outside `QUIET`."""
    total = float(np.vdot(array, array))
    # Squares of tiny fp32 numbers vanish.
    return total if total > _VANISHING * array.size else float(np.sum(np.square(array, dtype=np.float64)))


def first_not_finite(tensors: Iterable[Mapping[str, np.ndarray]]) -> str:
    """Returns the name of a tensor with a value that is infinite or not a number; empty if there is none."""
    return next((name for one in tensors for name, array in one.items() if not np.isfinite(array).all()), "")
