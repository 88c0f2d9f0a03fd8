"""The urban macro cell of 3GPP TR 38.901 as links, by the package sionna-no-rt of the extra `radio`.

Users are in one sector of 120 degrees, 50 to 300 m from a base station at 25 m. Both bands see the same paths. Path loss and
shadowing are left out, since each link is scaled to power 1. The package takes four seconds to import.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgelam_fl.errors import EnvironmentProblem
from edgelam_fl.wireless.channels.links import (
    CARRIER_HZ,
    SLOT_S,
    SLOTS,
    SPEEDS_KMH,
    Links,
    check_drawn,
    frequencies_hz,
    links_of,
)

NEAREST_M, FARTHEST_M = 50.0, 300.0
STATION_HEIGHT_M, USER_HEIGHT_M = 25.0, 1.5
SECTOR_RAD = 2 * np.pi / 3
BATCH = 50  # links that are drawn together; another number gives other links


@dataclass(frozen=True)
class UrbanMacro:
    """The links of one base station in an urban macro cell. `sight`: no link has line of sight, each has, or as the model draws."""

    count: int
    seed: int
    speeds_kmh: tuple[float, ...] = SPEEDS_KMH
    sight: Literal["none", "all", "drawn"] = "none"

    def __post_init__(self) -> None:
        check_drawn(self.count, self.speeds_kmh)

    def draw(self) -> Links:
        """Returns the links; the same ones each time. Raises EnvironmentProblem without the package."""
        with _seeded(self.seed) as random:
            model = _model()
            speed_kmh = random.choice(np.asarray(self.speeds_kmh), self.count)
            batches = [speed_kmh[n : n + BATCH] for n in range(0, self.count, BATCH)]
            parts = [links_of(_batch(model, random, speeds, self.sight), speeds) for speeds in batches]
        up, down = (np.concatenate([getattr(part, band) for part in parts]) for band in ("up_NTFM", "down_NTFM"))
        return Links(up, down, speed_kmh.astype(np.float32))


@contextmanager
def _seeded(seed: int) -> Iterator[np.random.Generator]:
    """Seeds the package's own random numbers, and leaves those of torch as they were."""
    try:
        from sionna.phy import config
    except ImportError as error:
        raise EnvironmentProblem(
            "channels of 3GPP TR 38.901 need the package sionna-no-rt, which is not installed: "
            "pip install 'edgelam-fl[radio]'; the generator \"paths\" needs nothing",
            "its channels need the package sionna-no-rt, which is not installed",
        ) from error
    import torch

    with torch.random.fork_rng():
        config.seed = seed
        yield config.np_rng


def _model() -> Any:
    from sionna.phy.channel.tr38901 import PanelArray, UMa

    station = PanelArray(
        num_rows_per_panel=4, num_cols_per_panel=4, polarization="dual", polarization_type="cross",
        antenna_pattern="38.901", carrier_frequency=CARRIER_HZ,
    )  # fmt: skip
    user = PanelArray(
        num_rows_per_panel=1, num_cols_per_panel=1, polarization="single", polarization_type="V",
        antenna_pattern="omni", carrier_frequency=CARRIER_HZ,
    )  # fmt: skip
    return UMa(CARRIER_HZ, "low", user, station, "downlink", enable_pathloss=False, enable_shadow_fading=False)


def _batch(
    model: Any, random: np.random.Generator, speed_kmh: npt.NDArray[np.float64], sight: str
) -> npt.NDArray[np.complex64]:
    """Returns channels over both bands, `[N, T, 2F, M]`, from the paths' gains and delays."""
    import torch

    count = len(speed_kmh)
    far_m = np.sqrt(random.uniform(NEAREST_M**2, FARTHEST_M**2, count))  # uniform over the area
    azimuth = random.uniform(-SECTOR_RAD / 2, SECTOR_RAD / 2, count)
    heading, speed_m_s = random.uniform(0, 2 * np.pi, count), speed_kmh / 3.6
    users = _triples(far_m * np.cos(azimuth), far_m * np.sin(azimuth), np.full(count, USER_HEIGHT_M))
    velocity = _triples(speed_m_s * np.cos(heading), speed_m_s * np.sin(heading), np.zeros(count))
    station = torch.tensor([0.0, 0.0, STATION_HEIGHT_M]).repeat(count, 1, 1)
    still = torch.zeros(count, 1, 3)
    indoor, line_of_sight = torch.zeros(count, 1, dtype=torch.bool), {"none": False, "all": True, "drawn": "random"}
    model.set_topology(users, station, still, still.clone(), velocity, indoor, los=line_of_sight[sight])
    gains, delay_s = model(SLOTS, 1 / SLOT_S)  # [N, 1, 1, 1, M, P, T] and [N, 1, 1, P]
    turns_NFP = torch.exp(-2j * np.pi * torch.from_numpy(frequencies_hz())[:, None] * delay_s[:, 0, 0, None])
    return torch.einsum("nmpt,nfp->ntfm", gains[:, 0, 0, 0], turns_NFP.to(gains.dtype)).numpy()


def _triples(*coordinates: npt.NDArray[np.float64]) -> Any:
    """Returns places or velocities as the model takes them: `[N, 1, 3]`."""
    import torch

    return torch.from_numpy(np.stack(coordinates, -1)[:, None]).float()
