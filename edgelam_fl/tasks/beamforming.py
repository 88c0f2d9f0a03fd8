"""Beamforming: a base station's beams for all users of its cell at once, judged by the sum rate; a cell's channels are a sample.

Each sample is an example at every SNR of the run file. Nothing imitates other beams: what is learned is the rate that is still
missing. With pilots, beams are made from least-squares estimates, and judged over the true channels. Knows no run and no network; what is
measured stands beside four classical precoders on the same channels or estimates.
Shapes: B examples of S SNRs, K users, M antennas, F values of a user as in `wireless.beamforming.values`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random

import torch

from edgelam_fl.tasks.arrays import Sample
from edgelam_fl.tasks.base import Made, Unit, ValueExample, value_units
from edgelam_fl.tasks.points import MODEL, sums_at
from edgelam_fl.tasks.radio import RadioTaskSettings
from edgelam_fl.telemetry.human import human_count
from edgelam_fl.wireless.beamforming.downlink import Downlink, downlink_at, noise_at, sum_rates
from edgelam_fl.wireless.beamforming.estimation import least_squares, pilots, received
from edgelam_fl.wireless.beamforming.precoders import mrt, rzf, singular_cells, wmmse, zero_forcing
from edgelam_fl.wireless.beamforming.values import beams_of, channels_of, values_of


class Beamforming:
    """The task of one run, which needs no tokenizer."""

    def __init__(self, _: Path, settings: RadioTaskSettings) -> None:
        self._snrs_db, self._pilot_snrs_db = tuple(settings.radio.beam_snrs_db), tuple(settings.radio.pilot_snrs_db)
        self._seed = settings.radio.seed

    def examples(self, samples: Sequence[Sample]) -> Made:
        """Makes an example of each sample at each SNR, whose labels are the true channels: they say what a beam is worth.

        With pilots, at each of their SNRs too; the estimates, which the model gets, then follow in the labels.
        """
        noise_S = torch.tensor([noise_at(snr_db) for snr_db in self._snrs_db])
        made, singular = [], 0
        for sample in samples:
            channels_1KM = torch.from_numpy(sample.arrays["channels"])[None]
            channels_SKM = channels_1KM.expand(len(noise_S), -1, -1)
            known_SKF = values_of(channels_SKM, noise_S)
            if not self._pilot_snrs_db:
                singular += int(singular_cells(channels_1KM.to(torch.complex128)).sum())
                made += [ValueExample(values_KF, values_KF, 1) for values_KF in known_SKF.numpy()]
            for estimated_SKF in self._estimated(channels_SKM, noise_S, sample.digest):
                both = torch.cat([known_SKF, estimated_SKF], 2)
                made += [ValueExample(*one, 1) for one in zip(estimated_SKF.numpy(), both.numpy(), strict=True)]
        told = f"a singular channel matrix in {singular} of {human_count(len(samples), 'sample')}: zero forcing is regularised there"
        return Made(made, remarks=(told,) if singular else ())

    def _estimated(self, channels_SKM: torch.Tensor, noise_S: torch.Tensor, digest: str) -> Iterator[torch.Tensor]:
        """Yields what is known of a sample after pilots at each of their SNRs [S, K, F]: one symbol per user, heard once per SNR of the beams.

        Their noise follows from the run's seed and the sample's content.
        """
        generator = torch.Generator().manual_seed(Random(f"{self._seed}/pilots/{digest}").getrandbits(32))
        users = channels_SKM.shape[1]
        sent_KK = pilots(users, users)
        for noise in map(noise_at, self._pilot_snrs_db):
            heard_SKM = received(channels_SKM, sent_KK, noise, generator)
            yield values_of(least_squares(heard_SKM, sent_KK), noise_S, noise / users)

    def units(self, examples: Sequence[ValueExample], pieces: int) -> list[Unit]:
        return value_units(examples, pieces)

    def seen(self, example: ValueExample) -> list[tuple[str, bool]]:
        channels_BKM, *_ = channels_of(torch.from_numpy(example.inputs)[None])
        _, users, antennas = channels_BKM.shape
        at = f"at each of {len(self._snrs_db)} SNRs"
        heard = "".join(f", pilots at {snr_db:g} dB" for snr_db in self._pilot_snrs_db)
        return [(f"{users} users x {antennas} antennas{heard}, {at} -> ", False), (f"a beam for each user {at}", True)]

    def loss_rows(self, labels: torch.Tensor) -> None:
        """Returns None: the rate of a user depends on the beams of all."""

    def loss(
        self, output: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor | None = None, *, training: bool = False
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Returns the sum of `missing_rates`, in bit/s per Hz, and what is measured: sum rates by SNR, also of other precoders."""
        known, seen = labels.chunk(2, dim=2) if self._pilot_snrs_db else (labels, labels)
        channels_BKM, noise_B, _ = channels_of(known)
        rates_B = sum_rates(channels_BKM, beams_of(output), noise_B[:, None])
        missing = (single_rates(channels_BKM, noise_B) - rates_B).sum()
        return missing, {} if training else self._measured(channels_BKM, noise_B, rates_B.detach(), seen)

    def _measured(
        self, channels_BKM: torch.Tensor, noise_B: torch.Tensor, rates_B: torch.Tensor, seen_BKF: torch.Tensor
    ) -> dict[str, float]:
        sums: dict[str, float] = {}
        for snr_db in self._snrs_db:
            here_B = torch.isclose(noise_B, torch.tensor(noise_at(snr_db)), rtol=1e-4)
            if here_B.any():
                true_BKM = channels_BKM[here_B]
                others = (
                    from_pilots(true_BKM, seen_BKF[here_B], snr_db)
                    if self._pilot_snrs_db
                    else classical(true_BKM, snr_db)
                )
                sums |= sums_at(snr_db, {MODEL: float(rates_B[here_B].sum())} | others, int(here_B.sum()))
        return sums


