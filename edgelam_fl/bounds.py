"""The bounds that this machine's operator sets to what a run file may name here.

A run file may come from anybody, so its own word never widens them: they come from the command that the operator typed, and
reach the processes that the command starts by their environment. Knows neither run files nor strategies.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgelam_fl.errors import ConfigError

STRATEGIES = "EDGELAM_STRATEGIES"  # packages and absolute folders, separated as in PATH


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a run file may name on this machine; by default nothing of the machine's own."""

    packages: tuple[str, ...] = ()
    """Packages and modules that classes of strategies may come from, found on Python's path and in the working directory."""
    folder: Path | None = None
    """A folder whose modules may all be imported; None: there is no such folder."""

    def environment(self) -> dict[str, str]:
        """Returns the environment by which `bounds_of` finds the same bounds in another process."""
        folders = [str(self.folder.absolute())] if self.folder is not None else []
        return {STRATEGIES: os.pathsep.join([*self.packages, *folders])}

    def allows_module(self, module: str) -> bool:
        """Returns whether classes of a module may be used. Imports nothing, but lets Python find what is allowed here."""
        if not _is_module(module):
            return False
        if any(module == package or module.startswith(f"{package}.") for package in self.packages):
            _look_in(Path.cwd())
            return True
        if self.folder is None:
            return False
        _look_in(self.folder)
        return _lies_in(module.partition(".")[0], self.folder)

    def __str__(self) -> str:
        """Lists the modules that are allowed, for messages; names no folder."""
        folder = ["modules in the directory where the command was typed"] if self.folder is not None else []
        return ", ".join(["the built-in strategies", *self.packages, *folder])


STRICTEST = Bounds()


def operator_bounds(strategies: Sequence[str]) -> Bounds:
    """Reads the options of a server's operator. Raises ConfigError for a package that cannot be one."""
    for name in strategies:
        if not _is_module(name):
            raise ConfigError(
                f"--strategies {name!r} must name a package or a module, as in --strategies my_strategies"
            )
    return Bounds(packages=tuple(strategies))


def bounds_of(environment: Mapping[str, str]) -> Bounds:
    """Reads the bounds of a process from its environment."""
    entries = [entry for entry in environment.get(STRATEGIES, "").split(os.pathsep) if entry]
    folders = [Path(entry) for entry in entries if Path(entry).is_absolute()]
    packages = tuple(entry for entry in entries if not Path(entry).is_absolute())
    return Bounds(packages=packages, folder=folders[0] if folders else None)


def _is_module(name: str) -> bool:
    return all(part.isidentifier() for part in name.split("."))


def _look_in(folder: Path) -> None:
    """Adds a folder to Python's path as the last one, so that no module in it replaces an installed one."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _lies_in(name: str, folder: Path) -> bool:
    """Returns whether Python finds the top-level module `name` in the folder itself, and nowhere else."""
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return False
    if found is None:
        return False
    places = list(found.submodule_search_locations or [])
    if not places and found.has_location and found.origin:
        places = [found.origin]
    return bool(places) and all(Path(place).parent.resolve() == folder.resolve() for place in places)
