"""The sum of a private round's updates: each is clipped when it has come, and only the noisy mean is ever seen.

Knows arrays and sources; knows neither what is promised nor what was spent.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from edgelam_fl.model.adapter import Adapter
from edgelam_fl.privacy.mechanism import clip_to, gaussian
from server.emulated_channel import RoundOnAir
from strategies.aggregation.fedavg import WeightedMean
from strategies.api import Contribution


@dataclass(frozen=True)
class Counts:
    """The updates in a released mean."""

    came: int = 0
    whole: int = 0
    """Those that the clipping bound left as they were."""

    def plus(self, other: Counts) -> Counts:
        return Counts(self.came + other.came, self.whole + other.whole)


@dataclass
class PrivateSums:
    """The sum of a round's clipped updates, per site: as large as one update each, however many arrive.

    The adapters of sites that several devices train pass through: their noise was added on the host.
    """

    start: Adapter
    """What the updates start from: exactly the tensors that devices train in this round."""
    site_sources: frozenset[str]
    hosts_release: bool
    """Whether hosts train an adapter that several devices share, and have added the noise to it; else nothing of theirs counts."""
    clip: float
    """The L2 norm that an update may have; infinity: the devices have clipped it."""
    sigma: float
    """Standard deviation of the noise on the sum; 0: the updates have their noise."""
    expected: float
    """What the sum is divided by, whoever came."""
    generator: np.random.Generator
    air: RoundOnAir | None = None
    """The emulated channel that adds noise to each update; None: nothing is added on the way."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Why an update does not count, by device: only because parts of it are missing, since clipping bounds what it can do."""
    released: Counts | None = None
    """What the released mean is of; None: nothing was released yet."""
    _came: set[str] = field(default_factory=set)  # devices whose update counts
    _waiting: dict[tuple[str, str], Adapter] = field(default_factory=dict)  # by (site, device): updates that miss parts
    _sums: dict[str, Adapter] = field(default_factory=dict)  # by site, in float64
    _counts: dict[str, Counts] = field(default_factory=dict)
    _of_sites: dict[str, WeightedMean] = field(default_factory=dict)

    def add(self, parts: Iterable[tuple[str, Contribution]]) -> None:
        """Adds the parts of one reply, each with its site. An update that comes in several replies waits for all its parts.

        Of each device one update counts, the first that is whole.
        """
        for site, part in parts:
            if part.source in self.site_sources:
                if self.hosts_release:
                    # Weights say how many labels a device has, so they have no say in what is released.
                    self._of_sites.setdefault(site, WeightedMean()).add(replace(part, weight=1.0))
                continue
            if part.source in self._came:
                continue  # the noise is for one update of each device
            waiting = self._waiting.setdefault((site, part.source), {})
            waiting |= {
                name: array - np.float64(self.start[name]) for name, array in part.tensors.items() if name in self.start
            }
            if len(waiting) == len(self.start):
                self._add_update(site, part.source, self._waiting.pop((site, part.source)))

    def _add_update(self, site: str, source: str, update: Adapter) -> None:
        self._came.add(source)
        clipped, norm = clip_to(update, self.clip)
        sums = self._sums.setdefault(site, {})
        sigma = self.air.send(source) if self.air is not None else 0.0
        for name, array in clipped.items():
            noisy = array + gaussian(array.shape, sigma, self.generator) if sigma else array
            sums[name] = sums[name] + noisy if name in sums else noisy
        self._counts[site] = self._counts.get(site, Counts()).plus(Counts(1, int(norm <= self.clip)))

    def contributions(self, broken: Collection[str]) -> list[Contribution]:
        """Returns the private mean as one contribution, and the mean of the sites; without the `broken` sites.

        Draws the noise, so it is to be called once.
        """
        for (site, source), waiting in self._waiting.items():
            if site not in broken:
                self.left_out[source] = f"its update has {len(waiting)} of {len(self.start)} tensors"
        found = list[Contribution]()
        sites = WeightedMean()
        for site in sorted(self._of_sites.keys() - set(broken)):
            sites.merge(self._of_sites.pop(site))
        found += [Contribution("the sites", weight, tensors) for weight, tensors in sites.by_weight()]
        if self.start:
            found.append(Contribution("the devices", 1.0, self._mean(broken)))
        return found

    def _mean(self, broken: Collection[str]) -> Adapter:
        counted = sorted(self._sums.keys() - set(broken))
        self.released = Counts()
        for site in counted:
            self.released = self.released.plus(self._counts[site])
        new: Adapter = {}
        for name, start in self.start.items():
            noise = gaussian(start.shape, self.sigma, self.generator)
            total = noise + sum((self._sums[site][name] for site in counted), start=np.zeros(start.shape))
            new[name] = (start + total / self.expected).astype(np.float32)
        return new
