"""Over-the-air aggregation: all sources send their updates in the same symbols, and the server gets the weighted mean plus noise.

Power control is zero forcing (as in arXiv 2502.12559), per tensor: the source whose channel is weakest for what it has to send
decides how strong all of them may be. The channel is emulated: updates come one by one as always, and this rule does to them
what the air would have done. A tensor with one source is not sent over the air and keeps its bits.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Sequence
from random import Random
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from edgelam_fl.errors import ConfigError
from edgelam_fl.wireless.over_the_air import AirSum, air_sum
from strategies.aggregation.factors import in_order
from strategies.api import Aggregated, Aggregation, Contribution, Start

_LEAST_FADING = 1e-9  # a channel never vanishes


class OverTheAir(Aggregation):
    """FedAvg of updates through a shared radio channel."""

    def __init__(
        self,
        *,
        snr_db: Annotated[float, Field(ge=-30, le=100)] = 20.0,
        fading: Literal["rayleigh", "none"] = "rayleigh",
    ) -> None:
        """`snr_db`: a source's power over the noise, on a channel of gain 1. `fading`: "rayleigh" draws each source's channel anew
        in every round, with mean gain 1; "none" gives all of them gain 1.
        """
        self.snr, self.fading = 10 ** (snr_db / 10), fading

    def aggregate(self, contributions: Sequence[Contribution], start: Start) -> Aggregated:
        sources: dict[str, list[Contribution]] = {}
        for contribution in in_order(contributions):
            for name in contribution.tensors:
                sources.setdefault(name, []).append(contribution)
        generator = np.random.default_rng([start.seed, start.round])
        new: dict[str, np.ndarray] = {}
        error, moved = 0.0, 0.0
        for name in sorted(sources):
            if len(sources[name]) == 1:
                new[name] = sources[name][0].tensors[name]
                continue
            arrived = self._sum(name, sources[name], start, generator)
            new[name] = (start.tensors[name] + arrived.numbers).astype(np.float32)
            error += arrived.expected_error * arrived.numbers.size
            moved += float(np.square(arrived.numbers).sum())
        return Aggregated(new, facts={"air_error": math.sqrt(error / moved)} if moved else {})

    def _sum(self, name: str, sources: Sequence[Contribution], start: Start, generator: np.random.Generator) -> AirSum:
        """Returns the weighted mean of what the sources changed in a tensor, as it arrives."""
        shapes = {source.tensors[name].shape for source in sources}
        if len(shapes) > 1:
            raise ConfigError(f"this aggregation needs equal ranks: {name} has shapes {sorted(shapes)}")
        total = sum(source.weight for source in sources)
        return air_sum(
            [source.tensors[name] - start.tensors[name].astype(np.float64) for source in sources],
            [source.weight / total for source in sources],
            [self._channel(source.source, start) for source in sources],
            self.snr,
            generator,
        )

    def _channel(self, source: str, start: Start) -> complex:
        """Returns a source's channel of the round, drawn from the run's seed and the source's name."""
        if self.fading == "none":
            return 1.0
        random = Random(f"{start.seed}/air/{start.round}/{source}")
        return cmath.rect(math.sqrt(max(random.expovariate(1.0), _LEAST_FADING)), random.uniform(0, 2 * math.pi))
