"""A small channel generator that needs numpy alone: each link is a sum of plane waves, in clusters.

A link without line of sight has clusters with exponential delays, powers that fall with them, and rays around each cluster's directions. Rays
arrive at the user from all azimuths alike, so the correlation over time follows Clarke's model, J0(2 pi f_D tau), in the mean
over links. Spreads are those of the urban macro cell in 3GPP TR 38.901, table 7.5-6; its correlated large-scale
parameters, elevation at the user and line of sight are left out: `uma` has those.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgelam_fl.errors import ConfigError
from edgelam_fl.wireless.channels.links import (
    SLOT_S,
    SLOTS,
    SPEEDS_KMH,
    Links,
    check_drawn,
    doppler_hz,
    frequencies_hz,
    links_of,
)

CLUSTERS, RAYS = 12, 8
DELAY_SCALE = 2.3  # of a link's delays over their spread, weighted with powers
DELAY_SPREAD_DECADES, CLUSTER_SHADOW_DB = 0.39, 3.0  # standard deviations: of links' delay spreads, of clusters' powers
CROSS_POLARISATION = 10 ** (7 / 10)  # power of a ray's own polarisation over the other's
AZIMUTH_SPREAD_RAD, ZENITH_SPREAD_RAD = np.deg2rad(26.0), np.deg2rad(2.0)  # of a link's clusters at the base station
CLUSTER_SPREAD_RAD = np.deg2rad(2.0)  # of a cluster's rays at the base station
ROWS = COLUMNS = 4
HALF_WAVE = np.pi  # phase between neighbouring places, for a wave along their line

_Rays = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Paths:
    """The links of one base station, drawn from sums of plane waves. `delay_spread_ns`: the median link's."""

    count: int
    seed: int
    speeds_kmh: tuple[float, ...] = SPEEDS_KMH
    delay_spread_ns: float = 363.0

    def __post_init__(self) -> None:
        check_drawn(self.count, self.speeds_kmh)
        if not 0 < self.delay_spread_ns <= 5000:
            raise ConfigError(f"delay_spread_ns = {self.delay_spread_ns:g}: above 0, at most 5000 ns")

    def draw(self) -> Links:
        """Returns the links; the same ones each time."""
        random = np.random.default_rng(self.seed)
        speed_kmh = random.choice(np.asarray(self.speeds_kmh), self.count)
        both = np.stack([_link(random, speed, self.delay_spread_ns * 1e-9) for speed in speed_kmh])
        return links_of(both, speed_kmh)


def _link(random: np.random.Generator, speed_kmh: float, delay_spread_s: float) -> npt.NDArray[np.complex64]:
    """Returns one link's channel over both bands, `[T, 2F, M]`."""
    spread_s = delay_spread_s * 10 ** (DELAY_SPREAD_DECADES * random.standard_normal())
    delays_s = random.exponential(DELAY_SCALE * spread_s, CLUSTERS)
    shadows = 10 ** (CLUSTER_SHADOW_DB / 10 * random.standard_normal(CLUSTERS))
    powers = shadows * np.exp(-delays_s * (DELAY_SCALE - 1) / (DELAY_SCALE * spread_s))
    delay_s, power = np.repeat(delays_s, RAYS), np.repeat(powers, RAYS)
    arrival = random.uniform(0, 2 * np.pi, CLUSTERS * RAYS)
    time_TP = np.exp(2j * np.pi * doppler_hz(speed_kmh) * SLOT_S * np.outer(np.arange(SLOTS), np.cos(arrival)))
    space_MP = np.sqrt(power) * _ports(random)
    frequency_FP = np.exp(-2j * np.pi * np.outer(frequencies_hz(), delay_s))
    rays_TMP = (time_TP[:, None] * space_MP).astype(np.complex64)
    return np.swapaxes(rays_TMP @ frequency_FP.T.astype(np.complex64), 1, 2)


def _ports(random: np.random.Generator) -> npt.NDArray[np.complex128]:
    """Returns what each port sees of each ray, `[M, P]`: first all places at +45 degrees, then all at -45 degrees."""
    azimuth = random.uniform(-np.pi / 3, np.pi / 3) + _directions(random, AZIMUTH_SPREAD_RAD)
    elevation = _directions(random, ZENITH_SPREAD_RAD)
    along_P, up_P = np.sin(azimuth) * np.cos(elevation), np.sin(elevation)
    places = HALF_WAVE * (np.arange(COLUMNS)[None, :, None] * along_P + np.arange(ROWS)[:, None, None] * up_P)
    steering = np.exp(1j * places).reshape(ROWS * COLUMNS, -1)
    phases = np.exp(2j * np.pi * random.uniform(size=(2, CLUSTERS * RAYS)))
    own, other = phases[0], phases[1] / np.sqrt(CROSS_POLARISATION)
    return np.concatenate([steering * (own + other), steering * (own - other)]) / np.sqrt(2)


def _directions(random: np.random.Generator, spread_rad: float) -> _Rays:
    """Returns the rays' angles around the link's own: Laplacian clusters, and rays around each."""
    clusters = np.repeat(random.laplace(0, spread_rad / np.sqrt(2), CLUSTERS), RAYS)
    return clusters + random.laplace(0, CLUSTER_SPREAD_RAD / np.sqrt(2), CLUSTERS * RAYS)
