"""Sorts out what `edgelam run` was given: a run file, data files, or both; and starts or explains a run on this machine."""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from edgelam_fl.array_files import ARRAYS
from edgelam_fl.cli.options import messages
from edgelam_fl.cli.run_file import explained
from edgelam_fl.config import RunConfig, read_run_file
from edgelam_fl.errors import ConfigError
from edgelam_fl.federation.data_check import FileSeen, check_files, look_into_files
from edgelam_fl.federation.dealing import deal_file, read_split
from edgelam_fl.federation.from_data import MOST_DEVICES, config_from_data, device_names, expanded
from edgelam_fl.federation.local import numbered
from edgelam_fl.federation.runs import check_run, new_folder, run_here
from edgelam_fl.model.source import ModelSource
from edgelam_fl.tasks.files import SUFFIXES
from edgelam_fl.tasks.named import local_data
from edgelam_fl.telemetry.waiting import waiting

_NO_FILE_NAME, _DEALT = "run", "data"
_NOTHING = (
    "edgelam run needs a run file, data, or a run to go on with: `edgelam run --data FILE --data FILE` trains on this machine without "
    "a run file, `edgelam init run.toml` writes one, and --resume RUN goes on with a run"
)


@dataclass(frozen=True)
class Asked:
    """The wishes of one command line."""

    files: Sequence[Path]
    data: Sequence[Path]
    split: str
    local: int
    overrides: Sequence[str]
    out: Path | None
    eval_data: Sequence[Path] = ()

    @property
    def is_here(self) -> bool:
        """Returns whether this machine plays all parts."""
        return bool(self.data or self.local)

    @property
    def name(self) -> str:
        """Returns the name that the run gets."""
        return self.files[0].stem if self.files else _NO_FILE_NAME

    @property
    def devices(self) -> list[str]:
        """Returns the names of the devices of a run on this machine; without data, none is known."""
        if self.split:
            return numbered(read_split(self.split).devices)
        return numbered(self.local) if self.local else device_names(self.data)

    def read(self) -> RunConfig:
        """Returns the run file as it is to be used."""
        return read_run_file(self.files[0], list(self.overrides))

    def config(self) -> tuple[RunConfig, list[str]]:
        """Returns the run file, or one that is made for the data, and what is to be said about its choices."""
        if self.files:
            return self.read(), []
        made = config_from_data(self.data, self.overrides)
        return made.config, [
            *made.said,
            "no run file is given: the one that this comes to is config.toml in the run's folder",
        ]


def sorted_out(asked: Asked) -> Asked:
    """Tells run files from data files, as a shell gives them after a pattern, and replaces patterns by the files that fit.

    Raises ConfigError or DataError for what does not go together.
    """
    is_data = [bool(asked.data) and _is_data_name(file) for file in asked.files]
    files = [file for file, data in zip(asked.files, is_data, strict=True) if not data]
    data = expanded([*asked.data, *(file for file, data in zip(asked.files, is_data, strict=True) if data)])
    asked = replace(asked, files=files, data=data, eval_data=expanded(asked.eval_data))
    for override in asked.overrides:
        if "=" not in override:  # before its value, which stands alone, is taken for a run file
            raise ConfigError(f"--set {override!r} must look like section.key=value, as in --set federation.rounds=2")
    if files and not asked.data and all(map(_is_data_name, files)):
        typed = " ".join(f"--data {shlex.quote(str(file))}" for file in files)
        raise ConfigError(f"{files[0]} is no run file by its name: `edgelam run {typed}` trains with it as data")
    if len(files) > 1:
        raise ConfigError(
            f"edgelam run takes one run file, got {' and '.join(map(str, files))}; data files go behind --data"
        )
    if asked.eval_data and not asked.data:
        raise ConfigError(
            f"--eval-data {asked.eval_data[0]} needs --data: the examples to learn. A device that joins a server brings both: edgelam client "
            f"--data FILE --eval-data FILE"
        )
    if asked.split:
        read_split(asked.split)
        _check_split(asked)
    if asked.local and not asked.split and len(asked.data) != asked.local:
        raise ConfigError(
            f"--local {asked.local} needs --data once per device ({_times(asked.local)}), got it {_times(len(asked.data))}. Without --local "
            f"there are as many devices as files"
        )
    if not files and not asked.data:
        raise ConfigError(_NOTHING)
    if len(asked.data) > MOST_DEVICES:
        raise ConfigError(
            f"{len(asked.data)} data files are too many: one machine plays at most {MOST_DEVICES} devices"
        )
    return asked


def _check_split(asked: Asked) -> None:
    devices = read_split(asked.split).devices
    if len(asked.data) != 1:
        raise ConfigError(
            f"--split {asked.split} deals one data file, got {len(asked.data)}: give one --data, or leave --split out"
        )
    if asked.local not in (0, devices):
        raise ConfigError(
            f"--local {asked.local} and --split {asked.split} name two numbers of devices; leave --local out"
        )


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _is_data_name(file: Path) -> bool:
    return file.suffix.lower() in (*SUFFIXES, *ARRAYS) or file.is_dir() or str(file).startswith("hf:")


def run_with_data(console: Console, asked: Asked) -> int:
    """Runs on this machine; returns the exit code. What ends before anything starts leaves no folder behind."""
    with waiting(messages, "checking the run file and the model"):
        config, said = asked.config()
        folder = check_run(config, asked.name, asked.out, devices=asked.devices)
    try:
        files = (
            deal_file(asked.data[0], config, read_split(asked.split), folder / _DEALT) if asked.split else asked.data
        )
        return run_here(console, config, folder, files, names=asked.devices, choices=said, eval_data=asked.eval_data)
    except BaseException:
        if folder.is_dir() and {part.name for part in folder.iterdir()} <= {_DEALT}:
            shutil.rmtree(folder)
        raise


def explain_run(asked: Asked) -> str:
    """Returns what a run would use, after the checks that a run makes; starts nothing but what tokenizes."""
    config, said = asked.config()
    if asked.is_here:
        new_folder(config, asked.name, asked.out)

    def look(source: ModelSource | None) -> list[FileSeen]:
        return _look(asked, config, source)

    notes = "".join(f"# {line}\n" for line in said)
    return f"{notes}{explained(config, asked.devices if asked.is_here else (), look, here=asked.is_here)}"


def _look(asked: Asked, config: RunConfig, source: ModelSource | None) -> list[FileSeen]:
    """Reads the devices' files as a run does, and without a model only whether that can be done."""
    with tempfile.TemporaryDirectory(prefix="edgelam-split-") as folder:
        files = [local_data(file) for file in asked.data]
        if asked.split:
            files = deal_file(files[0], config, read_split(asked.split), Path(folder))
        measured = [local_data(file) for file in asked.eval_data]
        check_files(config, files, measured)
        return look_into_files(config, source, files, measured) if files and source else []
