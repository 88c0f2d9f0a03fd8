"""Beamforming: a base station's beams for all users of its cell at once, judged by the sum rate; a cell's channels are a sample.

Each sample is an example at every SNR of the run file. Nothing imitates other beams: what is learned is the rate that is still
missing. Knows no run and no network; what is measured stands beside four classical precoders on the same channels.
Shapes: B examples, K users, M antennas.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from edgelam_fl.tasks.arrays import Sample
from edgelam_fl.tasks.base import Made, Unit, ValueExample, value_units
from edgelam_fl.tasks.points import MODEL, sums_at
from edgelam_fl.tasks.radio import RadioTaskSettings
from edgelam_fl.telemetry.human import human_count
from edgelam_fl.wireless.beamforming.downlink import downlink_at, noise_at, sum_rates
from edgelam_fl.wireless.beamforming.precoders import mrt, rzf, singular_cells, wmmse, zero_forcing
from edgelam_fl.wireless.beamforming.values import beams_of, channels_of, values_of


class Beamforming:
    """The task of one run, which needs no tokenizer."""

    def __init__(self, _: Path, settings: RadioTaskSettings) -> None:
        self._snrs_db = tuple(settings.radio.beam_snrs_db)

    def examples(self, samples: Sequence[Sample]) -> Made:
        """Makes an example of each sample at each SNR, whose labels are its inputs: the channels say what a beam is worth."""
        noise_S = torch.tensor([noise_at(snr_db) for snr_db in self._snrs_db])
        made, singular = [], 0
        for sample in samples:
            channels_1KM = torch.from_numpy(sample.arrays["channels"])[None]
            singular += int(singular_cells(channels_1KM.to(torch.complex128)).sum())
            for values_KF in values_of(channels_1KM.expand(len(noise_S), -1, -1), noise_S).numpy():
                made.append(ValueExample(values_KF, values_KF, 1))
        told = f"a singular channel matrix in {singular} of {human_count(len(samples), 'sample')}: zero forcing is regularised there"
        return Made(made, remarks=(told,) if singular else ())

    def units(self, examples: Sequence[ValueExample], pieces: int) -> list[Unit]:
        return value_units(examples, pieces)

    def seen(self, example: ValueExample) -> list[tuple[str, bool]]:
        channels_BKM, _ = channels_of(torch.from_numpy(example.inputs)[None])
        _, users, antennas = channels_BKM.shape
        at = f"at each of {len(self._snrs_db)} SNRs"
        return [(f"{users} users x {antennas} antennas, {at} -> ", False), (f"a beam for each user {at}", True)]

    def loss_rows(self, labels: torch.Tensor) -> None:
        """Returns None: the rate of a user depends on the beams of all."""

    def loss(
        self, output: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor | None = None, *, training: bool = False
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Returns the sum of `missing_rates`, in bit/s per Hz, and what is measured: sum rates by SNR, also of other precoders."""
        channels_BKM, noise_B = channels_of(labels)
        rates_B = sum_rates(channels_BKM, beams_of(output), noise_B[:, None])
        missing = (single_rates(channels_BKM, noise_B) - rates_B).sum()
        return missing, {} if training else self._measured(channels_BKM, noise_B, rates_B.detach())

    def _measured(self, channels_BKM: torch.Tensor, noise_B: torch.Tensor, rates_B: torch.Tensor) -> dict[str, float]:
        sums: dict[str, float] = {}
        for snr_db in self._snrs_db:
            here_B = torch.isclose(noise_B, torch.tensor(noise_at(snr_db)), rtol=1e-4)
            if here_B.any():
                sums |= sums_at(
                    snr_db,
                    {MODEL: float(rates_B[here_B].sum())} | classical(channels_BKM[here_B], snr_db),
                    int(here_B.sum()),
                )
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
    return {name: float(sum_rates(wide_BKM, one, downlink.noise).sum()) for name, one in beams.items()}
