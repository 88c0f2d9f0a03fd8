"""Measures what a training loses beside floods at its host's data port: 10,000 half-open streams and 100,000 PINGs a run.

A device and its host train in processes of their own, run after run, every second run beside the floods (`tests.floods`, a
process of the lowest priority), so that whatever else the machine does meets both kinds alike. Attacker and trainers share the
cores, which an attacker elsewhere would not: the bar is on the processor time of the two trainers alone, in which the host's
work on the floods is contained and the attacker's own is not. Time by the clock, in which both are, stands beside it.
--smoke: one pair of runs of a tiny random model, 500 streams and 2,000 PINGs.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Figure, main
from edgelam_fl.config import RunConfig
from edgelam_fl.model.source import ModelSource, find_model
from tests.fleet import check_done
from tests.fuzz import resident_bytes
from tests.parity.daemons import Daemon, running
from tests.parity.test_grpc_processes import fleet_of
from tests.support import cpu_seconds, run_config, write_data_files, write_tiny_llama

PAIRS, STEPS, STREAMS, PINGS = 3, 20, 10_000, 100_000
BAR_PERCENT, MOST_MIB = 5.0, 64.0
ATTACK_S = 300.0


@dataclass
class Run:
    """The cost of one run."""

    cpu_s: float  # processor time of device and host
    train_s: float  # by the device's clock
    host_bytes: int  # resident memory of the host after it
    attack: dict[str, float]


def measure(smoke: bool) -> tuple[dict[str, Any], list[Figure]]:
    pairs, steps, streams, pings = (1, 2, 500, 2000) if smoke else (PAIRS, STEPS, STREAMS, PINGS)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_data_files(folder)
        model = find_model(str(write_tiny_llama(folder / "tiny")) if smoke else "smollm2-135m")
        config = run_config(model.name)
        with running(["edge-1"], files[:1], folder / "daemons") as daemons:
            _run(daemons, "warm", model, config, steps, 0, 0)
            runs = [
                (_run(daemons, f"quiet-{n}", model, config, steps, 0, 0), _run(daemons, f"flooded-{n}", model, config, steps, streams, pings))
                for n in range(pairs)
            ]  # fmt: skip
    settings = {
        "model": model.name,
        "pairs": pairs,
        "steps": steps,
        "streams": streams,
        "pings": pings,
        "attacks": [flooded.attack for _, flooded in runs],
    }
    return settings, _figures(runs, smoke)


def _figures(runs: list[tuple[Run, Run]], smoke: bool) -> list[Figure]:
    cpu = [100 * (flooded.cpu_s / quiet.cpu_s - 1) for quiet, flooded in runs]
    clock = [100 * (flooded.train_s / quiet.train_s - 1) for quiet, flooded in runs]
    grown = (max(flooded.host_bytes for _, flooded in runs) - runs[0][0].host_bytes) / 2**20
    loss = statistics.median(cpu)
    return [
        Figure(
            "processor time of device and host beside the floods, over without, median of the pairs", round(loss, 2), "%",
            None if smoke else f"at most {BAR_PERCENT:g} %", None if smoke else loss <= BAR_PERCENT,
        ),
        Figure("the same, lowest and highest pair apart", round(max(cpu) - min(cpu), 2), "%"),
        Figure("time by the clock, which the attacker's own work is in, median of the pairs", round(statistics.median(clock), 2), "%"),
        Figure("the same, lowest and highest pair apart", round(max(clock) - min(clock), 2), "%"),
        Figure("processor time of a run without floods", round(statistics.median(q.cpu_s for q, _ in runs), 2), "s"),
        Figure("processor time of a run beside the floods", round(statistics.median(f.cpu_s for _, f in runs), 2), "s"),
        Figure("processor time of the attacker", round(statistics.median(f.attack["cpu_s"] for _, f in runs), 2), "s"),
        Figure("half-open streams per run", statistics.median(f.attack["streams"] for _, f in runs), ""),
        Figure("host's resident memory after the last flood", round(grown, 1), "MiB", f"at most {MOST_MIB:g} MiB", grown <= MOST_MIB),
    ]  # fmt: skip


def _run(
    daemons: dict[str, Daemon], name: str, model: ModelSource, config: RunConfig, steps: int, streams: int, pings: int
) -> Run:
    fleet, start = fleet_of(daemons, name, model, config, 1)
    pids = [daemons[node].child.pid for node in ("edge-1", "device-1")]
    before = sum(map(cpu_seconds, pids))
    attacker = None
    if streams:
        command = [sys.executable, "-m", "tests.floods", daemons["edge-1"].address(), str(streams), str(pings)]
        attacker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    reports = fleet.run(start, steps)
    check_done(reports)
    attack = json.loads(attacker.communicate(timeout=ATTACK_S)[0]) if attacker is not None else {}
    cpu_s = sum(map(cpu_seconds, pids)) - before
    return Run(cpu_s, reports["device-1"].train_seconds, resident_bytes(pids[0]), attack)


if __name__ == "__main__":
    main("floods", measure)
