"""A link's channel in its strongest directions and in delay bins: few series with little noise, which are continued one by one.

Shapes: N links, T slots, F subcarriers or delay bins, M antenna ports, E directions.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgelam_fl.wireless.channels.links import Channels_NTFM

DIRECTIONS = 8  # of 32 ports' 32: they carry 99 % of a link's energy and a quarter of the noise

Series_NTFE = npt.NDArray[np.complex64]
Directions_NME = npt.NDArray[np.complex64]


def strongest(past_NTFM: Channels_NTFM) -> Directions_NME:
    """Returns each link's directions of most energy over its ports, weakest first, from all slots and subcarriers."""
    snapshots = past_NTFM.reshape(len(past_NTFM), -1, past_NTFM.shape[-1])
    covariances = snapshots.swapaxes(1, 2) @ snapshots.conj()
    return np.linalg.eigh(covariances)[1][:, :, -DIRECTIONS:]


def projected(channels_NTFM: Channels_NTFM, directions_NME: Directions_NME) -> Series_NTFE:
    """Returns channels in these directions and in delay bins; white noise keeps its power per value."""
    return delays(channels_NTFM) @ directions_NME.conj()[:, None]


def channels_of(series_NTFE: Series_NTFE, directions_NME: Directions_NME) -> Channels_NTFM:
    """Returns the channels over subcarriers and ports that series stand for."""
    return from_delays(series_NTFE @ directions_NME.swapaxes(1, 2)[:, None])


def delays(channels_NTFM: Channels_NTFM) -> Channels_NTFM:
    """Turns subcarriers into as many delay bins."""
    return np.fft.ifft(channels_NTFM, axis=2, norm="ortho").astype(np.complex64)


def from_delays(delays_NTFM: Channels_NTFM) -> Channels_NTFM:
    """Turns delay bins back into subcarriers."""
    return np.fft.fft(delays_NTFM, axis=2, norm="ortho").astype(np.complex64)
