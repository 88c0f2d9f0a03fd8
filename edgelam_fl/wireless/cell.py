"""A radio cell: where devices are, what their channels carry, how fast they compute, which of them drop out.

Everything is drawn from the run's seed and a device's name (a channel and a dropout also from the round), so nothing depends
on the order in which devices joined or on which other devices there are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, lru_cache
from random import Random

from edgelam_fl.config import WirelessSection

NEAREST_KM = 0.01  # the formula of the path loss holds from this distance on
_LEAST_FADING = 1e-9  # a channel never vanishes


def path_loss_db(distance_km: float) -> float:
    """Returns the path loss of an urban macro cell at 2 GHz (3GPP TR 36.942, 4.5.2)."""
    return 128.1 + 37.6 * math.log10(distance_km)


def watts(power_dbm: float) -> float:
    """Converts dBm to watts."""
    return 10 ** (power_dbm / 10 - 3)


class RadioCell:
    def __init__(self, settings: WirelessSection, seed: int) -> None:
        self.settings, self.seed = settings, seed
        self.power_w = watts(settings.power_dbm)
        self.noise_w = watts(settings.noise_dbm_hz) * settings.bandwidth_hz  # in the whole band
        self.distance_km = cache(self._distance_km)  # drawn once per device: devices do not move
        self.flops = cache(self._flops)
        self.gain = lru_cache(maxsize=100_000)(self._gain)  # needed several times per round

    def _random(self, what: str, name: str) -> Random:
        return Random(f"{self.seed}/{what}/{name}")

    def _distance_km(self, name: str) -> float:
        """Returns the distance to the server, such that devices are uniform over the area of the disc."""
        radius_km, share = self.settings.radius_m / 1000, self._random("place", name).random()
        return math.sqrt(NEAREST_KM**2 + share * max(radius_km**2 - NEAREST_KM**2, 0.0))

    def fading(self, name: str, round: int) -> float:
        """Returns the factor of the received power, constant in a round, with mean 1: Rayleigh fading averaged over the server's antennas.

        With one antenna the time for a payload has no mean: 1 / power is not integrable if power is exponential.
        """
        antennas = self.settings.antennas
        return max(self._random(f"fading/{round}", name).gammavariate(antennas, 1 / antennas), _LEAST_FADING)

    def _gain(self, name: str, round: int) -> float:
        """Returns received power over sent power, the same both ways."""
        return 10 ** (-path_loss_db(self.distance_km(name)) / 10) * self.fading(name, round)

    def snr(self, name: str, round: int) -> float:
        """Returns the signal-to-noise ratio at the server of what the device sends over the whole band."""
        return self.power_w * self.gain(name, round) / self.noise_w

    def downlink_bps(self, name: str, round: int) -> float:
        """Returns the rate of the server's band, which has the same width, if all of it serves this device."""
        snr = watts(self.settings.server_power_dbm) * self.gain(name, round) / self.noise_w
        return self.settings.bandwidth_hz * math.log2(1 + snr)

    def straggles(self, name: str) -> bool:
        """Whether the device is a straggler, for the whole run."""
        return self._random("straggler", name).random() < self.settings.stragglers

    def _flops(self, name: str) -> float:
        """Operations per second: wireless.flops times or over up to speed_spread, log-uniform; stragglers are slower."""
        settings = self.settings
        spread = settings.speed_spread ** self._random("speed", name).uniform(-1, 1)
        return settings.flops * spread / (settings.slowdown if self.straggles(name) else 1.0)

    def compute_joules(self, name: str, operations: float) -> float:
        """Returns the energy kappa C f^2 for C cycles at f Hz."""
        cycles, clock_hz = operations / self.settings.flops_per_cycle, self.flops(name) / self.settings.flops_per_cycle
        return self.settings.kappa * cycles * clock_hz**2

    def dropouts(self, names: Sequence[str], round: int, attempt: int, least: int) -> list[str]:
        """Returns the devices that do not deliver: each with the same probability, but the luckiest `least` always deliver."""
        luck = {name: self._random(f"dropout/{round}/{attempt}", name).random() for name in names}
        unlucky = sorted((name for name in names if luck[name] < self.settings.dropout), key=lambda name: luck[name])
        return sorted(unlucky[: max(0, len(names) - least)])
