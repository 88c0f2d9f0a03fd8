"""Trains the beam network on minus the sum rate, and compares it with WMMSE and RZF on paired draws; three seeds.

One training knows the channels (8 antennas, 4 and 8 users in turn, 0 to 20 dB) and is also tested with 6 users and at -5 and 25 dB, which
it never saw; another sees least-squares estimates of pilots at 0 to 10 dB alone (4 users, 10 dB). No bar is on a mean over seeds: the
worst seed must hold it. --smoke: a few steps, one SNR per number of users, no bars.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from math import sqrt
from time import process_time
from typing import Any

import torch

from benchmarks.beamforming import DATA_SNR_DB, PILOT_SNRS_DB, drawn
from benchmarks.common import Figure, main
from edgelam_fl.wireless.beamforming.downlink import downlink_at, noise_at, sum_rates
from edgelam_fl.wireless.beamforming.estimation import least_squares, mmse, pilots, received
from edgelam_fl.wireless.beamforming.learned import LearnedPrecoder, Lesson, OutsideTraining
from edgelam_fl.wireless.beamforming.network import BeamNetwork
from edgelam_fl.wireless.beamforming.precoders import rzf, wmmse

KNOWN, ESTIMATED = Lesson(), Lesson(users=(4,), snr_db=(DATA_SNR_DB, DATA_SNR_DB), pilot_snr_db=(0.0, 10.0))
STEPS = {"known": 600, "estimated": 600}
SEEDS, TEST_SEED, DRAWS = (1, 2, 3), 1000, 500
TESTED = {4: (-5, 0, 5, 10, 15, 20, 25), 6: (0, 10, 20), 8: (0, 10, 20)}  # SNRs in dB by users
LEAST_PERCENT = {(4, snr_db): 97.0 for snr_db in (0, 5, 10, 15, 20)} | {(8, 10): 95.0}  # of WMMSE
ABOVE_RZF = {(4, 0), (6, 0), (6, 10), (6, 20)}
MAX_NORM = 1.0  # of a step's gradient
TIMED = 50  # decisions, one cell at a time


def train(lesson: Lesson, *, steps: int, seed: int, lr: float = 2e-3) -> LearnedPrecoder:
    """Trains a new network by Adam on newly drawn channels, with a rate that falls to 0 along a cosine. The same seed gives the same network."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = BeamNetwork()
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        loss = _loss(network, lesson, lesson.users[step % len(lesson.users)], generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), MAX_NORM)
        optimizer.step()
        schedule.step()
    return LearnedPrecoder(network, lesson)


def _loss(network: BeamNetwork, lesson: Lesson, users: int, generator: torch.Generator) -> torch.Tensor:
    """Returns minus the mean sum rate of newly drawn cells; with pilots, the network sees estimates, and the rates are of the true channels."""
    shape = (lesson.cells, users, lesson.antennas)
    channels_BKM = torch.randn(shape, dtype=torch.complex64, generator=generator)
    noise_B = _uniform_noise(lesson.snr_db, lesson.cells, generator)
    seen_BKM, error_B = channels_BKM, None
    if lesson.pilot_snr_db is not None:
        sent_TK, pilot_noise_B = pilots(users, users), _uniform_noise(lesson.pilot_snr_db, lesson.cells, generator)
        heard_BTM = received(channels_BKM, sent_TK, pilot_noise_B[:, None, None], generator)
        seen_BKM, error_B = least_squares(heard_BTM, sent_TK), pilot_noise_B / users
    return -sum_rates(channels_BKM, network(seen_BKM, noise_B, error_B), noise_B[:, None]).mean()


def _uniform_noise(snr_db: tuple[float, float], cells: int, generator: torch.Generator) -> torch.Tensor:
    low, high = snr_db
    return 10 ** (-(low + (high - low) * torch.rand(cells, generator=generator)) / 10)


def measure(smoke: bool) -> tuple[dict[str, Any], list[Figure]]:
    torch.set_num_threads(1)
    seeds, draws = (SEEDS[:1], 4) if smoke else (SEEDS, DRAWS)
    steps = dict.fromkeys(STEPS, 2) if smoke else STEPS
    start_s = process_time()
    known = [train(KNOWN, steps=steps["known"], seed=seed) for seed in seeds]
    middle_s = process_time()
    estimated = [train(ESTIMATED, steps=steps["estimated"], seed=seed) for seed in seeds]
    end_s = process_time()
    parameters = sum(tensor.numel() for tensor in known[0].network.parameters())
    settings = {
        "antennas": KNOWN.antennas, "draws": draws, "seeds": seeds, "steps": steps, "cells per step": KNOWN.cells, "parameters": parameters,
    }  # fmt: skip
    figures = [
        Figure("training, channels known", round((middle_s - start_s) / len(seeds), 1), "CPU s, mean of the seeds"),
        Figure("training, from pilots", round((end_s - middle_s) / len(seeds), 1), "CPU s, mean of the seeds"),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OutsideTraining)  # on purpose
        for users, snrs in TESTED.items():
            for snr_db in snrs[-1:] if smoke else snrs:
                figures += _of_known(known, users, snr_db, draws, smoke)
        for pilot_snr_db in PILOT_SNRS_DB:
            figures += _from_pilots(estimated, pilot_snr_db, draws, smoke)
    return settings, [*figures, *_times(known[0], 2 if smoke else TIMED)]


