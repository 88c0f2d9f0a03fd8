"""Trains a beam network on minus the sum rate: it needs channels, and no beams to imitate. Knows no federation."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from edgelam_fl.wireless.beamforming.downlink import Downlink, check_channels, sum_rates
from edgelam_fl.wireless.beamforming.estimation import least_squares, pilots, received
from edgelam_fl.wireless.beamforming.network import BeamNetwork

MAX_NORM = 1.0  # of a step's gradient


class OutsideTraining(UserWarning):
    """Beams for an SNR or a number of users that the network was not trained on."""


@dataclass(frozen=True)
class Lesson:
    """The cells that a network is trained on: independent Rayleigh channels of power 1, uniform in SNR between two bounds in dB."""

    antennas: int = 8
    users: Sequence[int] = (4, 8)  # of a step's cells, in turn
    snr_db: tuple[float, float] = (0.0, 20.0)
    pilot_snr_db: tuple[float, float] | None = None  # None: channels are known; else one pilot symbol per user
    cells: int = 128  # per step


@dataclass(frozen=True)
class LearnedPrecoder:
    """A trained network in the place of a precoder, and what it was trained on."""

    network: BeamNetwork
    lesson: Lesson

    def __call__(self, channels_BKM: torch.Tensor, downlink: Downlink, error: float = 0.0) -> torch.Tensor:
        """Returns beams [B, M, K]. `error`: the variance of the entries of estimated channels.

        Warns of an SNR or a number of users outside those of the training.
        """
        check_channels(channels_BKM)
        self._warn(channels_BKM.shape[1], 10 * math.log10(downlink.power / downlink.noise))
        noise_B, error_B = (torch.full(channels_BKM.shape[:1], value) for value in (downlink.noise, error))
        with torch.no_grad():
            beams_BMK = self.network(channels_BKM.to(torch.complex64), noise_B, error_B, downlink.power)
        return beams_BMK.to(channels_BKM.dtype)

    def _warn(self, users: int, snr_db: float) -> None:
        for name, value, (low, high) in (
            ("users", users, (min(self.lesson.users), max(self.lesson.users))),
            ("an SNR in dB", round(snr_db, 6), self.lesson.snr_db),
        ):
            if not low <= value <= high:
                warnings.warn(
                    f"the beam network was trained on {name} from {low:g} to {high:g}, not {value:g}",
                    OutsideTraining,
                    3,
                )


def train(lesson: Lesson, *, steps: int, seed: int, lr: float = 2e-3) -> LearnedPrecoder:
    """Trains a new network by Adam, with a rate that falls to 0 along a cosine. The same seed gives the same network."""
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
