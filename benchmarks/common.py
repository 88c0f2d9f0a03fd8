"""Command line, figures and result file of every benchmark.

`python -m benchmarks.NAME [--smoke]` runs a benchmark, prints one JSON line at its end and writes benchmarks/results/NAME.json:
{name, command, machine, versions, settings, figures: [{name, value, unit, bar, holds}]}. A smoke run writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
VERSIONED = ("edgelam-fl", "flwr", "torch", "transformers", "peft", "grpcio")


@dataclass(frozen=True)
class Figure:
    """One measured number. `bar`: the requirement in words (None: no requirement); `holds`: whether the number meets it."""

    name: str
    value: float
    unit: str
    bar: str | None = None
    holds: bool | None = None


def main(
    name: str,
    measure: Callable[..., tuple[dict[str, Any], list[Figure]]],
    add_options: Callable[[argparse.ArgumentParser], None] | None = None,
    arguments: Sequence[str] | None = None,
    command: str = "",
) -> None:
    """Runs `measure(smoke)`, which returns settings and figures, prints the result and writes the result file.

    `add_options`: adds options of the benchmark's own; then `measure(smoke, options)` is called. `arguments`: the command
    line's; None: this process's. `command`: what makes this result, "" if it is `python -m benchmarks.NAME`.
    """
    command = command or f"python -m benchmarks.{name}"
    parser = argparse.ArgumentParser(prog=command)
    parser.add_argument(
        "--smoke", action="store_true", help="the smallest run that exercises everything; writes no result"
    )
    if add_options is not None:
        add_options(parser)
    options = parser.parse_args(arguments)
    smoke = options.smoke
    settings, figures = measure(smoke, options) if add_options is not None else measure(smoke)
    result = {
        "name": name,
        "command": command,
        "machine": machine(),
        "versions": {package: version(package) for package in VERSIONED},
        "settings": settings,
        "figures": [asdict(figure) for figure in figures],
    }
    if not smoke:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


def machine() -> dict[str, Any]:
    """Returns what numbers depend on: CPU, cores, operating system and Python of this machine."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