def _of_known(learned: Sequence[LearnedPrecoder], users: int, snr_db: int, draws: int, smoke: bool) -> Iterator[Figure]:
    channels, downlink = drawn(users, draws, TEST_SEED), downlink_at(snr_db)
    classical, best = (sum_rates(channels, make(channels, downlink), downlink.noise) for make in (rzf, wmmse))
    rates = [sum_rates(channels, one(channels, downlink), downlink.noise) for one in learned]
    where = f"{users} users, {snr_db} dB"
    for name, values in (("RZF", classical), ("WMMSE", best)):
        yield Figure(f"{where}, {name}", round(float(values.mean()), 3), "bit/s/Hz")
    yield Figure(f"{where}, network", round(float(torch.stack(rates).mean()), 3), "bit/s/Hz, mean of the seeds")
    percent = min(100 * float(one.mean() / best.mean()) for one in rates)
    least = None if smoke else LEAST_PERCENT.get((users, snr_db))
    bar = (None, None) if least is None else (f"at least {least:g}", percent >= least)
    yield Figure(f"{where}, network over WMMSE", round(percent, 2), "%, least of the seeds", *bar)
    low = min(_low_end(one - classical) for one in rates)
    bar = ("above 0", low > 0) if (users, snr_db) in ABOVE_RZF and not smoke else (None, None)
    yield Figure(f"{where}, network less RZF, low end", round(low, 4), "bit/s/Hz, least of the seeds", *bar)


def _from_pilots(learned: Sequence[LearnedPrecoder], pilot_snr_db: int, draws: int, smoke: bool) -> Iterator[Figure]:
    users, noise, downlink = 4, noise_at(pilot_snr_db), downlink_at(DATA_SNR_DB)
    channels, sent = drawn(users, draws, TEST_SEED), pilots(users, users, torch.complex128)
    heard = received(channels, sent, noise)
    estimate = least_squares(heard, sent)
    after = {
        name: sum_rates(channels, rzf(seen, downlink), downlink.noise)
        for name, seen in (("LS", estimate), ("MMSE", mmse(heard, sent, noise)))
    }
    rates = [sum_rates(channels, one(estimate, downlink, noise / users), downlink.noise) for one in learned]
    where = f"pilots at {pilot_snr_db} dB"
    yield Figure(f"{where}, network", round(float(torch.stack(rates).mean()), 3), "bit/s/Hz, mean of the seeds")
    for name, values in after.items():
        yield Figure(f"{where}, {name}, then RZF", round(float(values.mean()), 3), "bit/s/Hz")
        low = min(_low_end(one - values) for one in rates)
        bar = ("above 0", low > 0) if name == "LS" and not smoke else (None, None)
        yield Figure(
            f"{where}, network less {name}, then RZF, low end", round(low, 4), "bit/s/Hz, least of the seeds", *bar
        )


def _low_end(differences: torch.Tensor) -> float:
    """Returns the low end of the 95 % interval of the mean of paired differences."""
    return float(differences.mean() - 1.96 * differences.std() / sqrt(len(differences)))


def _times(learned: LearnedPrecoder, cells: int) -> Iterator[Figure]:
    """Yields CPU times of a decision for 8 users at 10 dB, for one cell at a time and for all at once."""
    channels, downlink = drawn(8, cells, TEST_SEED), downlink_at(10)
    makers: dict[str, Callable[..., torch.Tensor]] = {"network": learned, "WMMSE": wmmse, "RZF": rzf}
    for name, make in makers.items():
        for how, parts in (("one cell at a time", channels.split(1)), (f"{cells} cells at once", [channels])):
            make(parts[0], downlink)
            start_s = process_time()
            for part in parts:
                make(part, downlink)
            microseconds = 1e6 * (process_time() - start_s) / cells
            yield Figure(f"a decision, {name}, {how}", round(microseconds, 1), "us/cell")


if __name__ == "__main__":
    main("beam_network", measure)
