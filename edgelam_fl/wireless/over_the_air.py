"""Over-the-air sums: all senders use the channel at once, and what arrives is the sum of their signals plus noise.

y = sum_k h_k b_k x_k + n, with two numbers per complex symbol. Zero forcing: b_k = p_k g / h_k, so y / g = sum_k p_k x_k + n / g. The
gain g is the largest that keeps every sender within its power; the weakest channel decides it. Knows arrays alone; channels
and weights are known to all, symbols are in step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgelam_fl.errors import ConfigError


@dataclass(frozen=True)
class AirSum:
    """A weighted sum as it arrived, and the mean squared error per number that the noise is expected to leave in it."""

    numbers: np.ndarray
    expected_error: float


def air_sum(
    signals: Sequence[np.ndarray],
    weights: Sequence[float],
    channels: Sequence[complex],
    snr: float,
    generator: np.random.Generator,
) -> AirSum:
    """Sums signals of one shape over the air, in one use of the channel per pair of numbers.

    `channels`: one coefficient per sender, which holds for the whole signal. `snr`: a sender's greatest mean power per symbol,
    over the noise. Expected error: max_k p_k^2 m_k / (|h_k|^2 snr), with m_k the mean square of signal k. Signals of zeros cost no
    power and arrive exactly. Raises ConfigError for an SNR that is not above 0 and for a channel of zero.
    """
    if not (math.isfinite(snr) and snr > 0):
        raise ConfigError(f"an over-the-air sum needs power: its SNR = {snr!r} must be a finite number above 0")
    if not all(channels):
        raise ConfigError("a channel of zero carries nothing, and zero forcing cannot invert it: leave that sender out")
    strongest = max(
        weight**2 * float(np.mean(np.square(signal, dtype=np.float64))) / abs(channel) ** 2
        for signal, weight, channel in zip(signals, weights, channels, strict=True)
    )
    shape, size = signals[0].shape, signals[0].size
    if strongest == 0:
        return AirSum(np.zeros(shape), 0.0)
    gain = math.sqrt(snr / (2 * strongest))  # a symbol carries two numbers; the noise has power 1
    received = _symbols(generator.normal(scale=math.sqrt(0.5), size=size))
    for signal, weight, channel in zip(signals, weights, channels, strict=True):
        sent = (weight * gain / channel) * _symbols(signal)
        received = received + channel * sent
    numbers = np.stack([received.real, received.imag], 1).ravel()[:size] / gain
    return AirSum(numbers.reshape(shape), strongest / snr)


def _symbols(signal: np.ndarray) -> np.ndarray:
    """Returns a signal as complex symbols of two numbers each; a number alone gets a zero beside it."""
    flat = signal.astype(np.float64).ravel()
    pairs = np.concatenate([flat, np.zeros(flat.size % 2)]).reshape(-1, 2)
    return pairs[:, 0] + 1j * pairs[:, 1]
