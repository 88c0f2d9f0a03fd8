"""The channels of sectors in which a base station serves several users at once, drawn from sums of plane waves; numpy alone.

A user's waves leave the base station around the user's own direction, so users of a narrow sector are hard to tell apart; some
users are near and some are far. Time and frequency are left out: `paths` has them. Shapes: N draws, K users, M antennas.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgelam_fl.errors import ConfigError

WAVES = 24  # of each user
HALF_WAVE = np.pi  # phase between neighbouring antennas, for a wave along their line


@dataclass(frozen=True)
class Sector:
    """One sector: a line of antennas half a wavelength apart, and where its users are."""

    antennas: int = 8
    users: int = 8
    sector_deg: float = 60.0
    """Users are in directions up to this far from straight ahead, to both sides."""
    spread_deg: float = 10.0
    """Standard deviation of a user's waves around its direction."""
    shadow_db: float = 4.0
    """Standard deviation of the users' mean power, whose median is 1."""

    def __post_init__(self) -> None:
        if min(self.antennas, self.users) < 1:
            raise ConfigError(f"a sector of {self.users} users and {self.antennas} antennas: at least one of each")
        if not (0 <= self.sector_deg <= 90 and 0 <= self.spread_deg <= 180 and 0 <= self.shadow_db <= 30):
            raise ConfigError(
                f"sector_deg = {self.sector_deg:g} must be 0 to 90, spread_deg = {self.spread_deg:g} 0 to 180, shadow_db = {self.shadow_db:g} 0 to 30"
            )

    def draw(self, count: int, seed: int) -> npt.NDArray[np.complex64]:
        """Returns channels [N, K, M]; the same ones for the same seed."""
        random = np.random.default_rng(seed)
        shape_NK1 = (count, self.users, 1)
        spread_rad = np.deg2rad(self.spread_deg) / np.sqrt(2)
        angle_NKP = np.deg2rad(random.uniform(-self.sector_deg, self.sector_deg, shape_NK1))
        angle_NKP = angle_NKP + random.laplace(0, spread_rad, (count, self.users, WAVES))
        parts = random.standard_normal((2, count, self.users, WAVES)) / np.sqrt(2 * WAVES)
        power_NK1 = 10 ** (self.shadow_db / 10 * random.standard_normal(shape_NK1))
        steering_NKPM = np.exp(1j * HALF_WAVE * np.sin(angle_NKP)[..., None] * np.arange(self.antennas))
        channels_NKM = np.einsum("nkp,nkpm->nkm", parts[0] + 1j * parts[1], steering_NKPM) * np.sqrt(power_NK1)
        return channels_NKM.astype(np.complex64)
