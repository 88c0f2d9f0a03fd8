"""Measures what a small network predicts of a radio channel, trained on 600 links for a short time.

Links, noise and score are those of `benchmarks.channel_prediction`: TDD at an input SNR of 10 dB. The network sees one series of 16
values, of one direction and delay bin, at a time, turned so that the last value is real and scaled to power 1, and the
series' power over the noise; it predicts the next four values. Noise is drawn anew in each epoch. Three seeds, of the
network and its noise; CPU seconds are the process's own. --smoke: one epoch of eight links of the small generator.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.channel_prediction import NOISE_SEEDS, TEST, TRAINING
from benchmarks.common import Figure, main
from edgelam_fl.files import cache_folder
from edgelam_fl.wireless.channels.links import SPEEDS_KMH, Channels_NTFM, Links, with_noise
from edgelam_fl.wireless.channels.paths import Paths
from edgelam_fl.wireless.channels.store import kept
from edgelam_fl.wireless.prediction.extrapolation import subspace
from edgelam_fl.wireless.prediction.score import AHEAD, PAST, errors, future_of, nmse_db, past_of
from edgelam_fl.wireless.prediction.series import channels_of, projected, strongest

SNR_DB = 10.0
NOISE_POWER = 10 ** (-SNR_DB / 10)
LEAST_POWER = 1.3 * NOISE_POWER  # series below are predicted as zero
WIDTH, BATCH, LR, WEIGHT_DECAY = 384, 1024, 2e-3, 1e-3
EPOCHS = 5  # a short training: a floor of what such a network can do
SEEDS = (1, 2, 3)


class SeriesNetwork(nn.Module):
    """Three hidden layers on one series; a turned series is predicted turned."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 * PAST + 1, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH),
            nn.GELU(), nn.Linear(WIDTH, 2 * AHEAD),
        )  # fmt: skip

    def forward(self, series_XT: torch.Tensor) -> torch.Tensor:
        """Returns the next values, `[X, 4]`, of complex series, `[X, 16]`."""
        amplitude = series_XT.abs().square().mean(1, keepdim=True).sqrt()
        last = series_XT[:, -1:]
        turn = last / last.abs().clamp_min(1e-9)
        even = series_XT / amplitude * turn.conj()
        level = 2 * torch.log10(amplitude / NOISE_POWER**0.5)
        ahead = self.layers(torch.cat([even.real, even.imag, level], 1))
        return torch.complex(ahead[:, :AHEAD], ahead[:, AHEAD:]) * amplitude * turn


@dataclass(frozen=True)
class Trained:
    network: SeriesNetwork
    cpu_s: float


def trained(links: Links, seed: int, epochs: int) -> Trained:
    """Trains a network on the clean future of noisy series, with a learning rate that falls to nothing."""
    torch.manual_seed(seed)
    began, network = time.process_time(), SeriesNetwork()
    optimizer = torch.optim.AdamW(network.parameters(), LR, weight_decay=WEIGHT_DECAY)
    for epoch in range(epochs):
        seen, ahead = _examples(links, 1000 * seed + epoch)
        order = torch.randperm(len(seen)).split(BATCH)
        for step, rows in enumerate(order):
            for group in optimizer.param_groups:
                group["lr"] = LR * (1 - (epoch + step / len(order)) / epochs)
            optimizer.zero_grad()
            error = (network(seen[rows]) - ahead[rows]).abs().square().sum()
            (error / ahead[rows].abs().square().sum()).backward()
            optimizer.step()
        print(f"seed {seed}, epoch {epoch + 1}: {time.process_time() - began:.0f} s of CPU", flush=True)
    return Trained(network, time.process_time() - began)


def _examples(links: Links, noise_seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the noisy series above the noise, `[X, 16]`, and their clean future, `[X, 4]`."""
    past = with_noise(past_of(links.up_NTFM), SNR_DB, noise_seed)
    directions = strongest(past)
    seen, ahead = (_rows(projected(part, directions)) for part in (past, future_of(links.up_NTFM)))
    loud = seen.abs().square().mean(1) > LEAST_POWER
    return seen[loud], ahead[loud]


def _rows(series_NTFE: Channels_NTFM) -> torch.Tensor:
    return torch.from_numpy(series_NTFE.transpose(0, 2, 3, 1).reshape(-1, series_NTFE.shape[1]))


def predicted(network: SeriesNetwork, past_NTFM: Channels_NTFM) -> Channels_NTFM:
    """Predicts channels series by series."""
    directions = strongest(past_NTFM)
    seen = projected(past_NTFM, directions)
    rows = _rows(seen)
    loud = rows.abs().square().mean(1) > LEAST_POWER
    ahead = torch.zeros(len(rows), AHEAD, dtype=rows.dtype)
    with torch.no_grad():
        ahead[loud] = network(rows[loud])
    links, _, bins, count = seen.shape
    return channels_of(ahead.numpy().reshape(links, bins, count, AHEAD).transpose(0, 3, 1, 2), directions)


def measure(smoke: bool) -> tuple[dict[str, Any], list[Figure]]:
    if smoke:
        training, test = Paths(8, seed=1).draw(), Paths(8, seed=2).draw()
        return {"smoke": True}, list(_figures(training, test, SEEDS[:2], 1))
    torch.set_num_threads(1)  # threads wait for each other longer than they compute
    training, test = (kept(scene, cache_folder() / "channels") for scene in (TRAINING, TEST))
    settings = {"snr_db": SNR_DB, "training": repr(TRAINING), "test": repr(TEST), "epochs": EPOCHS, "seeds": SEEDS}
    return settings, list(_figures(training, test, SEEDS, EPOCHS))


def _figures(training: Links, test: Links, seeds: tuple[int, ...], epochs: int) -> Iterator[Figure]:
    past, true = with_noise(past_of(test.up_NTFM), SNR_DB, NOISE_SEEDS[1]), future_of(test.up_NTFM)
    runs = [trained(training, seed, epochs) for seed in seeds]
    each = [errors(predicted(run.network, past), true) for run in runs]
    for speed in SPEEDS_KMH:
        db = [nmse_db(run[test.speed_kmh == speed]) for run in each if (test.speed_kmh == speed).any()]
        if db:
            yield Figure(f"network on series, {speed:g} km/h", round(mean(db), 2), "dB, mean of seeds")
    db = [nmse_db(run) for run in each]
    yield Figure("network on series, all", round(mean(db), 2), "dB, mean of seeds")
    yield Figure("network on series, standard deviation over seeds", round(stdev(db), 3), "dB")
    untrained = errors(subspace(past, NOISE_POWER, by_bin=True), true)
    yield Figure("subspace AR(8) per delay bin, all", round(nmse_db(untrained), 2), "dB")
    won = np.mean([np.mean(run < untrained) for run in each])
    yield Figure("links that the network predicts better", round(float(won), 3), "of all")
    yield Figure("trainable parameters", sum(p.numel() for p in runs[0].network.parameters()), "")
    yield Figure("CPU per training", round(mean(run.cpu_s for run in runs), 1), "s")


if __name__ == "__main__":
    main("channel_network", measure)
