"""Channels and beams as rows of real values, a row per user: what a task hands to a model, and gets from it.

Shapes: B cells, K users, M antennas; F = 2 M + 1 values of a user: its channel's real parts, imaginary parts, and its noise.
"""

from __future__ import annotations

import torch

from edgelam_fl.wireless.beamforming.network import BeamNetwork


def values_of(channels_BKM: torch.Tensor, noise_B: torch.Tensor) -> torch.Tensor:
    """Returns channels and the noise of each cell's users as values [B, K, F]."""
    noise_BK1 = noise_B[:, None, None].expand(-1, channels_BKM.shape[1], 1)
    return torch.cat([channels_BKM.real, channels_BKM.imag, noise_BK1], 2)


def channels_of(values_BKF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the channels [B, K, M] and the noise [B] of what `values_of` gave."""
    real_BKM, imaginary_BKM = values_BKF[..., :-1].chunk(2, dim=2)
    return torch.complex(real_BKM, imaginary_BKM), values_BKF[:, 0, -1]


def beams_of(values_BKO: torch.Tensor) -> torch.Tensor:
    """Returns the beams [B, M, K] of a `BeamModel`'s output."""
    return torch.complex(*values_BKO.chunk(2, dim=2)).mT


class BeamModel(BeamNetwork):
    """The beam network over rows of values: channels and noise in, each user's beam out as [B, K, 2 M]."""

    def forward(self, values_BKF: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Returns the beams for a power of 1. The channels are taken to be exact."""
        beams_BKM = super().forward(*channels_of(values_BKF)).mT
        return torch.cat([beams_BKM.real, beams_BKM.imag], 2)
