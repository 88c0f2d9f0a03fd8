"""Channels and beams as rows of real values, a row per user: what a task hands to a model, and gets from it.

Shapes: B cells, K users, M antennas; F = 2 M + 2 values of a user: its channel's real parts, imaginary parts, the noise that it hears, and
the variance of the entries of its channel, 0 if they are exact.
"""

from __future__ import annotations

import torch

from edgelam_fl.wireless.beamforming.network import BeamNetwork


def values_of(channels_BKM: torch.Tensor, noise_B: torch.Tensor, error: float = 0.0) -> torch.Tensor:
    """Returns channels and the noise of each cell's users as values [B, K, F]. `error`: the variance of the entries of estimates."""
    of_cell_B2 = torch.stack([noise_B, torch.full_like(noise_B, error)], 1)
    of_cell_BK2 = of_cell_B2[:, None].expand(-1, channels_BKM.shape[1], -1)
    return torch.cat([channels_BKM.real, channels_BKM.imag, of_cell_BK2], 2)


def channels_of(values_BKF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the channels [B, K, M], the noise [B] and the variance of the channels' entries [B] of what `values_of` gave."""
    real_BKM, imaginary_BKM = values_BKF[..., :-2].chunk(2, dim=2)
    return torch.complex(real_BKM, imaginary_BKM), values_BKF[:, 0, -2], values_BKF[:, 0, -1]


def beams_of(values_BKO: torch.Tensor) -> torch.Tensor:
    """Returns the beams [B, M, K] of a `BeamModel`'s output."""
    return torch.complex(*values_BKO.chunk(2, dim=2)).mT


class BeamModel(BeamNetwork):
    """The beam network over rows of values: channels, noise and variance in, each user's beam out as [B, K, 2 M]."""

    def forward(self, values_BKF: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Returns the beams for a power of 1."""
        beams_BKM = super().forward(*channels_of(values_BKF)).mT
        return torch.cat([beams_BKM.real, beams_BKM.imag], 2)
