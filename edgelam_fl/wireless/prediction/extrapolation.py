"""Predictors that need no training and no other link: what comes next follows from the link's own 16 slots.

An autoregression (AR) of order p predicts a slot as a weighted sum of the p slots before it. Series that share their weights
form a group; the fewer groups, the less noise gets into the weights. Shapes: G groups of S series over T slots.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from edgelam_fl.wireless.channels.links import Channels_NTFM
from edgelam_fl.wireless.prediction.score import AHEAD
from edgelam_fl.wireless.prediction.series import channels_of, delays, from_delays, projected, strongest

RIDGE = 1e-4  # of the mean power of a series, on the diagonal of the normal equations
LEAST_POWER = 1e-9  # keeps a group without energy solvable; a link has power 1
NOISE_FACTOR = 2.0  # a coefficient or a delay bin is kept if its power is above so many times that of the noise

_Series_GST = npt.NDArray[np.complexfloating]


def zero(past_NTFM: Channels_NTFM) -> Channels_NTFM:
    """Predicts nothing at all: an error of 0 dB by definition."""
    return np.zeros_like(past_NTFM[:, :AHEAD])


def last_value(past_NTFM: Channels_NTFM, ahead: int = AHEAD) -> Channels_NTFM:
    """Predicts that the channel stays as it was in the last slot."""
    return np.repeat(past_NTFM[:, -1:], ahead, axis=1)


def own_history(past_NTFM: Channels_NTFM, order: int = 8, ahead: int = AHEAD) -> Channels_NTFM:
    """Predicts by one AR per link, fitted to all of its subcarriers and ports."""
    return np.stack([_flat(past, order, ahead) for past in past_NTFM])


def own_history_by_bin(past_NTFM: Channels_NTFM, order: int = 4) -> Channels_NTFM:
    """Predicts by one AR per link and delay bin, fitted to the bin on all ports."""
    return from_delays(np.stack([_by_bin(past, order) for past in delays(past_NTFM)]))


def subspace(past_NTFM: Channels_NTFM, noise_power: float, order: int = 8, *, by_bin: bool = False) -> Channels_NTFM:
    """Predicts in the link's strongest directions and delays, where there is little noise.

    The ports are projected on the strongest eigenvectors of the 16 x 48 noisy snapshots, the subcarriers turned into delay
    bins, and what is not above the noise set to zero: single coefficients with one AR for all, whole bins with one AR each
    (`by_bin`), whose few series would be too few with single coefficients gone. noise_power: of one value, known.
    """
    directions_NME = strongest(past_NTFM)
    seen_NTFE = projected(past_NTFM, directions_NME)
    power_NFE = np.mean(np.abs(seen_NTFE) ** 2, axis=1)
    if by_bin:
        power_NFE = np.broadcast_to(power_NFE.mean(axis=2, keepdims=True), power_NFE.shape)
    kept_NTFE = seen_NTFE * (power_NFE > NOISE_FACTOR * noise_power)[:, None]
    continued = _by_bin if by_bin else _flat
    return channels_of(np.stack([continued(series, order) for series in kept_NTFE]), directions_NME)


def _flat(past_TFM: npt.NDArray[np.complexfloating], order: int, ahead: int = AHEAD) -> npt.NDArray[np.complex64]:
    """Continues all series of a link with one AR."""
    series = past_TFM.reshape(1, len(past_TFM), -1).swapaxes(1, 2)
    return autoregress(series, order, ahead)[0].T.reshape(ahead, *past_TFM.shape[1:]).astype(np.complex64)


def _by_bin(past_TFM: npt.NDArray[np.complexfloating], order: int) -> npt.NDArray[np.complex64]:
    """Continues a link's delay bins with one AR each."""
    return autoregress(past_TFM.transpose(1, 2, 0), order).transpose(2, 0, 1).astype(np.complex64)


def autoregress(series_GST: _Series_GST, order: int, ahead: int = AHEAD, *, both_ways: bool = False) -> _Series_GST:
    """Continues each series by `ahead` slots, `[G, S, ahead]`, with the weights that fit its group best (ridge, least squares).

    both_ways: the weights also fit the conjugate of the series read backwards, which a sum of waves obeys as well: twice as many
    equations, so less of the noise gets into the weights (the modified covariance method).
    """
    windows = _windows(series_GST, order)
    if both_ways:
        windows = np.concatenate([windows, _windows(series_GST[..., ::-1].conj(), order)], axis=1)
    before, after = windows[..., :order], windows[..., order:]
    gram = (before.conj().swapaxes(1, 2) @ before).astype(np.complex128)
    load = RIDGE * np.trace(gram, axis1=1, axis2=2).real / order + LEAST_POWER
    gram = gram + load[:, None, None] * np.eye(order)
    weights_GP = np.linalg.solve(gram, before.conj().swapaxes(1, 2) @ after)[..., 0]
    series = series_GST
    for _ in range(ahead):
        following = np.einsum("gsp,gp->gs", series[..., -order:], weights_GP)
        series = np.concatenate([series, following[..., None]], axis=2)
    return series[..., -ahead:]


def _windows(series_GST: _Series_GST, order: int) -> _Series_GST:
    """Returns each group's equations as rows: `order` slots and the one after them, `[G, S (T - order), order + 1]`."""
    groups, series, slots = series_GST.shape
    return sliding_window_view(series_GST, order + 1, axis=2).reshape(groups, series * (slots - order), order + 1)
