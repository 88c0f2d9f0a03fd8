"""The command that copies what the package brings along for people: run files, strategies, matrices, the script for boards."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from edgelam_fl.cli.options import say
from edgelam_fl.errors import ConfigError

SHARED = {
    "examples": "examples",
    "benchmarks/matrices": "matrices",
    "clients/install.sh": "boards/clients/install.sh",
    "clients/systemd": "boards/clients/systemd",
    "tools/environment.sh": "boards/tools/environment.sh",
    "constraints": "boards/constraints",
}
"""What is copied: its place in the repository, and in a copy. A wheel has a copy, edgelam_fl/_share (pyproject.toml)."""


def examples(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to make.")] = Path("edgelam-examples"),
) -> None:
    """Copies run files, strategies, matrices for `edgelam bench` and the install script for boards to a new folder.

    The script needs no clone: take the folder boards/ to the machine, with a wheel of this package.
    """
    if folder.exists():
        raise ConfigError(f"{folder} exists; give another folder (nothing is ever overwritten)")
    try:
        _copy_to(folder)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}") from error
    for part in sorted(path for path in folder.iterdir() if path.is_dir()):
        files = sorted(str(file.relative_to(part)) for file in part.rglob("*") if file.is_file())
        say(f"{part}: {', '.join(files)}")


def _copy_to(folder: Path) -> None:
    package = Path(__file__).parents[1]
    without_caches = shutil.ignore_patterns("__pycache__")
    if (package / "_share").is_dir():
        shutil.copytree(package / "_share", folder, ignore=without_caches)
        return
    for source, target in SHARED.items():
        origin, place = package.parent / source, folder / target
        place.parent.mkdir(parents=True, exist_ok=True)
        if origin.is_dir():
            shutil.copytree(origin, place, ignore=without_caches)
        else:
            shutil.copy(origin, place)
