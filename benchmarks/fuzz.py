"""Checks that mutated frames, handshakes and calls crash, hang and fill nothing: 100,000 of them, from a seed.

Part one feeds them to links of this process. Part two sends them, over streams of a few frames each, to the data port of a stage
host that is training, and calls the methods of a hub; the training is compared to the bit with the same training in one
process, again and again until the last frame was sent. --smoke: 2,000 in process and 200 at each port.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Figure, main
from edgelam_fl.addresses import free_port
from edgelam_fl.federation.child import Child, await_answer, end_all
from edgelam_fl.model.source import find_model
from tests.fuzz import Tally, fuzz_hub, fuzz_links, fuzz_port, resident_bytes
from tests.parity.daemons import Daemon, running
from tests.parity.test_grpc_processes import one_device_against_the_plain_loop
from tests.support import run_config, write_data_files, write_tiny_llama

MOST_MIB = 64.0


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--frames", type=int, default=100_000, help="frames into links of this process")
    parser.add_argument(
        "--live", type=int, default=20_000, help="frames to a stage host; a quarter as many calls to a hub"
    )
    parser.add_argument("--seed", type=int, default=1)


def measure(smoke: bool, options: argparse.Namespace) -> tuple[dict[str, Any], list[Figure]]:
    frames, live = (2000, 200) if smoke else (options.frames, options.live)
    fuzz_links(500, options.seed)
    before = resident_bytes(os.getpid())
    tally = fuzz_links(frames, options.seed + 1)
    figures = _of_tally("in process", tally, _mib_since(os.getpid(), before))
    with tempfile.TemporaryDirectory() as name:
        figures += _live(Path(name), live, options.seed)
    settings = {"frames": frames, "live": live, "seed": options.seed, "outcomes in process": dict(tally.outcomes)}
    return settings, figures


def _live(folder: Path, frames: int, seed: int) -> list[Figure]:
    torch.set_num_threads(1)  # the order of sums depends on the number of threads
    files, port = write_data_files(folder), free_port()
    model = find_model(str(write_tiny_llama(folder / "tiny")))
    command = [
        sys.executable,
        "-m",
        "edgelam_fl.hub.daemon",
        "--listen",
        f"127.0.0.1:{port}",
        "--state",
        str(folder / "hub"),
    ]
    hub = Child("hub", command, folder / "hub.log")
    try:
        await_answer(hub, "127.0.0.1", port)
        with running(["edge-1"], files[:1], folder / "daemons") as daemons, ThreadPoolExecutor(3) as beside:
            return _beside_training(daemons, hub, f"127.0.0.1:{port}", model.name, files[0], frames, seed, beside)
    finally:
        end_all([hub])


def _beside_training(
    daemons: dict[str, Daemon], hub: Child, hub_address: str, model: str, file: Path, frames: int, seed: int,
    beside: ThreadPoolExecutor,
) -> list[Figure]:  # fmt: skip
    source, config, trainings = find_model(model), run_config(model), 0

    def train() -> None:
        nonlocal trainings
        trainings += 1
        one_device_against_the_plain_loop(daemons, f"fuzz-{trainings}", source, config, file)

    train()
    host = daemons["edge-1"].child
    pids = {"stage host": host.pid, "hub": hub.pid}
    before = {name: resident_bytes(pid) for name, pid in pids.items()}
    running_: dict[str, Future[Tally]] = {
        "stage host": beside.submit(fuzz_port, daemons["edge-1"].address(), frames, seed + 2),
        "hub": beside.submit(fuzz_hub, hub_address, frames // 4, seed + 3),
    }
    while not all(future.done() for future in running_.values()):
        train()
    figures = []
    for name, future in running_.items():
        figures += _of_tally(name, future.result(), _mib_since(pids[name], before[name]))
    alive = not host.ended() and not hub.ended()
    return [
        *figures,
        Figure("processes that crashed", float(not alive), "", "none", alive),
        Figure("trainings meanwhile, equal to the bit", trainings - 1, "", "at least 1", trainings > 1),
    ]


def _mib_since(pid: int, before_bytes: int) -> float:
    return (resident_bytes(pid) - before_bytes) / 2**20


def _of_tally(where: str, tally: Tally, grown_mib: float) -> list[Figure]:
    sent = tally.outcomes["frames"] + tally.outcomes["calls"] or tally.outcomes["closed"] + tally.outcomes["taken"]
    return [
        Figure(f"{where}, mutated messages", sent, ""),
        Figure(f"{where}, exceptions that escaped", len(tally.escaped), "", "none", not tally.escaped),
        Figure(f"{where}, hung", tally.hung, "", "none", tally.hung == 0),
        Figure(f"{where}, slowest", round(tally.slowest_s, 3), "s"),
        Figure(
            f"{where}, resident memory", round(grown_mib, 1), "MiB", f"at most {MOST_MIB:g} MiB", grown_mib <= MOST_MIB
        ),
    ]


if __name__ == "__main__":
    main("fuzz", measure, add_options)
