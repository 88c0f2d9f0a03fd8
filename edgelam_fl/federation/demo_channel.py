"""The demo of radio channels: base stations in unlike cells train one model that predicts channels.

Knows its run file and its links, which need no download and no further package; `federation.demo` runs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from edgelam_fl.config import RunConfig
from edgelam_fl.federation.demo import Demo
from edgelam_fl.wireless.channels.links import station_seed
from edgelam_fl.wireless.channels.paths import Paths

RUN_FILE = """\
[model]
base = "bf16"
layers = 4

[split]
front = 1
back = 1

[task]
kind = "channel-prediction"

[radio]
series = 32

[federation]
rounds = 3
local_steps = 8
batch_size = 4

[data]
held_out = 0.25

[optimizer]
lr = 2e-4
schedule = "linear"
"""
LINKS = 48  # of each station
DELAY_SPREADS_NS = (363.0, 100.0, 1000.0)  # of the stations' cells in turn: urban, small, hilly
SEED = 1


def _write_data(folder: Path, devices: int) -> tuple[Sequence[Path], str]:
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"station-{number}.npz" for number in range(1, devices + 1)]
    for number, file in enumerate(files):
        spread_ns = DELAY_SPREADS_NS[number % len(DELAY_SPREADS_NS)]
        links = Paths(LINKS, station_seed(SEED, file.stem), delay_spread_ns=spread_ns).draw()
        np.savez(file, up=links.up_NTFM, speed_kmh=links.speed_kmh)
    return files, f"{LINKS} links of users at 10 to 100 km/h per station, drawn with another delay spread in each cell"


def _show_result(console: Console, config: RunConfig, folder: Path, files: Sequence[Path]) -> None:
    said = (
        "its page has the error by speed, beside the methods to compare with; an untrained model corrects nothing of the mean of "
        "autoregressions, and so short a training hardly changes it"
    )
    console.print(said, highlight=False, soft_wrap=True)


CHANNEL = Demo(
    run_file=RUN_FILE,
    device="station",
    gathering="drawing radio channels",
    write_data=_write_data,
    show_result=_show_result,
    node_bytes=1100 << 20,
)
