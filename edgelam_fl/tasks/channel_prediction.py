"""Channel prediction: makes rows of a link's series, and a loss sum of predicted corrections. Knows no stages and no run.

An example is one link of a base station: its strong series are what tokens are in a text, so that layers attend across them. Its
loss is its error over the energy of its channel without noise, as the sum over series that `wireless.prediction.rows` describes.
Noise is on what is seen alone, from the run's seed and the link's content.

Shapes: B rows, T series, N series with labels, O parts of what is predicted, L columns of labels, K series of one link, A slots,
F subcarriers, M ports.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
import numpy.typing as npt
import torch

from edgelam_fl.errors import DataError
from edgelam_fl.tasks.arrays import Sample, place_of
from edgelam_fl.tasks.base import Made, Unit, ValueExample, real_rows, value_units
from edgelam_fl.tasks.points import MODEL, sums_at
from edgelam_fl.tasks.radio import DELAY_BINS, RadioTaskSettings
from edgelam_fl.wireless.channels.links import unit_power, with_noise
from edgelam_fl.wireless.prediction.extrapolation import last_value, own_history
from edgelam_fl.wireless.prediction.rows import Strong, corrections, error_of, inputs_of, over_time, strong_series
from edgelam_fl.wireless.prediction.score import errors

_ORDER = 8  # of the autoregression to compare with, at most half of the slots seen
_ARS, _CARRIED, _LAST = "mean of subspace ARs", "mean of carried ARs", "last value of each series"  # what is corrected
_CHUNK = 64  # links whose series are found together
_SPEED_STEP_KMH = 10.0  # errors are said by speed, rounded to such steps

# Columns of labels after those of the parts. What belongs to a link as a whole stands in the row of its first series, with zeros in
# the others, so that sums over any rows are right; the errors of the methods to compare with follow.
_WEIGHT, _SPEED, _REMAINING, _FIRST, _OTHERS = range(5)


class ChannelPrediction:
    """Predicts a link's next slots from slots with noise, of the same band (TDD) or of the other one (FDD)."""

    def __init__(self, tokenizer_folder: Path, settings: RadioTaskSettings) -> None:
        """The folder is not used: there is no text."""
        self._radio, self._parts = settings.radio, 2 * settings.radio.future_slots
        self._noise_power = 10 ** (-self._radio.snr_db / 10)
        self._is_fdd = self._radio.duplex == "fdd"
        self._base_is_last = self._radio.base == "last"
        # The last one is what is corrected: a model that is not trained has its error.
        corrected = _CARRIED if self._is_fdd else _LAST if self._base_is_last else _ARS
        self._others = ("last value", f"AR({_ORDER})", *([_ARS] if self._base_is_last else []), corrected)

    def examples(self, samples: Sequence[Sample]) -> Made:
        """Makes an example of each link. Raises DataError for one with too few slots, too many subcarriers, or without its other band."""
        chunks = [samples[first : first + _CHUNK] for first in range(0, len(samples), _CHUNK)]
        return Made([example for chunk in chunks for example in self._examples(chunk)])

    def _examples(self, samples: Sequence[Sample]) -> list[ValueExample]:
        ahead = self._radio.future_slots
        seen, whole = zip(*map(self._slots, samples), strict=True)
        seen_NTFM, future_NAFM = np.stack(seen), np.stack(whole)[:, self._radio.history_slots :]
        links = self._strong(seen_NTFM)
        order = min(_ORDER, self._radio.history_slots // 2)
        others = [last_value(seen_NTFM, ahead), own_history(seen_NTFM, order, ahead)]
        found = [errors(predicted, future_NAFM) for predicted in others]
        if self._base_is_last:
            each = zip(links, future_NAFM, strict=True)
            found.append(np.array([error_of(link, link.mean_PA, future_AFM) for link, future_AFM in each]))
        others_NC = np.stack(found, axis=1)
        speeds_N = [_SPEED_STEP_KMH * round(float(sample.arrays["speed_kmh"]) / _SPEED_STEP_KMH) for sample in samples]
        labels = map(_labels, links, future_NAFM, speeds_N, others_NC)
        return [
            ValueExample(inputs_of(link, self._noise_power), each, 1) for link, each in zip(links, labels, strict=True)
        ]

    def over_time(self, sample: Sample, given_KO: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], ...]:
        """Returns a link's strongest series as heard, true, and predicted before and with a model's corrections; as `rows.over_time`."""
        seen_TFM, whole_SFM = self._slots(sample)
        (link,) = self._strong(seen_TFM[None])
        return over_time(link, whole_SFM, given_KO)

    def _strong(self, seen_NTFM: npt.NDArray[np.complex64]) -> list[Strong]:
        radio = self._radio
        return strong_series(
            seen_NTFM, self._noise_power, radio.future_slots, radio.series, other_band=self._is_fdd, base=radio.base
        )

    def _slots(self, sample: Sample) -> tuple[npt.NDArray[np.complex64], npt.NDArray[np.complex64]]:
        """Returns a link's slots that are seen, with noise, and all slots of the predicted band, without, at the same power."""
        radio, place = self._radio, place_of(sample.number)
        slots, subcarriers, _ = sample.arrays["up"].shape
        if slots < radio.history_slots + radio.future_slots:
            raise DataError(
                f"{place} has {slots} slots; radio.history_slots + radio.future_slots = {radio.history_slots + radio.future_slots} "
                "are needed", "axes", place,
            )  # fmt: skip
        if subcarriers > DELAY_BINS:
            raise DataError(f"{place} has {subcarriers} subcarriers; at most {DELAY_BINS} are allowed", "axes", place)
        if self._is_fdd and "down" not in sample.arrays:
            raise DataError(
                f"{place}: radio.duplex = 'fdd' predicts the array 'down', which the data lacks", "missing-field", place
            )
        bands = [sample.arrays[band] for band in ("up", "down") if band in sample.arrays]
        both = unit_power(np.concatenate(bands, axis=1)[None])
        seed = Random(f"{radio.seed}/noise/{sample.digest}").getrandbits(32)
        seen_NTFM = with_noise(both[:, : radio.history_slots, :subcarriers], radio.snr_db, seed)
        predicted = both[0, :, -subcarriers:] if self._is_fdd else both[0, :, :subcarriers]
        return seen_NTFM[0], predicted[: radio.history_slots + radio.future_slots]

    def units(self, examples: Sequence[ValueExample], pieces: int) -> list[Unit]:
        return value_units(examples, pieces)

    def seen(self, example: ValueExample) -> list[tuple[str, bool]]:
        radio = self._radio
        beside = "" if self._base_is_last else " beside autoregressions"
        seen = f"{example.length} series of {radio.history_slots} slots at {radio.snr_db:g} dB{beside} -> "
        return [
            (seen, False),
            (f"{radio.future_slots} slots of {'the other' if self._is_fdd else 'the same'} band", True),
        ]

    def loss_rows(self, labels: torch.Tensor) -> torch.Tensor | None:
        return real_rows(labels)

    def loss(
        self, output: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor | None = None, *, training: bool = False
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Returns the sum of the links' errors over their energies; if it is only measured, also by speed, beside other methods."""
        rows_N = real_rows(labels) if rows is None else rows
        labels_NL = labels.flatten(0, 1)[rows_N.to(labels.device)].to(output.device)
        wanted_NO, of_link_NL = labels_NL[:, : self._parts], labels_NL[:, self._parts :]
        distances_N = (output.float() - wanted_NO).square().sum(1)
        errors_N = of_link_NL[:, _WEIGHT] * distances_N + of_link_NL[:, _REMAINING]
        return errors_N.sum(), {} if training else self._by_speed(errors_N.detach(), of_link_NL)

    def _by_speed(self, errors_N: torch.Tensor, of_link_NL: torch.Tensor) -> dict[str, float]:
        sums: dict[str, float] = {}
        for speed in of_link_NL[:, _SPEED].unique().tolist():
            at = of_link_NL[:, _SPEED] == speed
            totals = of_link_NL[at].double().sum(0).tolist()
            others = dict(zip(self._others, totals[_OTHERS:], strict=True))
            sums |= sums_at(speed, {MODEL: float(errors_N[at].double().sum()), **others}, round(totals[_FIRST]))
        return sums


def _labels(
    link: Strong, future_AFM: npt.NDArray[np.complex64], speed_kmh: float, others_C: npt.NDArray[np.float64]
) -> npt.NDArray[np.float32]:
    """Returns a link's labels, `[K, L]`. `others_C`: the errors of the methods to compare with, but for what is corrected."""
    wanted_KO, weights_K, remaining = corrections(link, future_AFM)
    corrected = remaining + float(weights_K @ np.sum(wanted_KO**2, axis=1))
    of_link_KL = np.zeros((len(weights_K), _OTHERS + len(others_C) + 1), np.float32)
    of_link_KL[:, _WEIGHT], of_link_KL[:, _SPEED] = weights_K, speed_kmh
    of_link_KL[0, _REMAINING:] = [remaining, 1.0, *others_C, corrected]
    return np.concatenate([wanted_KO, of_link_KL], axis=1)
