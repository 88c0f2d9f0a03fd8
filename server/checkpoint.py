"""Checkpoints of a run: all that the server knows after a round, as one folder that appears in one step.

`checkpoints/r000012/` has `state.json` (plain data), `tensors.safetensors` (the arrays of it) and `manifest.json` (the SHA-256
of both). It is written as `r000012.part`, brought to the disk, and renamed: whatever is killed, a folder without `.part` is
whole. Knows nothing about rounds, nodes or strategies; what they remember comes as plain data and arrays.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from edgelam_fl.errors import ConfigError
from edgelam_fl.files import replace_folder, sweep, write_atomically
from edgelam_fl.model.tensor_file import DTYPES, read_tensors, write_tensors
from edgelam_fl.telemetry.events import Event, as_line, parse_event
from server.best import Best
from server.holdings import Holdings, NodeHoldings
from server.state import FederationState

CHECKPOINTS = "checkpoints"
KEPT = 2
"""Checkpoints that are kept: the newest, and the one before in case the newest cannot be read."""
FORMAT = 1
"""Raised by every change to what older versions would read wrong."""

_STATE, _TENSORS, _MANIFEST = "state.json", "tensors.safetensors", "manifest.json"
_NAME = re.compile(r"r(\d{6,})")
# {"$array": 7} in state.json is the array "7" in tensors.safetensors; {"$number": 7} is the one number in it, of numpy's type.
_ARRAY, _NUMBER = "$array", "$number"
_OF_BEST = tuple(each.name for each in fields(Best))
_PLAIN = (str, int, float, bool, type(None))
_DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError)


@dataclass(frozen=True, kw_only=True)
class Saved:
    """All that a run needs to go on after a round as if it had never stopped."""

    run: str
    """The name by which the nodes know the run."""
    state: FederationState
    memory: Mapping[str, Any]
    """What strategies, schedule, placement and privacy remember, by owner: plain data and arrays."""
    config: str = ""
    """The run file with every key, as TOML."""
    model: Mapping[str, str] = field(default_factory=dict)
    """The SHA-256 of each file of the base model, by name."""
    events_bytes: int = 0
    """Size of events.jsonl when this was saved: all lines up to there are on the disk."""
    closing: Sequence[Event] = ()
    """The round's last events: they are emitted after the checkpoint is stored, and so may be missing in events.jsonl."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of the packages that wrote it, by name."""


def save(run_folder: Path, saved: Saved) -> Path:
    """Commits a checkpoint to the disk and removes those older than the newest two; returns its folder.

    Raises OSError if it cannot be written: then the ones before are as they were, and nothing of it is left. Raises
    ConfigError for a memory that is no plain data.
    """
    place = run_folder / CHECKPOINTS / f"r{saved.state.round:06d}"
    part = place.with_name(f"{place.name}.part")
    place.parent.mkdir(parents=True, exist_ok=True)
    plain, arrays = flatten(_to_plain(saved), "the checkpoint")
    if part.exists():
        shutil.rmtree(part)
    try:
        part.mkdir()
        text = json.dumps(plain, ensure_ascii=False).encode()
        write_atomically(part / _STATE, text, durable=True)
        digests = {
            _STATE: hashlib.sha256(text).hexdigest(),
            _TENSORS: write_tensors(part / _TENSORS, {str(number): array for number, array in enumerate(arrays)}),
        }
        manifest = {"format": FORMAT, "round": saved.state.round, "versions": dict(saved.versions), "files": digests}
        write_atomically(part / _MANIFEST, json.dumps(manifest, indent=1) + "\n", durable=True)
        replace_folder(part, place)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    for old in _folders(run_folder)[KEPT:]:
        doomed = old.with_name(f"{old.name}.part")  # half removed, it must not look like a checkpoint
        old.rename(doomed)
        shutil.rmtree(doomed)
    return place


def load_newest(run_folder: Path) -> tuple[Saved, str]:
    """Returns the newest checkpoint that is whole, and why newer ones were passed over ("": none was).

    Raises ConfigError if there is none: for a folder of a version that had no checkpoints, one without a finished round, and
    one whose checkpoints are all damaged. Changes nothing.
    """
    problems: list[str] = []
    for folder in _folders(run_folder):
        try:
            return _load(folder), "; ".join(problems)
        except ConfigError as problem:
            problems.append(str(problem))
    if problems:
        raise ConfigError(
            f"{run_folder} has no checkpoint that can be read, so the run cannot go on: {'; '.join(problems)}"
        )
    if (run_folder / _STATE).is_file():  # where versions before checkpoints counted rounds
        raise ConfigError(
            f"{run_folder} was written by a version of edgelam-fl without checkpoints, so the run cannot go on. `edgelam report`, "
            f"`edgelam export` and `edgelam chat` take it as it is"
        )
    raise ConfigError(
        f"{run_folder} has no checkpoint: the run has not finished a round. Start it again in a new folder"
    )


def sweep_checkpoints(run_folder: Path) -> list[str]:
    """Removes what a killed process left half-written among the checkpoints; returns the names."""
    return sweep(run_folder / CHECKPOINTS)


def newest_round(run_folder: Path) -> int:
    """Returns the last round of which there is a checkpoint; 0 if there is none. Whether it is whole is not looked at."""
    return max((int(folder.name[1:]) for folder in _folders(run_folder)), default=0)


