"""Past and future of links, and how good a prediction is: always against the channel without noise.

Shapes: N links, T slots, F subcarriers, M antenna ports.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgelam_fl.wireless.channels.links import Channels_NTFM

PAST, AHEAD = 16, 4  # slots that a predictor sees, and slots that it predicts


def past_of(channels_NTFM: Channels_NTFM) -> Channels_NTFM:
    """Returns the slots that a predictor sees."""
    return channels_NTFM[:, :PAST]


def future_of(channels_NTFM: Channels_NTFM) -> Channels_NTFM:
    """Returns the slots that it predicts."""
    return channels_NTFM[:, PAST : PAST + AHEAD]


def errors(predicted_NTFM: Channels_NTFM, true_NTFM: Channels_NTFM) -> npt.NDArray[np.float64]:
    """Returns each link's squared error over the energy of its true channel, `[N]`."""
    axes = (1, 2, 3)
    error = np.sum(np.abs(predicted_NTFM - true_NTFM) ** 2, axis=axes, dtype=np.float64)
    return np.asarray(error / np.sum(np.abs(true_NTFM) ** 2, axis=axes, dtype=np.float64), np.float64)


def nmse_db(errors_N: npt.NDArray[np.float64]) -> float:
    """Returns the normalised mean squared error: the dB of the links' mean, never the mean of their dB. No error gives -inf."""
    with np.errstate(divide="ignore"):
        return float(10 * np.log10(np.mean(errors_N)))


def spectral_efficiency(predicted_NTFM: Channels_NTFM, true_NTFM: Channels_NTFM, snr_db: float) -> float:
    """Returns bit/s/Hz of a beam that is matched to the prediction, the mean over links, slots and subcarriers.

    snr_db: of one port; all ports together gain up to M times as much. A prediction of zero carries nothing.
    """
    reached = np.abs(np.sum(predicted_NTFM.conj() * true_NTFM, axis=-1)) ** 2
    power = np.sum(np.abs(predicted_NTFM) ** 2, axis=-1)
    gain = np.divide(reached, power, out=np.zeros_like(reached), where=power > 0)
    return float(np.mean(np.log2(1 + 10 ** (snr_db / 10) * gain)))
