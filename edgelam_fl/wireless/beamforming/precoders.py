"""Precoders: beams from known channels, in closed form or by iteration. Nothing here is learned.

All return beams of exactly the downlink's power. MRT, ZF and RZF give every user the same share of it.
"""

from __future__ import annotations

import torch

from edgelam_fl.errors import ConfigError
from edgelam_fl.wireless.beamforming.downlink import Downlink, check_channels, scaled, with_equal_power

_SINGULAR = 1e-6  # of two singular values: users below this ratio cannot be told apart
_RIDGE = 1e-6  # that a singular channel gets, relative to its mean squared singular value
_HALVINGS = 50  # of the interval of the multiplier: to rounding in float64
_LEAST = 1e-12


def mrt(channels_BKM: torch.Tensor, downlink: Downlink) -> torch.Tensor:
    """Returns beams by maximum ratio: each points at its user and ignores the others."""
    check_channels(channels_BKM)
    return with_equal_power(channels_BKM.mH, downlink.power)


def zero_forcing(channels_BKM: torch.Tensor, downlink: Downlink) -> tuple[torch.Tensor, int]:
    """Returns beams of which no user hears another's, and the number of cells whose singular channel was regularised for it.

    Raises ConfigError if there are more users than antennas.
    """
    check_channels(channels_BKM)
    _, users, antennas = channels_BKM.shape
    if users > antennas:
        raise ConfigError(
            f"zero forcing serves at most as many users as there are antennas, here {users} users and {antennas} antennas: "
            f"use fewer users, or RZF or WMMSE"
        )
    singular_B = singular_cells(channels_BKM)
    mean_square_B = channels_BKM.abs().square().sum((1, 2)) / users
    ridge_B = torch.where(singular_B, _RIDGE * mean_square_B.clamp_min(_LEAST), torch.zeros_like(mean_square_B))
    return with_equal_power(_inverted(channels_BKM, ridge_B), downlink.power), int(singular_B.sum())


def singular_cells(channels_BKM: torch.Tensor) -> torch.Tensor:
    """Returns for each cell whether its channel is numerically singular [B]: some users' channels depend on one another."""
    values_BK = torch.linalg.svdvals(channels_BKM)
    return values_BK[:, -1] <= _SINGULAR * values_BK[:, 0]


def rzf(channels_BKM: torch.Tensor, downlink: Downlink) -> torch.Tensor:
    """Returns beams by regularised zero forcing: K noise / power on the diagonal balances noise against interference."""
    check_channels(channels_BKM)
    ridge = channels_BKM.shape[1] * downlink.noise / downlink.power
    ridge_B = torch.full(channels_BKM.shape[:1], ridge, dtype=channels_BKM.real.dtype, device=channels_BKM.device)
    return with_equal_power(_inverted(channels_BKM, ridge_B), downlink.power)


def _inverted(channels_BKM: torch.Tensor, ridge_B: torch.Tensor) -> torch.Tensor:
    """Returns H^H (H H^H + ridge I)^-1 [B, M, K]."""
    eye_KK = torch.eye(channels_BKM.shape[1], dtype=channels_BKM.dtype, device=channels_BKM.device)
    gram_BKK = channels_BKM @ channels_BKM.mH + ridge_B[:, None, None] * eye_KK
    return torch.linalg.solve(gram_BKK, channels_BKM).mH


def wmmse(
    channels_BKM: torch.Tensor, downlink: Downlink, *, start_BMK: torch.Tensor | None = None, iterations: int = 100
) -> torch.Tensor:
    """Returns beams at a local optimum of the sum rate by weighted MMSE (Shi et al., 10.1109/TSP.2011.2147784).

    `start_BMK`: beams that the iteration starts from, None: RZF. From MRT, 100 iterations can end below RZF at 20 dB.
    """
    beams_BMK = rzf(channels_BKM, downlink) if start_BMK is None else start_BMK
    for _ in range(iterations):
        beams_BMK = _wmmse_step(channels_BKM, beams_BMK, downlink)
    return scaled(beams_BMK, downlink.power)


def _wmmse_step(channels_BKM: torch.Tensor, beams_BMK: torch.Tensor, downlink: Downlink) -> torch.Tensor:
    """Renews receivers u, weights w and then the beams, each the best for the other two."""
    received_BKK = channels_BKM @ beams_BMK
    own_BK = received_BKK.diagonal(dim1=1, dim2=2)
    u_BK = own_BK / (received_BKK.abs().square().sum(2) + downlink.noise)
    w_BK = 1 / (1 - (u_BK.conj() * own_BK).real)
    covariance_BMM = channels_BKM.mH @ ((w_BK * u_BK.abs().square())[..., None] * channels_BKM)
    values_BM, vectors_BMM = torch.linalg.eigh(covariance_BMM)
    wanted_BMK = vectors_BMM.mH @ (channels_BKM.mH * (w_BK * u_BK)[:, None])
    divisor_BM = _with_multiplier(values_BM.clamp_min(0), wanted_BMK.abs().square().sum(2), downlink.power)
    return vectors_BMM @ (wanted_BMK / divisor_BM[..., None])


def _with_multiplier(values_BM: torch.Tensor, wanted_BM: torch.Tensor, power: float) -> torch.Tensor:
    """Returns values + mu [B, M], with the least mu for which sum wanted / (values + mu)^2 is at most the power."""
    high_B1 = (wanted_BM.sum(1, keepdim=True) / power).sqrt() + _LEAST
    low_B1 = torch.zeros_like(high_B1)
    for _ in range(_HALVINGS):
        middle_B1 = (low_B1 + high_B1) / 2
        spent_B1 = (wanted_BM / (values_BM + middle_B1).clamp_min(_LEAST).square()).sum(1, keepdim=True)
        low_B1 = torch.where(spent_B1 > power, middle_B1, low_B1)
        high_B1 = torch.where(spent_B1 > power, high_B1, middle_B1)
    return (values_BM + high_B1).clamp_min(_LEAST)
