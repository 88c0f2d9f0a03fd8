"""Noise of the radio channel as differential privacy (arXiv 2411.07806): what arrives, and with how much power it is sent.

A device multiplies its clipped update by a scale s and sends one value per symbol; y = |h| s x + n arrives, with the receiver's
noise n ~ N(0, sigma^2), and the receiver divides by |h| s. So the update has noise of sigma / (|h| s): the more power, the less
privacy. A device whose channel is too good for what is promised sends with less power, and nobody adds artificial noise.

Knows numbers. Does not know where devices are or what their channels carry (`edgelam_fl.wireless`), nor when a budget is spent.
The power rule in closed form is our derivation from the Renyi divergence of the Gaussian mechanism (arXiv 1702.07476, prop. 7).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgelam_fl.privacy.accounting import Releases, epsilon_of


@dataclass(frozen=True)
class Channel:
    """A device's channel in one round."""

    amplitude: float
    """|h|: received over sent amplitude, the square root of the power gain."""
    noise: float
    """sigma: standard deviation of the receiver's noise per symbol, the square root of watts."""

    def arriving(self, scale: float) -> float:
        """Returns the standard deviation of the noise on an update that was sent with this scale."""
        return self.noise / (self.amplitude * scale)

    def scale_for(self, noise: float) -> float:
        """Returns the scale with which an update arrives with a noise of this standard deviation."""
        return self.noise / (self.amplitude * noise)


@dataclass(frozen=True)
class Sending:
    """The way in which a device sends its update in one round."""

    scale: float
    """s: square roots of watts per unit of the update."""
    lowered: bool
    """Whether the device sends with less power than it may."""
    noise: float
    """Standard deviation of the noise on each value that arrives."""


def most_scale(power_w: float, values: int, clip: float) -> float:
    """Returns the largest scale that keeps a device's mean power per symbol, whatever update it has.

    An update of `values` values has an L2 norm of at most `clip`, so sending it takes at most (s clip)^2 / values watts.
    """
    return math.sqrt(power_w * values) / clip


def noise_of_renyi(divergence: float, order: float, sensitivity: float) -> float:
    """Returns the least standard deviation whose Renyi divergence of this order is at most `divergence` in a round.

    From order sensitivity^2 / (2 sigma^2) <= divergence. `sensitivity`: how far two neighbouring data sets move an update.
    """
    return sensitivity * math.sqrt(order / (2 * divergence))


def sending(channel: Channel, limit: float, noise: float) -> Sending:
    """Applies the power rule s = min(limit, sigma / (|h| noise)). `noise`: the least standard deviation that must arrive.

    With the noise of `noise_of_renyi`, that is s = min(limit, sigma sqrt(2 eps / alpha) / (|h| sensitivity)).
    """
    enough = channel.scale_for(noise)
    if enough < limit:
        return Sending(enough, True, noise)
    return Sending(limit, False, channel.arriving(limit))


@dataclass
class Exposure:
    """What each device's arrived updates have given away, in rounds of unlike noise.

    Gaussian releases of multipliers z_t tell as much together as one release of 1/z^2 = sum 1/z_t^2.
    """

    delta: float
    accountant: str
    earlier: float = 0.0
    """Sum of 1/z_t^2 that any device may have had before this was kept: of a run that goes on."""
    _precision: dict[str, float] = field(default_factory=dict)  # by device: sum of 1/z_t^2

    def add(self, device: str, multiplier: float) -> None:
        """Counts one update. `multiplier`: standard deviation of its noise, over what one device's data can move."""
        self._precision[device] = self._precision.get(device, self.earlier) + multiplier**-2

    def state(self) -> dict[str, Any]:
        """Returns what every device has given away so far, as plain data."""
        return {"earlier": self.earlier, "precision": dict(self._precision)}

    def restore(self, state: Mapping[str, Any], more: float) -> None:
        """Takes what `state` returned. `more`: sum of 1/z_t^2 that any device may have had since then."""
        self.earlier = state["earlier"] + more
        self._precision = {device: known + more for device, known in state["precision"].items()}

    def epsilon(self, device: str) -> float:
        """Returns the epsilon of one device; 0 if nothing of it can have arrived."""
        return self._of(self._precision.get(device, self.earlier))

    @property
    def largest(self) -> float:
        """The epsilon of the device that has given away most."""
        return self._of(max(self._precision.values(), default=self.earlier))

    def _of(self, precision: float) -> float:
        if not precision:
            return 0.0
        return epsilon_of(Releases(precision**-0.5, rounds=1), self.delta, self.accountant)
