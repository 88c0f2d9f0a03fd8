"""What a share of a band carries: frequency division, no interference. Arrays over devices.

A device has a signal-to-noise ratio g over the whole band of B Hz (its received power over the band's noise). On a share b of
the band its power meets less noise: b B log2(1 + g / b) bits per second (arXiv 2407.02924).
"""

from __future__ import annotations

import numpy as np


def bits_per_hertz(share: np.ndarray, snr: np.ndarray) -> np.ndarray:
    """Returns b log2(1 + g / b): bits per second that a share carries, per Hz of the whole band; 0 for a share of 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(share > 0, share * np.log2(1 + snr / share), 0.0)


def wireless_share(rho: np.ndarray, snr: np.ndarray) -> np.ndarray:
    """Returns the share b with b ln(1 + snr / b) = rho, which carries rho / ln 2 bit/s per Hz of the band.

    b = -rho / (W(-beta e^-beta) + beta), beta = rho / snr, W the lower real branch of Lambert's function; infinite if
    beta >= 1, since no band is wide enough for that rate. (The closed form is our derivation.)
    """
    beta = rho / snr
    possible = beta < 1
    # From 1 on there is no root; next to 0 the share is next to 0 too, and beta e^-beta must stay a number.
    safe = np.clip(np.where(possible, beta, 0.5), 1e-300, None)
    y = -lambert_w_lower_log(np.log(safe) - safe)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(y > safe, rho / (y - safe), np.inf)
    return np.where(rho <= 0, 0.0, np.where(possible, share, np.inf))


def lambert_w_lower_log(log_x: np.ndarray) -> np.ndarray:
    """Returns W with W e^W = -e^log_x and W <= -1, for log_x <= -1 (logarithms, since x is tiny if a channel is good).

    y = -W solves y - ln y = -log_x. Newton's steps come from above, where the function is convex, and never overshoot; the
    start is the upper bound 1 + sqrt(2 u) + u, u = -log_x - 1 (Chatzigeorgiou, arXiv 1601.04895), at most 14 % off: after
    three steps only rounding is left.
    """
    u = np.maximum(-log_x - 1, 0.0)
    y = 1 + np.sqrt(2 * u) + u
    for _ in range(4):
        step = (y - np.log(y) - 1 - u) * y / np.maximum(y - 1, 1e-300)
        y = np.maximum(y - np.where(y > 1, step, 0.0), 1.0)
    return -y
