"""Computes how long devices take with given shares of the bandwidth, and the reverse. Arrays over devices, no strategy.

A device computes for c seconds and moves S bits. What a share b of the capacity carries has two forms:

- wired, or a token bucket: b C bits per second, so that the delay is c + S / (b C);
- wireless, if a device has a signal-to-noise ratio over the whole band of C Hz: `edgelam_fl.wireless.fdma`.

The longer a round may take, the smaller the share that a device needs; so the shares with which all devices finish together are
optimal for the slowest (arXiv 2407.02924).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgelam_fl.wireless.fdma import bits_per_hertz, wireless_share
from strategies.api import Candidate, Demand

_BISECTIONS = 64
_DOUBLINGS = 200
_LEAST_SNR = 1e-12


@dataclass(frozen=True)
class Needs:
    """The needs of devices in a round, as arrays with one entry per device."""

    compute_s: np.ndarray
    alone_s: np.ndarray  # S / C: time to move everything with the whole capacity; at 1 bit/s/Hz if it is a band
    floor_s: np.ndarray  # least delay that the device's own link allows, at any share
    snr: np.ndarray | None = None  # None: wired

    def __len__(self) -> int:
        return len(self.compute_s)

    def some(self, which: np.ndarray) -> Needs:
        """Returns the needs of the devices at these indices or with a true mask."""
        snr = None if self.snr is None else self.snr[which]
        return Needs(self.compute_s[which], self.alone_s[which], self.floor_s[which], snr)

    def shares(self, delay_s: float | np.ndarray) -> np.ndarray:
        """Returns the share that each device needs to finish within `delay_s`; infinity if no share is enough.

        For a column of delays the result has one row per delay.
        """
        spare_s = delay_s - self.compute_s
        in_time = (spare_s >= 0) & (delay_s >= self.floor_s)
        # A device without payload needs no spare time, and no share.
        with np.errstate(divide="ignore", invalid="ignore"):
            wired = np.where(self.alone_s > 0, self.alone_s / np.maximum(spare_s, 0), 0.0)
        needed = wired if self.snr is None else wireless_share(wired * math.log(2), self.snr)
        return np.where(in_time, needed, np.inf)

    def longest_s(self) -> float:
        """Returns a delay that is enough for all devices together."""
        slowest, sending = float(np.max(self.compute_s)), float(np.sum(self.alone_s))
        for _ in range(_DOUBLINGS):
            delay_s = max(slowest + sending, float(np.max(self.floor_s)))
            if np.sum(self.shares(delay_s)) <= 1:
                break
            sending = max(2 * sending, 1e-9 * max(1.0, slowest))
        return delay_s


def needs_of(devices: Sequence[Candidate] | Sequence[Demand], capacity_bps: float) -> Needs:
    """Returns what devices need: wireless if each has a signal-to-noise ratio. A capacity of 0 means no limit."""
    compute_s = np.array([device.compute_s for device in devices], dtype=float)
    bits = 8 * np.array([device.payload_bytes for device in devices], dtype=float)
    limits = np.array([device.limit_bps or math.inf for device in devices], dtype=float)
    alone_s = bits / capacity_bps if capacity_bps > 0 else np.zeros(len(devices))
    snrs = [device.snr for device in devices if device.snr is not None]
    snr = np.maximum(np.array(snrs, dtype=float), _LEAST_SNR) if devices and len(snrs) == len(devices) else None
    return Needs(compute_s, alone_s, compute_s + bits / limits, snr)


def finish_together(needs: Needs) -> tuple[float, np.ndarray]:
    """Returns (delay in seconds, shares): the least delay of the slowest device, by bisection; the shares sum to 1.

    If computing alone or a device's own link sets the pace, capacity is left over; it is shared out in proportion.
    """
    delay_s = float(least_delays(needs, [len(needs)])[0])
    shares = needs.shares(delay_s)
    total = float(np.sum(shares))
    return delay_s, shares / total if total > 0 else np.full(len(needs), 1 / len(needs))


def least_delays(needs: Needs, counts: Sequence[int]) -> np.ndarray:
    """Returns for each count the least delay at which that many devices fit, namely those that need the smallest shares."""
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
    """Returns how many devices the capacity serves together, smallest shares first, for each row of `shares`."""
    return np.sum(np.cumsum(np.sort(shares), axis=-1) <= 1 + 1e-12, axis=-1)


def delay_of(needs: Needs, shares: np.ndarray) -> np.ndarray:
    """Returns the seconds until each device finishes with these shares."""
    with np.errstate(divide="ignore", invalid="ignore"):
        per_second = shares if needs.snr is None else bits_per_hertz(shares, needs.snr)
        sending_s = np.where(needs.alone_s > 0, needs.alone_s / per_second, 0.0)
    return np.maximum(needs.compute_s + sending_s, needs.floor_s)
