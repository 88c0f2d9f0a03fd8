"""The radio channel of a private run, emulated: the wireless model's gains, the power rule, and noise that the server adds.

Real links carry the updates without an error, so the receiver's noise is drawn where they arrive. The promise holds for whoever
sees what arrives over such a channel; the server of this run sees more. Knows no tensors and no messages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgelam_fl.config import WirelessSection
from edgelam_fl.privacy.channel import Channel, Exposure, Sending, most_scale, sending
from edgelam_fl.telemetry.events import ChannelNoise
from edgelam_fl.wireless.cell import RadioCell


@dataclass
class RoundOnAir:
    """The updates of one attempt at a round: how each was sent, and what it has given away."""

    cell: RadioCell
    round: int
    limit: float
    """The largest scale that a device's power allows."""
    noise: float
    """The least standard deviation that must arrive."""
    moves: float
    """How far one device's data can move its update, an L2 norm."""
    exposure: Exposure
    sent: dict[str, Sending] = field(default_factory=dict)

    def send(self, device: str) -> float:
        """Counts one update of a device as sent; returns the standard deviation of the noise that it arrives with."""
        channel = Channel(math.sqrt(self.cell.gain(device, self.round)), math.sqrt(self.cell.noise_w))
        self.sent[device] = sending(channel, self.limit, self.noise)
        self.exposure.add(device, self.sent[device].noise / self.moves)
        return self.sent[device].noise


class EmulatedChannel:
    """The channel of a run, and what each device has given away over it."""

    def __init__(self, settings: WirelessSection, seed: int, exposure: Exposure) -> None:
        """`seed`: the run's, which draws places and fading as for the run's virtual time."""
        self._cell, self._exposure = RadioCell(settings, seed), exposure

    def state(self) -> dict[str, Any]:
        """Returns what every device has given away so far, as plain data."""
        return self._exposure.state()

    def restore(self, state: Mapping[str, Any], more: float) -> None:
        """Takes what `state` returned. `more`: sum of 1/z_t^2 that any device may have given away since then."""
        self._exposure.restore(state, more)

    def in_round(self, round: int, *, values: int, clip: float, noise: float, moves: float) -> RoundOnAir:
        """Returns the channel of one attempt at a round.

        `values`: numbers in an update, one symbol each. `clip`: the L2 norm that it may have. `noise`, `moves`: in clips, the
        least standard deviation that must arrive, and how far one device's data can move the update.
        """
        limit = most_scale(self._cell.power_w, values, clip)
        return RoundOnAir(self._cell, round, limit, noise * clip, moves * clip, self._exposure)

    def event(self, attempt: int, air: RoundOnAir) -> ChannelNoise:
        """Makes the event of an attempt."""
        noises = [sent.noise / air.noise for sent in air.sent.values()]
        return ChannelNoise(
            round=air.round,
            attempt=attempt,
            devices=len(air.sent),
            lowered=sum(sent.lowered for sent in air.sent.values()),
            most_over_needed=max(noises, default=1.0),
            epsilon=self._exposure.largest,
        )
