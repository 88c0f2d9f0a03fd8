"""Channel estimates: all users send known pilots at once, and the base station solves for the channels.

The base station receives Y = P H + N: pilots P [T, K], channels H [K, M], noise N [T, M], all per cell. Entries of H are
taken to be independent with mean 0 and variance 1.
"""

from __future__ import annotations

import math

import torch

from edgelam_fl.errors import ConfigError
from edgelam_fl.wireless.beamforming.downlink import check_channels


def pilots(symbols: int, users: int, dtype: torch.dtype = torch.complex64) -> torch.Tensor:
    """Returns orthogonal pilots [T, K] of power 1 per symbol: columns of a discrete Fourier transform.

    Raises ConfigError if there are fewer symbols than users: their pilots could not be told apart.
    """
    if symbols < users:
        raise ConfigError(f"{symbols} pilot symbols cannot tell {users} users apart: use {users} symbols or more")
    angle_TK = torch.outer(torch.arange(symbols), torch.arange(users)).double() * (-2 * math.pi / symbols)
    return torch.polar(torch.ones_like(angle_TK), angle_TK).to(dtype)


def received(
    channels_BKM: torch.Tensor,
    pilots_TK: torch.Tensor,
    noise: float | torch.Tensor,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Returns what the base station receives of the pilots [B, T, M].

    `noise`: its power per antenna and symbol, or [B, 1, 1] for each cell its own.
    """
    check_channels(channels_BKM)
    signal_BTM = pilots_TK @ channels_BKM
    drawn = torch.randn(signal_BTM.shape, dtype=signal_BTM.dtype, generator=generator)
    return signal_BTM + noise**0.5 * drawn


def least_squares(received_BTM: torch.Tensor, pilots_TK: torch.Tensor) -> torch.Tensor:
    """Returns the channels [B, K, M] that explain the received best. Error per entry: noise / T with orthogonal pilots."""
    return mmse(received_BTM, pilots_TK, noise=0.0)


def mmse(received_BTM: torch.Tensor, pilots_TK: torch.Tensor, noise: float) -> torch.Tensor:
    """Returns the channels [B, K, M] of the least mean squared error. Error per entry: noise / (noise + T)."""
    eye_KK = torch.eye(pilots_TK.shape[1], dtype=pilots_TK.dtype)
    return torch.linalg.solve(pilots_TK.mH @ pilots_TK + noise * eye_KK, pilots_TK.mH @ received_BTM)
