"""What a learned predictor sees of links, as rows of numbers, and what it is to give: one row per strong series of a link.

A series is a link's channel in one of its strongest directions and one delay bin (`series`). It is scaled to power 1 and turned so
that its last value is real; what several autoregressions predict stands beside it. A predictor gives the correction of their mean, so
that zeros are that mean, which weaker series keep in any case. With `base = "last"` nothing stands beside a series, and its last
value is corrected. For the other band, what the autoregressions predict is carried over to it (`other_band`), and series of one
direction keep their phases to each other. The errors of a link's series, weighted, and the share of its energy that they do
not hold add up to its error.

Shapes: N links, T slots seen, A slots ahead, F subcarriers or delay bins, E directions, M ports, P = F E places of series, K strong
series, strongest last, W autoregressions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgelam_fl.wireless.channels.links import Channels_NTFM
from edgelam_fl.wireless.prediction.extrapolation import autoregress
from edgelam_fl.wireless.prediction.other_band import carried
from edgelam_fl.wireless.prediction.series import channels_of, projected, strongest

LOUD = 1.3  # a series is predicted if its power is above so many times that of the noise
WAYS = ((0, 8), (0, 10), (1, 10), (1, 12), (2, 12))
"""Of each autoregression, the delay bins on either side that share its weights, and its order, at most three quarters of the slots seen."""
LARGEST = 4.0  # times a series' amplitude: an autoregression that grows beyond is cut there
_LEAST = 1e-12

_Reals = npt.NDArray[np.float32]
_Complex = npt.NDArray[np.complex64]


@dataclass(frozen=True)
class Strong:
    """The strong series of one link."""

    values_KT: _Complex
    ahead_KWA: _Complex  # what each autoregression predicts; W = 0: a predictor sees none
    units_K1: _Complex  # what each series is measured in: its amplitude and a phase
    places_K: npt.NDArray[np.int64]  # of each in [bins, directions], counted bin after bin
    corrected_PA: _Complex  # what is predicted of all series before any correction
    mean_PA: _Complex  # the mean of what the autoregressions predict of all series
    directions_ME: _Complex


def strong_series(
    past_NTFM: Channels_NTFM,
    noise_power: float,
    ahead: int,
    most: int,
    *,
    other_band: bool = False,
    base: str = "autoregressions",
) -> list[Strong]:
    """Returns the series of each link that are above the noise: at most `most`, at least the strongest one.

    other_band: the band right above the one that is seen is predicted. base: "autoregressions" or "last", what is corrected; for the
    other band, the autoregressions.
    """
    directions_NME = strongest(past_NTFM)
    series_NFET = projected(past_NTFM, directions_NME).transpose(0, 2, 3, 1)
    power_NFE = np.mean(np.abs(series_NFET) ** 2, axis=-1)
    loud_NF = power_NFE.mean(axis=-1) > LOUD * noise_power
    ahead_NFEWA = np.stack([_continued(series_NFET, loud_NF, *way, ahead) for way in WAYS], axis=3)
    largest_NFE = LARGEST * np.sqrt(power_NFE) * (power_NFE > LOUD * noise_power)
    ahead_NFEWA *= np.minimum(1, largest_NFE[..., None, None] / np.maximum(np.abs(ahead_NFEWA), _LEAST))
    if other_band:
        ahead_NFEWA = carried(series_NFET, ahead_NFEWA, noise_power)
    links = zip(series_NFET, ahead_NFEWA, power_NFE, directions_NME, strict=True)
    return [_strong(*link, LOUD * noise_power, most, other_band, base) for link in links]


def _continued(series_NFET: _Complex, loud_NF: npt.NDArray[np.bool_], beside: int, order: int, ahead: int) -> _Complex:
    """Continues the loud delay bins, each with the weights that fit it and `beside` bins on either side best; others are zero."""
    *places, slots = series_NFET.shape
    bins = [np.roll(series_NFET, shift, axis=1) for shift in sorted(range(-beside, beside + 1), key=abs)]
    ahead_NFEA = np.zeros((*places, ahead), np.complex64)
    continued = autoregress(np.concatenate(bins, axis=2)[loud_NF], min(order, 3 * slots // 4), ahead, both_ways=True)
    ahead_NFEA[loud_NF] = continued[:, : places[-1]]
    return ahead_NFEA


def _strong(
    series_FET: _Complex, ahead_FEWA: _Complex, power_FE: _Reals, directions_ME: _Complex, least: float, most: int,
    other_band: bool, base: str,
) -> Strong:  # fmt: skip
    power_P, ahead_PWA = power_FE.ravel(), ahead_FEWA.reshape(power_FE.size, *ahead_FEWA.shape[2:])
    mean_PA = ahead_PWA.mean(axis=1)
    places = np.argsort(power_P)[-most:]
    loud = places[power_P[places] > least]
    places_K = loud if loud.size else places[-1:]
    values_KT = series_FET.reshape(power_FE.size, -1)[places_K]
    last_K = values_KT[:, -1]
    if other_band:
        last_K = series_FET[power_FE.argmax(axis=0), np.arange(power_FE.shape[1]), -1][places_K % power_FE.shape[1]]
    turns_K = np.exp(1j * np.angle(last_K))
    units_K1 = (np.sqrt(np.maximum(power_P[places_K], _LEAST)) * turns_K).astype(np.complex64)[:, None]
    corrected_PA, beside_KWA = mean_PA, ahead_PWA[places_K]
    if base == "last":
        last_P = series_FET[..., -1].ravel() * (power_P > least)
        corrected_PA, beside_KWA = np.repeat(last_P[:, None], mean_PA.shape[1], axis=1), beside_KWA[:, :0]
    return Strong(values_KT, beside_KWA, units_K1, places_K, corrected_PA, mean_PA, directions_ME)


def inputs_of(link: Strong, noise_power: float) -> _Reals:
    """Returns what is seen of a link, `[K, 2 T + 1 + 2 W A + 2]`.

    The columns: real and imaginary parts of the slots seen, decades of the power over the noise, real and imaginary parts of the
    autoregressions' slots, and the numbers of direction and delay bin.
    """
    scaled_KT = link.values_KT / link.units_K1
    ahead_KX = link.ahead_KWA.reshape(len(link.places_K), -1) / link.units_K1
    level_K1 = 2 * np.log10(np.abs(link.units_K1) / np.sqrt(noise_power))
    bins_K, directions_K = np.divmod(link.places_K, link.directions_ME.shape[1])
    columns = [
        scaled_KT.real, scaled_KT.imag, level_K1, ahead_KX.real, ahead_KX.imag, directions_K[:, None], bins_K[:, None],
    ]  # fmt: skip
    return np.concatenate(columns, axis=1, dtype=np.float32)


def corrections(link: Strong, future_AFM: _Complex) -> tuple[_Reals, _Reals, float]:
    """Returns what a perfect predictor gives, `[K, 2 A]`, the series' weights, `[K]`, and the link's error that remains then.

    Errors are over the energy of `future_AFM`, the channel without noise: the remaining one, plus the sum over series of weight
    times squared distance.
    """
    left_PA = _series(future_AFM, link.directions_ME)
    energy = float(np.sum(np.abs(future_AFM) ** 2, dtype=np.float64))
    outside = energy - float(np.sum(np.abs(left_PA) ** 2, dtype=np.float64))
    left_PA = left_PA - link.corrected_PA
    wanted_KA = left_PA[link.places_K] / link.units_K1
    left_PA[link.places_K] = 0
    remaining = outside + float(np.sum(np.abs(left_PA) ** 2, dtype=np.float64))
    parts = np.concatenate([wanted_KA.real, wanted_KA.imag], axis=1, dtype=np.float32)
    weights_K = np.abs(link.units_K1[:, 0]) ** 2 / energy
    return parts, weights_K.astype(np.float32), max(0.0, remaining / energy)


def error_of(link: Strong, series_PA: _Complex, future_AFM: _Complex) -> float:
    """Returns the error of a prediction of all series, over the energy of `future_AFM`, the channel without noise."""
    wanted_PA = _series(future_AFM, link.directions_ME)
    energy, held, missed = (
        float(np.sum(np.abs(values) ** 2, dtype=np.float64))
        for values in (future_AFM, wanted_PA, wanted_PA - series_PA)
    )
    return max(0.0, (energy - held + missed) / energy)


def over_time(link: Strong, whole_SFM: _Complex, given_KO: _Reals) -> tuple[_Reals, _Reals, _Reals, _Reals]:
    """Returns a link's strongest series over time, in the band that is seen: real parts, in what the series is measured in.

    As it is heard, `[T]`; without noise, of all slots of `whole_SFM`; predicted without a correction, `[A]`; and with those of a
    predictor, `given_KO`.
    """
    place, unit = link.places_K[-1], link.units_K1[-1]
    true_S = _series(whole_SFM, link.directions_ME)[place] / unit
    first_A = link.corrected_PA[place] / unit
    given_A = given_KO[-1, : len(first_A)]
    return (link.values_KT[-1] / unit).real, true_S.real, first_A.real, first_A.real + given_A


def _series(channel_AFM: _Complex, directions_ME: _Complex) -> _Complex:
    """Returns a channel's series in these directions, `[P, A]`."""
    series_AFE = projected(channel_AFM[None], directions_ME[None])[0]
    return series_AFE.reshape(len(channel_AFM), -1).T


def channel_of(link: Strong, given_KO: _Reals) -> _Complex:
    """Returns the channel that a predictor's corrections, `[K, 2 A]`, stand for, `[A, F, M]`."""
    series_PA, ahead = link.corrected_PA.copy(), given_KO.shape[1] // 2
    series_PA[link.places_K] += (given_KO[:, :ahead] + 1j * given_KO[:, ahead:]) * link.units_K1
    series_AFE = series_PA.T.reshape(ahead, -1, link.directions_ME.shape[1])
    return channels_of(series_AFE[None], link.directions_ME[None])[0]
