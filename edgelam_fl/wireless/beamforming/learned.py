"""A trained beam network in the place of a precoder, which knows what it was trained on. Trains nothing."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from edgelam_fl.wireless.beamforming.downlink import Downlink, check_channels
from edgelam_fl.wireless.beamforming.network import BeamNetwork


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
