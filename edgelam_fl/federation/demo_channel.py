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
from edgelam_fl.federation.template import in_fork
from edgelam_fl.telemetry.report.over_time import OverTime
from edgelam_fl.telemetry.waiting import waiting
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
base = "last"

[federation]
rounds = 5
local_steps = 30
batch_size = 4

[data]
held_out = 0.2

[optimizer]
lr = 4e-3
schedule = "linear"
"""
LINKS = 96  # of each station
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
    from edgelam_fl.telemetry.report.over_time import write_over_time
    from edgelam_fl.telemetry.report.page import write_report

    with waiting(console, "predicting one held-out link"):
        shown = in_fork(_over_time, config, folder / "adapter", files[0])
    if shown is not None:
        write_over_time(folder, shown)
        write_report(folder)
    said = (
        "its page has the error by speed, beside the methods to compare with, and one held-out link over time. An untrained model repeats "
        'the last value; autoregressions, which learn nothing, stay ahead of so short a training, and radio.base = "autoregressions" begins '
        "with them"
    )
    console.print(said, highlight=False, soft_wrap=True)


def _over_time(config: RunConfig, adapter: Path, file: Path) -> OverTime | None:
    """Returns a channel over time; what it takes is imported in the process that predicts it."""
    from edgelam_fl.serving.over_time import channel_over_time

    return channel_over_time(config, adapter, file)


CHANNEL = Demo(
    run_file=RUN_FILE,
    device="station",
    gathering="drawing radio channels",
    write_data=_write_data,
    show_result=_show_result,
    node_bytes=1100 << 20,
)
