"""Carries what is predicted of one band over to the band right above it, from the link's own past alone.

A path turns from one subcarrier to the next by its delay, in both bands, all slots and all directions alike. So what was seen gives
a profile, the power that comes at each delay, and a profile gives the linear estimate of one band from the other with the least
error. The profile is the one that makes what was seen most likely; it is found step by step from a flat one. Early steps are too
smooth and late ones too sure of few delays, so several are used.

Shapes: N links, T slots seen, A slots ahead, F subcarriers or delay bins, E directions, W predictions of each series, G delays.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

STEPS = (6, 12, 25, 50, 100)
"""Of each prediction, the steps after which the profile is taken that carries it over; further ones begin with the first again."""
FINE = 8  # delays per delay bin; the F bins are all that subcarriers tell apart
SPREAD_FACTOR = 3.0
"""The power of predictions' error over that of their spread: they lie closer to each other than to the truth."""
_LEAST = 1e-7  # of a link's power, counted as noise: keeps matrices invertible

_Complex = npt.NDArray[np.complexfloating]
_Reals = npt.NDArray[np.float64]


def carried(series_NFET: _Complex, ahead_NFEWA: _Complex, noise_power: float) -> npt.NDArray[np.complex64]:
    """Returns the predictions `ahead_NFEWA` of the seen band for the band above it, of the same shape; both in delay bins.

    Each of the W predictions has a profile of its own, so that how far they lie apart also says how sure the profile is.
    noise_power: of one value of `series_NFET`, known.
    """
    links, bins, *_ = series_NFET.shape
    seen_NFX = np.fft.fft(series_NFET, axis=1, norm="ortho").reshape(links, bins, -1).astype(np.complex128)
    seen_NFF = seen_NFX @ seen_NFX.conj().swapaxes(1, 2) / seen_NFX.shape[2]
    noise_N = noise_power + _LEAST * _mean_diagonal(seen_NFF)
    error_N = noise_N + SPREAD_FACTOR * ahead_NFEWA.var(axis=3).mean(axis=(1, 2, 3))
    over_NFEWA = np.empty(ahead_NFEWA.shape, np.complex64)
    for number, profile_NG in enumerate(_profiles(seen_NFF, noise_N)):
        across_NFF = _across(profile_NG, error_N, bins)
        in_bins_NFF = np.fft.ifft(np.fft.fft(across_NFF, axis=2, norm="ortho"), axis=1, norm="ortho")
        for way in range(number, ahead_NFEWA.shape[3], len(STEPS)):
            over_NFEWA[:, :, :, way] = np.einsum(
                "nfg,ngea->nfea", in_bins_NFF, ahead_NFEWA[:, :, :, way], optimize=True
            )
    return over_NFEWA


def _profiles(seen_NFF: _Complex, noise_N: _Reals) -> Iterator[_Reals]:
    """Yields the profiles, `[N, G]`, after each of `STEPS`. `seen_NFF`: the mean of y y^H over what was seen.

    A step multiplies the power at a delay by the root of what was seen there over what the profile expects there, both weighted
    with the inverse of the covariance that the profile stands for. It never lowers the likelihood.
    """
    bins = seen_NFF.shape[1]
    power_N1 = _mean_diagonal(seen_NFF)[:, None]
    profile_NG = np.repeat(power_N1 / (FINE * bins), FINE * bins, axis=1)
    for step in range(1, max(STEPS) + 1):
        inverse_NFF = np.linalg.inv(_covariance(profile_NG, bins) + _on_diagonal(noise_N, bins))
        found_NG = _at_delays(inverse_NFF @ seen_NFF @ inverse_NFF)
        # By Cauchy and Schwarz; rounding errors must not make it less.
        least_N = 1 / (profile_NG.sum(axis=1) + noise_N / bins)
        profile_NG = profile_NG * np.sqrt(found_NG / np.maximum(_at_delays(inverse_NFF), least_N[:, None]))
        if step in STEPS:
            yield profile_NG


def _across(profile_NG: _Reals, error_N: _Reals, bins: int) -> _Complex:
    """Returns the matrices, `[N, F, F]`, that estimate the band above from a band that has errors of power `error_N`."""
    band_NFF = _covariance(profile_NG, bins) + _on_diagonal(error_N, bins)
    above_NFF = _covariance(profile_NG, bins, apart=bins)
    return np.linalg.solve(band_NFF, above_NFF.conj().swapaxes(1, 2)).conj().swapaxes(1, 2)  # band_NFF is Hermitian


def _covariance(profile_NG: _Reals, bins: int, apart: int = 0) -> _Complex:
    """Returns the covariances between subcarriers, `[N, F, F]`, and those `apart` below them, that profiles stand for."""
    lags_FF = np.subtract.outer(np.arange(bins), np.arange(bins)) + apart
    return np.fft.fft(profile_NG, axis=1)[:, lags_FF % profile_NG.shape[1]]


def _at_delays(matrices_NFF: _Complex) -> _Reals:
    """Returns d^H M d at each delay, `[N, G]`, for Hermitian matrices M; d: a path with that delay over the subcarriers."""
    bins = matrices_NFF.shape[1]
    diagonals_NF = np.stack([np.trace(matrices_NFF, offset, 1, 2) for offset in range(bins)], axis=1)
    both_NG = 2 * np.fft.fft(diagonals_NF, n=FINE * bins, axis=1).real
    return np.maximum(both_NG - diagonals_NF[:, :1].real, 0)


def _mean_diagonal(matrices_NFF: _Complex) -> _Reals:
    return np.trace(matrices_NFF, axis1=1, axis2=2).real / matrices_NFF.shape[1]


def _on_diagonal(values_N: _Reals, size: int) -> _Reals:
    return values_N[:, None, None] * np.eye(size)
