"""How alike a link's channel is to itself some slots later, some subcarriers on, and over the antennas' directions."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgelam_fl.wireless.channels.links import SLOT_S, Channels_NTFM, doppler_hz


def over_time(channels_NTFM: Channels_NTFM, lag: int) -> float:
    """Returns the real part of the correlation with the channel `lag` slots later, the mean over links."""
    early, late = channels_NTFM[:, :-lag], channels_NTFM[:, lag:]
    return float(np.mean(_coefficients(early, late).real))


def over_frequency(channels_NTFM: Channels_NTFM, lag: int) -> float:
    """Returns the magnitude of the correlation with the channel `lag` subcarriers on in the first slot, the mean over links.

    The magnitude, because a common delay of a link turns the phase and says nothing about how alike both are.
    """
    channels_NTFM = channels_NTFM[:, :1]
    low, high = channels_NTFM[:, :, :-lag], channels_NTFM[:, :, lag:]
    return float(np.mean(np.abs(_coefficients(low, high))))


def strongest_directions(channels_NTFM: Channels_NTFM, count: int) -> float:
    """Returns the share of the first slot's energy in the `count` strongest eigenvectors over ports, the mean over links."""
    first_NFM = channels_NTFM[:, 0]
    covariances = first_NFM.conj().swapaxes(1, 2) @ first_NFM
    energies = np.linalg.eigvalsh(covariances)[:, ::-1]
    return float(np.mean(energies[:, :count].sum(1) / energies.sum(1)))


def clarke(speed_kmh: float, lag: int) -> float:
    """Returns J0(2 pi f_D tau), the correlation over `lag` slots if waves arrive from all around (Clarke's model)."""
    angles = (np.arange(4096) + 0.5) * np.pi / 4096  # J0(x) is the mean of cos(x sin a) over half a turn
    return float(np.mean(np.cos(2 * np.pi * doppler_hz(speed_kmh) * lag * SLOT_S * np.sin(angles))))


def _coefficients(one: Channels_NTFM, other: Channels_NTFM) -> npt.NDArray[np.complex64]:
    """Returns one correlation coefficient per link."""
    products = np.sum(one.conj() * other, axis=(1, 2, 3))
    energies = np.sum(np.abs(one) ** 2, axis=(1, 2, 3)) * np.sum(np.abs(other) ** 2, axis=(1, 2, 3))
    return products / np.sqrt(energies)
