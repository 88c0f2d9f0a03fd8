"""What the commands share: the two consoles, and the options that several commands take. Knows no command.

Imports nothing heavy: `edgelam --help` loads this module.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, TextIO, cast

import typer
from rich.console import Console

from edgelam_fl.files import RoomyStream
from edgelam_fl.machine import check_chip

console = Console(file=cast("TextIO", RoomyStream(lambda: sys.stdout)))
"""What a command was asked for: results, and the course of a run."""
messages = Console(file=cast("TextIO", RoomyStream(lambda: sys.stderr)), stderr=True)
"""Errors and waiting, so that the output of a command can be piped."""


def say(text: str) -> None:
    """Prints text as it is: without markup, colours or line breaks of its own."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _go_offline(value: bool) -> bool:
    """Sets the environment early: the libraries read it when they are imported, and every process started here inherits it."""
    if value:
        os.environ["HF_HUB_OFFLINE"] = "1"
    return value


def _is_chip(value: str) -> str:
    if value:
        check_chip(value)
    return value


def _in_runs(value: Path) -> Path:
    """Returns the folder of a run that was named by its name alone."""
    inside = Path("runs") / value
    return inside if not value.exists() and inside.is_dir() else value


DeviceOption = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="auto|cpu|cuda[:N]|mps|xpu[:N]",
        callback=_is_chip,
        help="What this machine computes on; auto: an accelerator whose kernels run, else the CPU.",
    ),
]
ServerOption = Annotated[str, typer.Option("--server", metavar="HOST:PORT", help="Where `edgelam server` listens.")]
OperatorOption = Annotated[
    Path,
    typer.Option(
        "--operator", metavar="DIR", help="The operator's folder, which `edgelam server` makes and names at its start."
    ),
]
OPERATOR_FOLDER = Path(".edgelam/server/operator")
"""Where a server that is started in this directory keeps it."""
InsecureOption = Annotated[
    bool, typer.Option("--insecure", help="Allow plain text beyond this machine, on a network that you trust.")
]
OfflineOption = Annotated[
    bool,
    typer.Option(
        "--offline",
        callback=_go_offline,
        help="Download from no model hub of the internet; slices of the model still come from the federation's server.",
    ),
]
EvalDataOption = Annotated[
    list[Path],
    typer.Option(
        "--eval-data",
        metavar="FILE",
        help="Examples that are measured and never learned, for all devices or once per device; without, a share of --data (data.held_out).",
    ),
]
SetOption = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override any key of the run file; may be repeated.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]
RunArgument = Annotated[
    Path, typer.Argument(metavar="RUN", callback=_in_runs, help="A run's folder, or its name if that is in runs/.")
]
RunFilesArgument = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="[RUN.toml]", help="The run file: model, split, training; not needed with --data.", show_default=False
    ),
]
RunFileArgument = Annotated[Path, typer.Argument(metavar="RUN.toml", help="The run file: model, split, training.")]
