"""Measures the sum rates of the classical precoders against recorded values, and what noisy pilots cost them.

Channels are independent Rayleigh, power 1, noise 1 / SNR; every precoder gets the same draws. The recorded values come from an
independent program: with 4 and 8 users on the same draws, with 6 users on 100 others. --smoke: few draws, no bars.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import sqrt
from time import process_time
from typing import Any

import torch

from benchmarks.common import Figure, main
from edgelam_fl.wireless.beamforming.downlink import Downlink, downlink_at, noise_at, sum_rates
from edgelam_fl.wireless.beamforming.estimation import least_squares, mmse, pilots, received
from edgelam_fl.wireless.beamforming.precoders import mrt, rzf, wmmse, zero_forcing

ANTENNAS, SEED = 8, 1
PRECODERS: dict[str, Callable[[torch.Tensor, Downlink], torch.Tensor]] = {
    "MRT": mrt, "ZF": lambda channels, downlink: zero_forcing(channels, downlink)[0], "RZF": rzf, "WMMSE": wmmse,
}  # fmt: skip
DRAWS = {4: 500, 6: 100, 8: 100}  # by users
RECORDED = {  # bit/s/Hz by users and SNR in dB, in the order of PRECODERS
    4: {
        0: (4.41, 4.54, 5.27, 5.44), 5: (6.34, 8.91, 9.46, 9.58), 10: (7.53, 14.56, 14.83, 14.88),
        15: (8.06, 20.84, 20.94, 20.94), 20: (8.26, 27.36, 27.40, 27.40),
    },
    6: {0: (4.70, 3.51, 5.59, 6.03), 10: (8.05, 14.95, 16.61, 17.34), 20: (8.77, 33.11, 33.44, 33.55)},
    8: {0: (4.80, 1.39, 5.58, 6.34), 10: (8.35, 8.45, 15.95, 18.42), 20: (9.11, 26.39, 31.32, 36.27)},
}  # fmt: skip
SAME_DRAWS = (4, 8)  # users for which the recorded values are of these draws
MOST_OFF_PERCENT, MOST_OFF_ERRORS = 2.0, 3.0  # the second in standard errors of a difference, for other draws
PILOT_SNRS_DB, PILOT_SYMBOLS, DATA_SNR_DB = (0, 5, 10), 4, 10


def measure(smoke: bool) -> tuple[dict[str, Any], list[Figure]]:
    torch.set_num_threads(1)
    figures = [
        figure
        for users, snrs in RECORDED.items()
        for snr_db in snrs
        if not smoke or (users, snr_db) == (4, 10)
        for figure in _of_precoders(users, snr_db, smoke)
    ]
    settings = {
        "antennas": ANTENNAS, "draws by users": DRAWS, "seed": SEED, "pilot symbols": PILOT_SYMBOLS, "pilots' downlink, dB": DATA_SNR_DB,
    }  # fmt: skip
    return settings, [*figures, *_from_pilots(20 if smoke else DRAWS[4])]


def drawn(users: int, count: int, seed: int = SEED) -> torch.Tensor:
    """Draws Rayleigh channels [count, users, ANTENNAS] of mean power 1."""
    torch.manual_seed(seed)
    return torch.randn(count, users, ANTENNAS, dtype=torch.complex128)


def _of_precoders(users: int, snr_db: int, smoke: bool) -> Iterator[Figure]:
    channels, downlink = drawn(users, 20 if smoke else DRAWS[users]), downlink_at(snr_db)
    for (name, precoder), recorded in zip(PRECODERS.items(), RECORDED[users][snr_db], strict=True):
        start_s = process_time()
        beams = precoder(channels, downlink)
        seconds = process_time() - start_s
        rates = sum_rates(channels, beams, downlink.noise)
        rate, error = float(rates.mean()), sqrt(2 / len(rates)) * float(rates.std())
        bar: tuple[str | None, bool | None] = (None, None)
        if not smoke and users in SAME_DRAWS:
            bar = f"{recorded} within {MOST_OFF_PERCENT:g} %", 100 * abs(rate / recorded - 1) <= MOST_OFF_PERCENT
        elif not smoke:
            most = MOST_OFF_ERRORS * error
            bar = f"{recorded} within {most:.2f}, {MOST_OFF_ERRORS:g} standard errors", abs(rate - recorded) <= most
        yield Figure(f"{users} users, {snr_db} dB, {name}", round(rate, 3), "bit/s/Hz", *bar)
        yield Figure(f"{users} users, {snr_db} dB, {name}, time", round(1e6 * seconds / len(channels), 1), "us/cell")


def _from_pilots(count: int) -> Iterator[Figure]:
    """Yields the sum rates of RZF on estimated channels, and the errors of the estimates over the channels' power."""
    channels, downlink, sent = drawn(4, count), downlink_at(DATA_SNR_DB), pilots(PILOT_SYMBOLS, 4, torch.complex128)
    for snr_db in PILOT_SNRS_DB:
        noise = noise_at(snr_db)
        heard = received(channels, sent, noise)
        for name, estimate in (("LS", least_squares(heard, sent)), ("MMSE", mmse(heard, sent, noise))):
            error = float((estimate - channels).abs().square().mean())
            rate = float(sum_rates(channels, rzf(estimate, downlink), downlink.noise).mean())
            yield Figure(f"pilots at {snr_db} dB, {name}, then RZF", round(rate, 3), "bit/s/Hz")
            yield Figure(f"pilots at {snr_db} dB, {name}, error", round(error, 4), "of the channel's power")


if __name__ == "__main__":
    main("beamforming", measure)
