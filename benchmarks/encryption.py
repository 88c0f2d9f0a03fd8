"""Measures what mutual TLS costs a training: the same steps over loopback, encrypted and in plain text, in interleaved pairs.

A device and its host train in processes of their own, one pair of processes with keys and one without. --smoke: one pair of
runs of a tiny random model, one step.
"""

from __future__ import annotations

import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Figure, main
from edgelam_fl.config import RunConfig
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.trust.authority import Authority
from tests.fleet import check_done
from tests.parity.daemons import Daemon, running
from tests.parity.test_grpc_processes import fleet_of
from tests.support import cpu_seconds, run_config, write_data_files, write_tiny_llama

PAIRS, STEPS, BAR = 5, 4, 0.97


def measure(smoke: bool) -> tuple[dict[str, Any], list[Figure]]:
    pairs, steps = (1, 1) if smoke else (PAIRS, STEPS)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, ExitStack() as processes:
        folder = Path(name)
        files = write_data_files(folder)
        model = find_model(str(write_tiny_llama(folder / "tiny")) if smoke else "smollm2-135m")
        config = run_config(model.name, "task.max_tokens=128")
        nodes = {
            kind: processes.enter_context(running(["edge-1"], files[:1], folder / kind, authority))
            for kind, authority in {"plain": None, "encrypted": Authority.open(folder / "trust")}.items()
        }
        for kind, daemons in nodes.items():
            _run(daemons, f"warm-{kind}", model, config, steps)
        runs = [
            {kind: _run(nodes[kind], f"{kind}-{n}", model, config, steps) for kind in _order(n)} for n in range(pairs)
        ]
    by_clock, by_cpu = ([each["encrypted"][i] / each["plain"][i] for each in runs] for i in (0, 1))
    loss = statistics.median(by_clock)
    return {"model": model.name, "pairs": pairs, "steps": steps}, [
        Figure(
            "tokens per second encrypted, over plain, median of the pairs", round(loss, 3), "",
            None if smoke else f"at least {BAR:g}", None if smoke else loss >= BAR,
        ),
        Figure("the same, lowest and highest pair apart", round(max(by_clock) - min(by_clock), 3), ""),
        Figure("tokens per processor second encrypted, over plain, median of the pairs", round(statistics.median(by_cpu), 3), ""),
        Figure("tokens per second in plain text", round(statistics.median(each["plain"][0] for each in runs), 1), ""),
        Figure("tokens per second encrypted", round(statistics.median(each["encrypted"][0] for each in runs), 1), ""),
    ]  # fmt: skip


def _order(pair: int) -> tuple[str, str]:
    """Returns which kind is measured first in a pair: each is first in every second pair."""
    return ("plain", "encrypted") if pair % 2 else ("encrypted", "plain")


def _run(
    daemons: dict[str, Daemon], name: str, model: ModelSource, config: RunConfig, steps: int
) -> tuple[float, float]:
    """Trains; returns tokens per second by the device's clock, and per processor second of device and host."""
    fleet, start = fleet_of(daemons, name, model, config, 1)
    pids = [daemons[node].child.pid for node in ("edge-1", "device-1")]
    before = sum(map(cpu_seconds, pids))
    reports = fleet.run(start, steps)
    check_done(reports)
    report = reports["device-1"]
    cpu_s = sum(map(cpu_seconds, pids)) - before
    return report.tokens_trained / report.train_seconds, report.tokens_trained / cpu_s


if __name__ == "__main__":
    main("encryption", measure)
