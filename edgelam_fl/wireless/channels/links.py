"""The channels of many links over time, frequency and antennas, and the grid that they are sampled on.

Shapes: N links, T slots, F subcarriers, M antenna ports of the base station. Knows neither where channels come from nor what
is predicted from them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

import numpy as np
import numpy.typing as npt

from edgelam_fl.errors import ConfigError

Channels_NTFM = npt.NDArray[np.complex64]

CARRIER_HZ = 2.4e9
SPACING_HZ = 180e3  # between subcarriers
SUBCARRIERS = 48  # of each band; the up band ends at the carrier, where the down band begins
SLOTS, SLOT_S = 20, 0.5e-3
PORTS = 32  # 4 x 4 places with two polarisations each
LIGHT_M_S = 299_792_458.0
SPEEDS_KMH = (10.0, 30.0, 60.0, 100.0)


@dataclass(frozen=True)
class Links:
    """The channels of N links in both bands, with mean power 1 per link over both, and the users' speeds, `[N]`."""

    up_NTFM: Channels_NTFM
    down_NTFM: Channels_NTFM
    speed_kmh: npt.NDArray[np.float32]


def frequencies_hz() -> npt.NDArray[np.float64]:
    """Returns the subcarriers' frequencies beside the carrier: those of the up band, then those of the down band."""
    return np.arange(0.5 - SUBCARRIERS, SUBCARRIERS, dtype=np.float64) * SPACING_HZ


def doppler_hz(speed_kmh: float) -> float:
    """Returns the largest Doppler shift of a user at this speed."""
    return speed_kmh / 3.6 * CARRIER_HZ / LIGHT_M_S


def unit_power(both_NTFM: npt.NDArray[np.complexfloating]) -> Channels_NTFM:
    """Scales each link to mean power 1 over slots, subcarriers and ports."""
    power = np.mean(np.abs(both_NTFM) ** 2, axis=(1, 2, 3), keepdims=True)
    return (both_NTFM / np.sqrt(power)).astype(np.complex64, order="C")


def links_of(both_NTFM: npt.NDArray[np.complexfloating], speed_kmh: npt.NDArray[np.floating]) -> Links:
    """Makes links of channels over both bands: the first half of the subcarriers is the up band."""
    scaled = unit_power(both_NTFM)
    return Links(scaled[:, :, :SUBCARRIERS], scaled[:, :, SUBCARRIERS:], speed_kmh.astype(np.float32))


def with_noise(channels_NTFM: Channels_NTFM, snr_db: float, seed: int) -> Channels_NTFM:
    """Adds white complex Gaussian noise, `snr_db` below power 1. An SNR of infinity adds nothing."""
    draws = np.random.default_rng(seed).standard_normal((2, *channels_NTFM.shape), dtype=np.float32)
    scale = math.sqrt(10 ** (-snr_db / 10) / 2)
    return channels_NTFM + (scale * (draws[0] + 1j * draws[1])).astype(np.complex64)


def station_seed(seed: int, station: str) -> int:
    """Returns the seed of one base station's channels, from the run's seed and the station's name."""
    return Random(f"{seed}/channels/{station}").getrandbits(32)


def check_drawn(count: int, speeds_kmh: tuple[float, ...]) -> None:
    """Raises ConfigError for a number of links or for speeds that cannot be drawn."""
    if count < 1:
        raise ConfigError(f"{count} links cannot be drawn: at least 1")
    wrong = [speed for speed in speeds_kmh if not 0 <= speed < math.inf]
    if wrong or not speeds_kmh:
        raise ConfigError(f"speeds_kmh = {list(speeds_kmh)}: at least one speed, each a number of km/h from 0 on")
