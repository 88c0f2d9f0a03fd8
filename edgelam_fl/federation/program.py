"""Runs a federation on this machine for a program: from data files to a result, in one call.

Knows no console and no process: `run_local` has these, and this module waits for its last event.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgelam_fl.config import RunConfig, parse_run_file, read_run_file, to_toml, toml_value
from edgelam_fl.errors import ConfigError, RunFailed
from edgelam_fl.federation.from_data import config_from_data, device_names, expanded
from edgelam_fl.federation.local import run_local
from edgelam_fl.federation.runs import check_run
from edgelam_fl.serving.results import Result, open_result
from edgelam_fl.telemetry.events import Event, RunFailure

StrPath = str | os.PathLike[str]


def run(
    data: StrPath | Sequence[StrPath],
    run_file: StrPath | RunConfig | None = None,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    eval_data: StrPath | Sequence[StrPath] = (),
    folder: StrPath | None = None,
    on_event: Callable[[Event], object] = lambda event: None,
) -> Result:
    """Fine-tunes a model on this machine, with one device per data file, and returns the result once the run is done.

    data: one file per device, in any format that `edgelam client --data` takes, or a pattern (*.jsonl); devices are named after their
    files. run_file: a path, or what `read_run_file` returned; None: every key at its default, but for those that fit the data (task,
    fields, classes). overrides: keys of the run file by their dotted names, {"federation.rounds": 2}, or as a command line has them,
    ["federation.rounds=2"]. eval_data: examples that are measured and never learned, one file for all devices or one each; empty: a share of their data is. folder:
    the run's, absent or empty; None: a new one, as run.out says. on_event: gets each event as it comes. A program that would
    rather have an iterator of events calls `run_local`.

    Raises ConfigError, ModelError or DataError before anything starts, and RunFailed, with the run's own reason, if the run fails.
    """
    files, measured = _paths(data), _paths(eval_data)
    if not files:
        raise ConfigError("data = [] must name at least one file: each becomes a device")
    files = expanded(files)
    words = [_word(*item) for item in overrides.items()] if isinstance(overrides, Mapping) else list(overrides)
    config, names = _config_of(run_file, files, words), device_names(files)
    name = "run" if run_file is None or isinstance(run_file, RunConfig) else Path(run_file).stem
    place = check_run(config, name, None if folder is None else Path(folder), devices=names)
    for event in run_local(config, files, place, names, measured):
        on_event(event)
        if isinstance(event, RunFailure):
            raise RunFailed(f"the run failed: {event.reason}; {event.kept}", event.exit_code)
    return open_result(place)


def _paths(given: StrPath | Sequence[StrPath]) -> list[Path]:
    return [Path(given)] if isinstance(given, str | os.PathLike) else [Path(file) for file in given]


def _config_of(run_file: StrPath | RunConfig | None, files: Sequence[Path], words: Sequence[str]) -> RunConfig:
    """Returns the run file with other values. Raises ConfigError with the key, the value and the rule."""
    if run_file is None:
        return config_from_data(files, words).config
    config = run_file if isinstance(run_file, RunConfig) else read_run_file(Path(run_file))
    return parse_run_file(to_toml(config), source="run()", overrides=list(words)) if words else config


def _word(key: str, value: Any) -> str:
    """Writes an override as a command line has it."""
    try:
        return f"{key}={toml_value(list(value) if isinstance(value, tuple) else value)}"
    except TypeError as error:
        raise ConfigError(f"overrides: {key} = {value!r:.80} is no value of a run file: {error}") from error