def size_bytes(run_folder: Path) -> int:
    """Returns the size of the newest checkpoint; 0 if there is none."""
    newest = _folders(run_folder)[:1]
    return sum(file.stat().st_size for folder in newest for file in folder.iterdir())


# ---------------------------------------------------------------- plain data and arrays


def flatten(value: Any, where: str) -> tuple[Any, list[np.ndarray]]:
    """Splits plain data with arrays in it into what JSON can hold, and the arrays.

    `where`: what the value is, for messages. Raises ConfigError for anything that would not come back as it was.
    """
    arrays: list[np.ndarray] = []

    def plain(item: Any, place: str) -> Any:
        if isinstance(item, np.ndarray | np.generic) and item.dtype.name in DTYPES:
            arrays.append(np.asarray(item))
            return {_ARRAY if isinstance(item, np.ndarray) else _NUMBER: len(arrays) - 1}
        if item is None or isinstance(item, str | bool | int | float):
            return item
        if isinstance(item, Mapping) and all(isinstance(key, str) and key not in (_ARRAY, _NUMBER) for key in item):
            return {key: of if type(of) in _PLAIN else plain(of, f"{place}[{key!r}]") for key, of in item.items()}
        if isinstance(item, list | tuple):
            return [of if type(of) in _PLAIN else plain(of, f"{place}[{number}]") for number, of in enumerate(item)]
        raise ConfigError(
            f"{place} is a {type(item).__name__}, which a checkpoint cannot hold. Allowed: None, bool, int, float, str, numpy "
            f"arrays and numbers, lists, and dicts with str keys"
        )

    return plain(value, where), arrays


def unflatten(plain: Any, take: Callable[[int], np.ndarray]) -> Any:
    """Puts together what `flatten` split. `take`: returns an array by its number."""
    if isinstance(plain, Mapping):
        if plain.keys() == {_ARRAY}:
            return take(plain[_ARRAY])
        if plain.keys() == {_NUMBER}:
            return take(plain[_NUMBER])[()]
        return {key: unflatten(of, take) for key, of in plain.items()}
    return [unflatten(of, take) for of in plain] if isinstance(plain, list) else plain


# ---------------------------------------------------------------- on the disk


def _folders(run_folder: Path) -> list[Path]:
    """Returns the folders of all checkpoints, newest first; whether they are whole is not looked at."""
    found = (run_folder / CHECKPOINTS).glob("r*")
    numbers = {path: int(match[1]) for path in found if (match := _NAME.fullmatch(path.name))}
    return sorted(numbers, key=lambda path: -numbers[path])


def _load(folder: Path) -> Saved:
    """Reads a checkpoint. Raises ConfigError with what is wrong with it."""
    who = f"{CHECKPOINTS}/{folder.name}"
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        number, digests = manifest["format"], manifest["files"]
        written_by = manifest["versions"].get("edgelam-fl", "another version")
    except _DAMAGED as error:
        raise ConfigError(f"{who} is damaged ({_MANIFEST}: {error!s:.100})") from error
    if number != FORMAT:
        raise ConfigError(
            f"{who} is in format {number!s:.10} (edgelam-fl {written_by!s:.30}), and this version reads {FORMAT}"
        )
    try:
        for name in (_STATE, _TENSORS):
            with (folder / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digests[name]:
                    raise ConfigError(f"{who} is damaged: {name} has not the digest that {_MANIFEST} gives")
        plain = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        arrays = read_tensors(folder / _TENSORS)
        return _from_plain(unflatten(plain, lambda number: arrays[str(number)]), manifest["versions"])
    except _DAMAGED as error:
        raise ConfigError(f"{who} is damaged ({error!s:.100})") from error


def _to_plain(saved: Saved) -> dict[str, Any]:
    state = saved.state
    holdings = {
        name: {"adapter": held.adapter_digest, "tensors": dict(held.tensor_digests)}
        for name, held in state.holdings.by_node.items()
    }
    return {
        "run": saved.run,
        "state": {
            "round": state.round,
            "step_offset": state.step_offset,
            "adapter": state.adapter,
            "personal": state.personal,
            "sites": state.sites,
            "holdings": holdings,
            "best": None if state.best is None else {name: getattr(state.best, name) for name in _OF_BEST},
        },
        "memory": saved.memory,
        "config": saved.config,
        "model": saved.model,
        "events_bytes": saved.events_bytes,
        "closing": [as_line(event) for event in saved.closing],
    }


def _from_plain(plain: Mapping[str, Any], versions: Mapping[str, str]) -> Saved:
    state = plain["state"]
    holdings = {name: NodeHoldings(held["adapter"], held["tensors"]) for name, held in state["holdings"].items()}
    return Saved(
        run=plain["run"],
        state=FederationState(
            round=state["round"],
            step_offset=state["step_offset"],
            adapter=state["adapter"],
            personal=state["personal"],
            sites=state["sites"],
            holdings=Holdings(holdings),
            best=None if state.get("best") is None else Best(**{name: state["best"][name] for name in _OF_BEST}),
        ),
        memory=plain["memory"],
        config=plain["config"],
        model=plain["model"],
        events_bytes=plain["events_bytes"],
        closing=tuple(map(parse_event, plain["closing"])),
        versions=versions,
    )
