"""Linear predictors that are fitted to other links: weights from past slots to the next four, by ridge regression.

Shapes: X examples with P inputs and Q outputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgelam_fl.wireless.channels.links import Channels_NTFM
from edgelam_fl.wireless.prediction.score import AHEAD
from edgelam_fl.wireless.prediction.series import delays, from_delays

RIDGE = 1e-6  # of the inputs' mean power, on the diagonal of the normal equations
RIDGE_ACROSS = 1e-2  # between bands: 384 inputs that are nearly dependent
SLOTS_ACROSS = 8  # of the past, for a prediction of the other band

_Weights = npt.NDArray[np.complexfloating]


def fitted(inputs_XP: _Weights, outputs_XQ: _Weights, ridge: float) -> _Weights:
    """Returns the weights, `[P, Q]`, with the least squared error and a penalty on their size."""
    gram = inputs_XP.conj().T @ inputs_XP
    load = ridge * np.trace(gram).real / len(gram)
    return np.linalg.solve(gram + load * np.eye(len(gram)), inputs_XP.conj().T @ outputs_XQ)


@dataclass(frozen=True)
class Ridge:
    """One set of weights over slots, for all subcarriers, ports and speeds."""

    weights: _Weights

    @classmethod
    def fit(cls, past_NTFM: Channels_NTFM, future_NTFM: Channels_NTFM) -> Ridge:
        return cls(fitted(_over_time(past_NTFM), _over_time(future_NTFM), RIDGE))

    def predict(self, past_NTFM: Channels_NTFM) -> Channels_NTFM:
        return _ahead(past_NTFM, _over_time(past_NTFM) @ self.weights)


@dataclass(frozen=True)
class RidgeBySpeed:
    """Weights per speed, for a user whose speed is known."""

    by_speed: Mapping[float, Ridge]

    @classmethod
    def fit(
        cls, past_NTFM: Channels_NTFM, future_NTFM: Channels_NTFM, speed_kmh: npt.NDArray[np.floating]
    ) -> RidgeBySpeed:
        each = {float(speed): speed_kmh == speed for speed in np.unique(speed_kmh)}
        return cls({speed: Ridge.fit(past_NTFM[those], future_NTFM[those]) for speed, those in each.items()})

    def predict(self, past_NTFM: Channels_NTFM, speed_kmh: npt.NDArray[np.floating]) -> Channels_NTFM:
        """Predicts with the weights of the nearest speed; warns about speeds outside those that were fitted."""
        known = np.array(sorted(self.by_speed))
        outside = (speed_kmh < known[0]) | (speed_kmh > known[-1])
        if outside.any():
            warnings.warn(
                f"{outside.sum()} of {len(speed_kmh)} links have speeds outside {known[0]:g} to {known[-1]:g} km/h, "
                "which the predictor was fitted to",
                stacklevel=2,
            )
        nearest = known[np.argmin(np.abs(known[:, None] - speed_kmh), axis=0)]
        ahead_NTFM = np.empty_like(past_NTFM[:, :AHEAD])
        for speed in np.unique(nearest):
            ahead_NTFM[nearest == speed] = self.by_speed[float(speed)].predict(past_NTFM[nearest == speed])
        return ahead_NTFM


@dataclass(frozen=True)
class RidgeByBin:
    """Weights over slots per delay bin, for all ports and speeds."""

    by_bin: tuple[Ridge, ...]

    @classmethod
    def fit(cls, past_NTFM: Channels_NTFM, future_NTFM: Channels_NTFM) -> RidgeByBin:
        past, future = delays(past_NTFM), delays(future_NTFM)
        return cls(tuple(Ridge.fit(past[:, :, [n]], future[:, :, [n]]) for n in range(past.shape[2])))

    def predict(self, past_NTFM: Channels_NTFM) -> Channels_NTFM:
        past = delays(past_NTFM)
        bins = [ridge.predict(past[:, :, [n]]) for n, ridge in enumerate(self.by_bin)]
        return from_delays(np.concatenate(bins, axis=2))


@dataclass(frozen=True)
class RidgeAcross:
    """Weights from eight slots of one band's subcarriers to the next four slots of the other's, for all ports and speeds."""

    weights: _Weights

    @classmethod
    def fit(cls, past_NTFM: Channels_NTFM, future_NTFM: Channels_NTFM) -> RidgeAcross:
        inputs = _per_port(past_NTFM[:, -SLOTS_ACROSS:])
        return cls(fitted(inputs, _per_port(future_NTFM), RIDGE_ACROSS))

    def predict(self, past_NTFM: Channels_NTFM) -> Channels_NTFM:
        links, _, subcarriers, ports = past_NTFM.shape
        ahead = _per_port(past_NTFM[:, -SLOTS_ACROSS:]) @ self.weights
        return ahead.reshape(links, ports, AHEAD, subcarriers).transpose(0, 2, 3, 1).astype(np.complex64)


def _over_time(channels_NTFM: Channels_NTFM) -> _Weights:
    """Returns each subcarrier's and port's series as one row."""
    return channels_NTFM.transpose(0, 2, 3, 1).reshape(-1, channels_NTFM.shape[1])


def _ahead(past_NTFM: Channels_NTFM, rows: _Weights) -> Channels_NTFM:
    links, _, subcarriers, ports = past_NTFM.shape
    return rows.reshape(links, subcarriers, ports, AHEAD).transpose(0, 3, 1, 2).astype(np.complex64)


def _per_port(channels_NTFM: Channels_NTFM) -> _Weights:
    """Returns each port's slots and subcarriers as one row."""
    links, slots, subcarriers, ports = channels_NTFM.shape
    return channels_NTFM.transpose(0, 3, 1, 2).reshape(links * ports, slots * subcarriers)