def single_rates(channels_BKM: torch.Tensor, noise_B: torch.Tensor) -> torch.Tensor:
    """Returns what no beams of power 1 can exceed [B], in bit/s per Hz: every user alone in the cell, with all of the power."""
    power_BK = channels_BKM.abs().square().sum(2)
    return torch.log2(1 + power_BK / noise_B[:, None]).sum(1)


def classical(channels_BKM: torch.Tensor, snr_db: float) -> dict[str, float]:
    """Returns the sum rate of classical precoders, added up over cells, by name; without zero forcing if users outnumber antennas."""
    downlink = downlink_at(snr_db)
    wide_BKM = channels_BKM.to(torch.complex128)  # channels that are nearly singular need it
    beams = {"MRT": mrt(wide_BKM, downlink)}
    if wide_BKM.shape[1] <= wide_BKM.shape[2]:
        beams["ZF"], _ = zero_forcing(wide_BKM, downlink)
    beams |= {"RZF": rzf(wide_BKM, downlink), "WMMSE": wmmse(wide_BKM, downlink)}
    return _summed(wide_BKM, beams, downlink)


def from_pilots(channels_BKM: torch.Tensor, seen_BKF: torch.Tensor, snr_db: float) -> dict[str, float]:
    """Returns the sum rate of RZF from estimates, and of what knows the channels, added up over cells, by name."""
    downlink = downlink_at(snr_db)
    estimates_BKM, _, error_B = channels_of(seen_BKF.double())
    wide_BKM = channels_BKM.to(torch.complex128)
    beams = {
        "LS, then RZF": rzf(estimates_BKM, downlink),
        # With orthogonal pilots, and entries of variance 1, the estimate of least error is a shorter one.
        "MMSE, then RZF": rzf(estimates_BKM / (1 + error_B[:, None, None]), downlink),
        "RZF, channels known": rzf(wide_BKM, downlink),
        "WMMSE, channels known": wmmse(wide_BKM, downlink),
    }
    return _summed(wide_BKM, beams, downlink)


def _summed(channels_BKM: torch.Tensor, beams: Mapping[str, torch.Tensor], downlink: Downlink) -> dict[str, float]:
    return {name: float(sum_rates(channels_BKM, one, downlink.noise).sum()) for name, one in beams.items()}
