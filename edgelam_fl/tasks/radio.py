"""The radio tasks as plain data: which arrays they read, and the sizes of what they put around a model. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from edgelam_fl.array_files import Array
from edgelam_fl.model.value_ends import OwnNetwork, ValueEnds
from edgelam_fl.tasks.arrays import SAMPLES

_BAND = (SAMPLES, "slots", "subcarriers", "ports")
DIRECTIONS, DELAY_BINS = 8, 48  # spatial eigenvectors and delay bins that a series may be of
_AUTOREGRESSIONS = 5  # whose predictions stand beside a series


class RadioSettings(Protocol):
    """The settings of a radio task, as in a run file's [radio] section and in a plan."""

    @property
    def snr_db(self) -> float: ...
    @property
    def history_slots(self) -> int: ...
    @property
    def future_slots(self) -> int: ...
    @property
    def series(self) -> int: ...
    @property
    def duplex(self) -> str: ...
    @property
    def base(self) -> str: ...
    @property
    def beam_snrs_db(self) -> Sequence[float]: ...
    @property
    def pilot_snrs_db(self) -> Sequence[float]: ...


class SeededRadio(RadioSettings, Protocol):
    """These settings and the seed of the noise, as in a plan."""

    @property
    def seed(self) -> int: ...


class RadioTaskSettings(Protocol):
    """The settings of a radio task in a plan."""

    @property
    def radio(self) -> SeededRadio: ...


CHANNELS = (
    Array("up", _BAND),
    Array("down", _BAND, required=False),
    Array("speed_kmh", (SAMPLES,), is_complex=False),
)
"""Channels of the band that is heard and of the other one, as `edgelam_fl.wireless.channels.store` keeps them, and speeds."""


def channel_ends(settings: RadioSettings) -> ValueEnds:
    """Returns the sizes for channel prediction: a series' past slots and power in, its future slots out.

    What autoregressions predict goes in too, but with `base = "last"`.
    """
    outputs = 2 * settings.future_slots
    features = 2 * settings.history_slots + 1 + (0 if settings.base == "last" else _AUTOREGRESSIONS * outputs)
    return ValueEnds(features, outputs, (DIRECTIONS, DELAY_BINS))


CELLS = (Array("channels", (SAMPLES, "users", "antennas")),)
"""Channels of all users of a cell at once, in units in which a user at the SNR of the run file has power 1 per antenna."""

BEAMFORMER = "beamformer"  # model.name of the network for beams


def beam_network(_: RadioSettings) -> OwnNetwork:
    """Returns the network for beamforming."""
    return OwnNetwork("edgelam_fl.wireless.beamforming.values:BeamModel", weights=50_056)
