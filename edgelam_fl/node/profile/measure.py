"""Measures this machine's profile. Knows no plans and no server beyond the port of its hub.

Memory, disk and link change by the hour and are measured each time; `model.layer_speed` caches the time of a layer.
"""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from edgelam_fl.errors import EnvironmentProblem
from edgelam_fl.files import cache_folder
from edgelam_fl.hub.link_speed import HUB_ANSWER_S, measure_link
from edgelam_fl.machine import disk_free_bytes
from edgelam_fl.model.source import find_model
from edgelam_fl.node.profile.data import LinkProfile, Profile

_WRITE_BYTES = 16 << 20
_BLOCK_BYTES = 1 << 20
_WRITE_BUDGET_S = 2.0  # a worn card writes less than _WRITE_BYTES in this time


def measure_profile(
    model: str,
    hub: tuple[str, int] | None,
    say: Callable[[str], None] = lambda _: None,
    name: str = "",
    hub_answer_s: float = HUB_ANSWER_S,
    device: str = "cpu",
) -> Profile:
    """Measures this machine; takes about 10 s for a model that was never measured here.

    `model`: whose layers to time; empty: none. `hub`: (host, port) to measure the link to; None: no link. `say`: receives
    progress. `name`: the node's name, by default the machine's. `hub_answer_s`: patience with the hub. `device`: what it
    computes on, as --device. Raises ModelError if the model is not here, EnvironmentProblem if the cache cannot be written, no hub
    answers, or the chip is not here.
    """
    import torch

    from edgelam_fl.model.bases import working_chip
    from edgelam_fl.model.chip import chip_free_bytes, chip_name
    from edgelam_fl.model.layer_speed import measure_layers

    chip, _ = working_chip(device)
    memory = chip_free_bytes(chip)  # before a layer is loaded
    layers = measure_layers(find_model(model), say, chip) if model else {}
    say("measuring the disk")
    write_speed = disk_write_bytes_per_s(cache_folder())
    link = None
    if hub is not None:
        say(f"measuring the link to {hub[0]}:{hub[1]}")
        found = measure_link(*hub, hub_answer_s)
        link = LinkProfile(up_bps=found.up_bps, down_bps=found.down_bps, round_trip_s=found.round_trip_s)
    return Profile(
        name=name or platform.node(),
        memory_free_bytes=memory,
        cpu_threads=torch.get_num_threads(),
        chip="" if chip.type == "cpu" else f"{chip} {chip_name(chip)}",
        disk_free_bytes=disk_free_bytes(cache_folder()),
        disk_write_bytes_per_s=write_speed,
        model=model,
        layer_seconds=layers,
        link=link,
    )


def disk_write_bytes_per_s(folder: Path, size: int = _WRITE_BYTES) -> float:
    """Returns the rate at which `size` bytes reach the disk, in a file that is removed again.

    Stops early on a slow disk. Raises EnvironmentProblem if the folder cannot be written.
    """
    block = os.urandom(_BLOCK_BYTES)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            began, written = time.perf_counter(), 0
            while written < size and time.perf_counter() - began < _WRITE_BUDGET_S:
                written += file.write(block)
                os.fsync(file.fileno())
            return written / (time.perf_counter() - began)
    except OSError as error:
        raise EnvironmentProblem(
            f"{folder} cannot be written ({error.strerror}); it is the cache: free some space, give the folder to this user "
            f"(`sudo chown -R $USER {folder}`), or set EDGELAM_CACHE to another folder",
            f"its cache cannot be written ({error.strerror})",
        ) from error
