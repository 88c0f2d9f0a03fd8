"""The demo of beamforming: cells that differ learn one network for beams, without showing each other their channels.

Knows its run file and its cells; `federation.demo` runs it, and the run's report draws the sum rates.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from edgelam_fl.config import RunConfig
from edgelam_fl.federation.demo import Demo
from edgelam_fl.wireless.channels.links import station_seed
from edgelam_fl.wireless.channels.sectors import Sector

RUN_FILE = """\
[model]
name = "beamformer"

[split]
hosts = 0
micro_batches = 1

[task]
kind = "beamforming"

[data]
held_out = 0.2

[federation]
rounds = 4
local_steps = 40
batch_size = 64

[optimizer]
lr = 2e-3
clip = "global"
"""
SECTORS = (  # in turn, if there are more devices
    Sector(),
    Sector(sector_deg=20.0, spread_deg=5.0),
    Sector(users=6, spread_deg=20.0, shadow_db=8.0),
)
_SAMPLES, _SEED = 240, 1


def _write_data(folder: Path, devices: int) -> tuple[Sequence[Path], str]:
    """Writes a file of channels per cell."""
    folder.mkdir(parents=True, exist_ok=True)
    files, said = [], []
    for number in range(devices):
        cell = SECTORS[number % len(SECTORS)]
        files.append(folder / f"cell-{number + 1}.npz")
        np.savez(files[-1], channels=cell.draw(_SAMPLES, station_seed(_SEED, f"cell-{number + 1}")))
        said.append(f"{cell.users} users within {2 * cell.sector_deg:g} degrees")
    return (
        files,
        f"{_SAMPLES} draws of the channels of each cell, with {SECTORS[0].antennas} antennas and {'; '.join(said)}",
    )


def _show_result(console: Console, config: RunConfig, folder: Path, files: Sequence[Path]) -> None:
    known = "MRT, ZF, RZF and WMMSE"
    beside = "RZF from estimates, and RZF and WMMSE with channels known" if config.radio.pilot_snrs_db else known
    lines = [
        f"its page has the sum rates by SNR, beside {beside}",
        "with your own channels: docs/radio.md says which arrays a cell's file has",
    ]
    console.print("\n".join(lines), highlight=False, soft_wrap=True, markup=False)


BEAMS = Demo(
    run_file=RUN_FILE,
    device="cell",
    gathering="drawing channels",
    write_data=_write_data,
    show_result=_show_result,
    node_bytes=400 << 20,
)
