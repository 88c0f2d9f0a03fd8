"""How long devices take with which shares of the bandwidth: arrays over devices, no strategy.

A device computes for c seconds and moves S bits. Two forms of what a share b of the capacity carries:

- wired, or a token bucket: b C bits a second, so that the delay is c + S / (b C);
- wireless, where a device has a signal-to-noise ratio g over the whole band of C Hz (its received power over the band's
  noise): b C log2(1 + g / b) bits a second.

A device needs the smaller a share the longer the round may take; the shares with which all finish together are therefore
optimal for the slowest (arXiv 2407.02924; the closed form is our derivation).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from strategies.base import Candidate, Demand

_BISECTIONS = 64
_DOUBLINGS = 200
_LEAST_SNR = 1e-12


@dataclass(frozen=True)
class Needs:
    """What devices need, an entry a device."""

    compute_s: np.ndarray
    alone_s: np.ndarray  # S / C: moving all with the whole capacity, at 1 bit/s/Hz where it is a band
    floor_s: np.ndarray  # no share makes a device faster than its own link
    snr: np.ndarray | None = None  # None: wired

    def __len__(self) -> int:
        return len(self.compute_s)

    def some(self, which: np.ndarray) -> Needs:
        snr = None if self.snr is None else self.snr[which]
        return Needs(self.compute_s[which], self.alone_s[which], self.floor_s[which], snr)

    def shares(self, delay_s: float | np.ndarray) -> np.ndarray:
        """The share that each needs to be through after `delay_s`; infinite where none is enough.

        Of a column of delays: a row for each.
        """
        spare_s = delay_s - self.compute_s
        in_time = (spare_s >= 0) & (delay_s >= self.floor_s)
        # A device without payload needs no spare time, and no share.
        with np.errstate(divide="ignore", invalid="ignore"):
            wired = np.where(self.alone_s > 0, self.alone_s / np.maximum(spare_s, 0), 0.0)
        needed = wired if self.snr is None else wireless_share(wired * math.log(2), self.snr)
        return np.where(in_time, needed, np.inf)

    def longest_s(self) -> float:
        """A delay that is enough for all."""
        slowest, sending = float(np.max(self.compute_s)), float(np.sum(self.alone_s))
        for _ in range(_DOUBLINGS):
            delay_s = max(slowest + sending, float(np.max(self.floor_s)))
            if np.sum(self.shares(delay_s)) <= 1:
                break
            sending = max(2 * sending, 1e-9 * max(1.0, slowest))
        return delay_s


def needs_of(devices: Sequence[Candidate] | Sequence[Demand], capacity_bps: float) -> Needs:
    """Wireless if every device has a signal-to-noise ratio; a capacity of 0 is none that limits."""
    compute_s = np.array([device.compute_s for device in devices], dtype=float)
    bits = 8 * np.array([device.payload_bytes for device in devices], dtype=float)
    limits = np.array([device.limit_bps or math.inf for device in devices], dtype=float)
    alone_s = bits / capacity_bps if capacity_bps > 0 else np.zeros(len(devices))
    snrs = [device.snr for device in devices if device.snr is not None]
    snr = np.maximum(np.array(snrs, dtype=float), _LEAST_SNR) if devices and len(snrs) == len(devices) else None
    return Needs(compute_s, alone_s, compute_s + bits / limits, snr)


def finish_together(needs: Needs) -> tuple[float, np.ndarray]:
    """(delay in seconds, shares): the least delay of the slowest, by bisection; the shares sum to 1.

    Where a device's own link or nothing but computing sets the pace, capacity is left over, and dealt out in proportion.
    """
    delay_s = float(least_delays(needs, [len(needs)])[0])
    shares = needs.shares(delay_s)
    total = float(np.sum(shares))
    return delay_s, shares / total if total > 0 else np.full(len(needs), 1 / len(needs))


def least_delays(needs: Needs, counts: Sequence[int]) -> np.ndarray:
    """For each count the least delay at which so many devices fit: those that then need the smallest shares."""
    wanted = np.array(counts)
    low, high = np.zeros(len(wanted)), np.full(len(wanted), needs.longest_s())
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        enough = fitting(needs.shares(middle[:, None])) >= wanted
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
        if np.all(high - low <= 1e-13 * high):
            break
    return high


def fitting(shares: np.ndarray) -> np.ndarray:
    """How many devices the capacity serves together, the least needy first; of each row of `shares`."""
    return np.sum(np.cumsum(np.sort(shares), axis=-1) <= 1 + 1e-12, axis=-1)


def delay_of(needs: Needs, shares: np.ndarray) -> np.ndarray:
    """Seconds until each device is through, with these shares."""
    with np.errstate(divide="ignore", invalid="ignore"):
        per_second = shares if needs.snr is None else shares * np.log2(1 + needs.snr / shares)
        sending_s = np.where(needs.alone_s > 0, needs.alone_s / per_second, 0.0)
    return np.maximum(needs.compute_s + sending_s, needs.floor_s)


# ---------------------------------------------------------------- wireless


def wireless_share(rho: np.ndarray, snr: np.ndarray) -> np.ndarray:
    """The share b with b ln(1 + snr / b) = rho: what carries rho / ln 2 bit/s a Hz of the band.

    b = -rho / (W(-beta e^-beta) + beta), beta = rho / snr, W the lower real branch of Lambert's function; infinite where
    beta >= 1, since the rate never reaches that, however wide the band.
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
    """W with W e^W = -e^log_x and W <= -1, for log_x <= -1 (logarithms, since -x is tiny where a channel is good).

    y = -W solves y - ln y = -log_x. Newton's steps come from above, where the function is convex, and never overshoot; the
    start is the upper bound 1 + sqrt(2 u) + u, u = -log_x - 1 (Chatzigeorgiou, arXiv 1601.04895).
    """
    u = np.maximum(-log_x - 1, 0.0)
    y = 1 + np.sqrt(2 * u) + u
    for _ in range(8):
        step = (y - np.log(y) - 1 - u) * y / np.maximum(y - 1, 1e-300)
        y = np.maximum(y - np.where(y > 1, step, 0.0), 1.0)
    return -y
