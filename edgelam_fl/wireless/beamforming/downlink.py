"""The downlink of a cell: one base station sends to all its users at once; the sum rate is what beams are judged by."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from edgelam_fl.errors import ConfigError

_LEAST = 1e-30  # keeps a beam of zeros finite


@dataclass(frozen=True)
class Downlink:
    """The power that a base station sends and the noise at each user, both in one unit. A user hears path loss in its channel."""

    noise: float
    power: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("power", self.power), ("noise", self.noise)):
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(
                    f"a downlink's {name} = {value!r} must be a finite number above 0: the rate of a beam is that of power over noise"
                )


def downlink_at(snr_db: float) -> Downlink:
    """Returns a downlink of power 1 with this ratio of power to noise in dB."""
    return Downlink(noise=noise_at(snr_db))


def noise_at(snr_db: float) -> float:
    """Returns the noise for a signal of power 1."""
    return float(10 ** (-snr_db / 10))


def check_channels(channels_BKM: torch.Tensor) -> None:
    """Raises ConfigError unless channels are complex, have the axes cell, user and antenna, and hold finite values."""
    shape = list(channels_BKM.shape)
    if channels_BKM.ndim != 3 or 0 in shape or not channels_BKM.is_complex():
        raise ConfigError(
            f"channels are {channels_BKM.dtype} of shape {shape}; they must be complex with the axes [cell, user, antenna], each of "
            f"1 or more: one cell is channels[None]"
        )
    if not channels_BKM.isfinite().all():
        raise ConfigError("channels hold values that are not finite: leave out the cells that have them")


def scaled(beams_BMK: torch.Tensor, power: float) -> torch.Tensor:
    """Scales each cell's beams to this total power. Beams of zeros stay zeros."""
    total_B11 = beams_BMK.abs().square().sum((1, 2), keepdim=True)
    return beams_BMK * (power / total_B11.clamp_min(_LEAST)).sqrt()


def with_equal_power(beams_BMK: torch.Tensor, power: float) -> torch.Tensor:
    """Scales every beam to the same power, and each cell's beams to `power` in total. A beam of zeros stays zeros."""
    power_B1K = beams_BMK.abs().square().sum(1, keepdim=True)
    return scaled(beams_BMK * power_B1K.clamp_min(_LEAST).rsqrt(), power)


def sum_rates(channels_BKM: torch.Tensor, beams_BMK: torch.Tensor, noise: float | torch.Tensor) -> torch.Tensor:
    """Returns each cell's sum of log2(1 + SINR) over its users [B], in bit/s per Hz; gradients pass through it.

    `noise`: of all users, or [B, 1] for each cell its own.
    """
    gains_BKK = (channels_BKM @ beams_BMK).abs().square()
    signal_BK = gains_BKK.diagonal(dim1=1, dim2=2)
    return torch.log2(1 + signal_BK / (gains_BKK.sum(2) - signal_BK + noise)).sum(1)
