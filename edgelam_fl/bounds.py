"""The bounds that this machine's operator sets to what a run file may name here: modules, folders of runs, folders of models.

A run file may come from anybody, so its own word never widens them: they come from the command that the operator typed, and
reach the processes that the command starts by their environment. Knows neither run files nor strategies.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgelam_fl.errors import ConfigError

STRATEGIES = "EDGELAM_STRATEGIES"  # packages and absolute folders, separated as in PATH
RUNS, RUN, MODELS = "EDGELAM_RUNS", "EDGELAM_RUN", "EDGELAM_MODELS"  # folders; of models, separated as in PATH
_WHOLE_MACHINE = Path("/")
_CHATS = "chats"  # in a run's folder: a folder per conversation


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a run file may name on this machine; by default the built-in strategies, and any folder, as in a program of one's own."""

    packages: tuple[str, ...] = ()
    """Packages and modules that classes of strategies may come from, found on Python's path and in the working directory."""
    folder: Path | None = None
    """A folder whose modules may all be imported; None: there is no such folder."""
    runs: Path = _WHOLE_MACHINE
    """The folder below which runs get new folders."""
    run: Path | None = None
    """The one folder that runs may use, made by the operator's own command; None: each run gets a new folder below `runs`."""
    models: tuple[Path, ...] = (_WHOLE_MACHINE,)
    """Folders below which models may be read; built-in models and those of a hub need none."""

    def environment(self) -> dict[str, str]:
        """Returns the environment by which `bounds_of` finds the same bounds in another process."""
        folders = [str(self.folder.absolute())] if self.folder is not None else []
        found = {
            STRATEGIES: os.pathsep.join([*self.packages, *folders]),
            RUNS: str(self.runs.absolute()),
            MODELS: os.pathsep.join(str(folder.absolute()) for folder in self.models),
        }
        return found | ({RUN: str(self.run.absolute())} if self.run is not None else {})

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

    def allows_model(self, path: Path) -> bool:
        """Returns whether a model may be read from a folder or file that exists."""
        return _lies_below(path, self.models)

    def allows_adapter(self, path: Path) -> bool:
        """Returns whether an adapter may be read from a folder that exists: below the folder of runs, or as a model."""
        return _lies_below(path, [self.runs, *self.models])

    def find_run(self, name: str) -> Path:
        """Returns the folder that a run file means by `name`: one from here, or below the folder of runs."""
        path = Path(name).expanduser()
        return path if path.exists() else self.runs / path

    def check_in_runs(self, path: Path, what: str) -> Path:
        """Returns where `path` really is. Raises ConfigError, which names `what`, unless that is below the folder of runs."""
        root = (self.run or self.runs).resolve()
        found = path.resolve()
        if not found.is_relative_to(root):
            raise ConfigError(
                f"{what} = {str(path)!r} is outside of this server's folder for runs (edgelam server --runs)"
            )
        return found

    def run_folder(self, out: str, default: str) -> Path:
        """Returns where a run with these words for its folder has it, without a look at the disk."""
        return self.run if self.run is not None else self.runs.absolute() / (out or default)

    def make_run_folder(self, out: str, default: str, *, of_chat: bool = False) -> Path:
        """Makes a run's folder and returns its path: a new one below `runs`, or the one folder `run`.

        out: a path below `runs`, or from there; empty: `default`. of_chat: the folder is that of a conversation, in the
        folder of a run. Raises ConfigError for any other place, for a way through a link, and for a folder that exists.
        """
        if self.run is not None:
            if Path(out).absolute() != self.run.absolute():
                raise ConfigError(f"out = {out!r} is not the folder that this run was started with")
            self.run.mkdir(parents=True, exist_ok=True)
            return self.run
        root = self.runs.absolute()
        path = root / (out or default)
        if ".." in path.parts or root not in path.parents:
            raise ConfigError(
                f"out = {out!r} is outside of this server's folder for runs: give a name, or start the server with "
                "`edgelam server --runs DIR`"
            )
        if root == _WHOLE_MACHINE:
            root = path.parent
        root.mkdir(parents=True, exist_ok=True)
        _make_new(root, path, of_chat)
        return path

    def __str__(self) -> str:
        """Lists the modules that are allowed, for messages; names no folder."""
        folder = ["modules in the directory where the command was typed"] if self.folder is not None else []
        return ", ".join(["the built-in strategies", *self.packages, *folder])


DEFAULT_BOUNDS = Bounds()


def _lies_below(path: Path, folders: Iterable[Path]) -> bool:
    return any(path.resolve().is_relative_to(folder.resolve()) for folder in folders)


def operator_bounds(strategies: Sequence[str], runs: Path, models: Sequence[Path]) -> Bounds:
    """Reads the options of a server's operator. Raises ConfigError for a package that cannot be one."""
    check_modules("--strategies", strategies)
    return Bounds(packages=tuple(strategies), runs=runs, models=tuple(models))


def check_modules(option: str, names: Sequence[str]) -> None:
    """Raises ConfigError for a value of an option that cannot be the name of a package or a module."""
    for name in names:
        if not _is_module(name):
            raise ConfigError(
                f"{option} {name!r} must name a package or a module, as in {option} my_{option.strip('-')}"
            )


def bounds_of_modules(names: Sequence[str]) -> Bounds:
    """Returns bounds that allow some packages, modules and, by an absolute path, one folder of modules."""
    return bounds_of({STRATEGIES: os.pathsep.join(names)})


def bounds_of(environment: Mapping[str, str]) -> Bounds:
    """Reads the bounds of a process from its environment; without one, runs and models are in `runs` and `models` here."""
    entries = [entry for entry in environment.get(STRATEGIES, "").split(os.pathsep) if entry]
    folders = [Path(entry) for entry in entries if Path(entry).is_absolute()]
    packages = tuple(entry for entry in entries if not Path(entry).is_absolute())
    models = [Path(entry) for entry in environment.get(MODELS, "models").split(os.pathsep) if entry]
    run = environment.get(RUN, "")
    return Bounds(
        packages=packages,
        folder=folders[0] if folders else None,
        runs=Path(environment.get(RUNS, "runs")),
        run=Path(run) if run else None,
        models=tuple(models),
    )


def _make_new(root: Path, path: Path, of_chat: bool) -> None:
    """Makes the folder `path` below `root`, and those on the way to it."""
    way = [parent for parent in reversed(path.parents) if root in parent.parents]
    if any(folder.is_symlink() for folder in way):
        raise ConfigError(f"out = {str(path)!r} leads through a link; a run's folder does not")
    in_run = any((folder / "events.jsonl").exists() for folder in way)
    if of_chat and not (in_run and path.parent.name == _CHATS):
        raise ConfigError(f"out = {str(path)!r} must be in the folder {_CHATS} of a run")
    if in_run and not of_chat:
        raise ConfigError(f"out = {str(path)!r} is inside the folder of another run; give another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.mkdir()
    except FileExistsError as error:
        raise ConfigError(f"out = {str(path)!r} exists; give another name (nothing is ever overwritten)") from error


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
