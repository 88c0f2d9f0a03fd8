"""What is checked and said before a run starts: the run file, the devices' data, and room on this machine's disk and in its memory.

`edgelam run` and `--explain` use the same checks. Starts nothing but the process that tokenizes.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from edgelam_fl.bounds import Bounds
from edgelam_fl.config import AUTO, RunConfig, toml_value
from edgelam_fl.errors import ConfigError, EnvironmentProblem
from edgelam_fl.federation.data_check import FileSeen, outside_words
from edgelam_fl.federation.flower_app import app_module
from edgelam_fl.federation.local import bounds_of_a_local_run
from edgelam_fl.machine import disk_free_bytes, memory_free_bytes
from edgelam_fl.plan.layout import local_hosts
from edgelam_fl.plan.making import check_warmup, own_steps
from edgelam_fl.plan.resolved import DataSize, Resolved, resolve
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.telemetry.human import human_bytes, human_count

_LOGS_BYTES = 50_000_000  # of logs, events and the report
_COPIES = 4  # of the adapter, as each node and the server keep it with its moments
_FIRST_SHOWN = "    "


def check_run_file(config: RunConfig, *, here: bool, devices: Sequence[str] = (), download: bool = True) -> RunSpec:
    """Checks a run file as a run does, before anything starts, and returns it with its model.

    here: whether everything takes place on this machine; else strategies of one's own are left to the server's check. devices: the names
    of those that take part, if they are known. download: whether the model may be fetched from a hub. Raises UsageError for what is wrong.
    """
    bounds = bounds_of_a_local_run() if here else Bounds()
    check = app_module("server.checks").check_config
    spec: RunSpec = check(config, bounds, elsewhere=not here, download=download, devices=devices)
    return spec


def check_folder(folder: Path, *, makes: bool) -> None:
    """Raises ConfigError if a run's folder is in use or, with `makes`, if it cannot be made here; leaves nothing behind."""
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(
                f"the run's folder {folder} exists; choose another with --out (nothing is ever overwritten)"
            )
        if makes:
            _try_to_make(folder)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise ConfigError(f"the run's folder {folder} cannot be made: {why}; choose another with --out") from error


def _try_to_make(folder: Path) -> None:
    missing = [part for part in (folder, *folder.parents) if not part.exists()]
    made = list[Path]()
    try:
        for part in reversed(missing):
            part.mkdir()
            made.append(part)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    finally:
        for part in reversed(made):
            part.rmdir()


def check_steps(config: RunConfig, seen: Sequence[FileSeen]) -> None:
    """Raises ConfigError if the learning rate would rise until the end, by the steps that the devices' examples make."""
    if config.federation.epochs and seen:
        check_warmup(config, max(own_steps(config, each.examples) for each in seen))


def check_room(resolved: Resolved, folder: Path, devices: int, edges: int) -> None:
    """Raises EnvironmentProblem if a run on this machine cannot have the memory or the disk that it takes at least."""
    nodes = devices + edges
    needed, free = least_memory_bytes(resolved, devices, edges), memory_free_bytes()
    if needed > free:
        raise EnvironmentProblem(
            f"{_parts(devices, edges)} of this run take about {human_bytes(needed)} of memory, and {human_bytes(free)} are free "
            f"now. Ways out: end other programs, fewer devices, model.base = 'int8', a smaller federation.batch_size or task.max_tokens"
        )
    disk = _LOGS_BYTES + _COPIES * (nodes + 1) * resolved.adapter_bytes
    place = next(part for part in (folder, *folder.parents) if part.exists())
    left = disk_free_bytes(place)
    if left < disk:
        raise EnvironmentProblem(
            f"the run's folder takes about {human_bytes(disk)}, and {human_bytes(left)} are free on the disk of {place}: free some, or "
            f"choose another disk with --out"
        )


def least_memory_bytes(resolved: Resolved, devices: int, edges: int) -> int:
    """Returns the memory that the nodes of a run on this machine take at least: their slices, without what processes share."""
    shared = resolved.process_bytes
    return shared + edges * (resolved.host_bytes - shared) + devices * (resolved.device_bytes - shared)


def _parts(devices: int, hosts: int) -> str:
    edges = f" and {human_count(hosts, 'edge server')}" if hosts else ""
    return f"{human_count(devices, 'device')}{edges}"


def resolved_of(spec: RunSpec, seen: Sequence[FileSeen]) -> Resolved:
    """Returns what a run comes to with the data of its devices, as far as they are known."""
    largest = max(seen, key=lambda each: each.examples, default=None)
    data = None
    if largest is not None:
        data = DataSize(largest.examples, largest.held_out, largest.tokens / max(1, largest.examples))
    return resolve(spec, max(1, len(seen)), data)


def before_words(spec: RunSpec, seen: Sequence[FileSeen], names: Sequence[str]) -> Iterator[str]:
    """Yields what a run comes to, and what of it does nothing for these devices, each without a full stop."""
    for name, each in zip(names, seen, strict=False):
        yield from (f"{name}: {words}" for words in each.in_words())
    yield from outside_words(seen)
    yield from resolved_of(spec, seen).in_words()
    yield from open_words(spec.config)
    if names:
        yield from unused_words(spec.config, names)


def open_words(config: RunConfig) -> Iterator[str]:
    """Says which pieces of a batch are decided when the nodes are there, and what is counted with until then."""
    for key, value in config.pieces._asdict().items():
        if getattr(config.split, key) == AUTO:
            yield (
                f"split.{key} = 'auto' is decided when the nodes are there, by what they measure, for the whole run (`edgelam plan` "
                f"shows it beforehand); the figures above are those of {toml_value(value)}"
            )


def first_example(seen: Sequence[FileSeen], model: str) -> list[str]:
    """Returns the first example of the first device as lines, with what they are; none without data."""
    if not seen:
        return []
    return [seen[0].words_of_first(model), *(f"{_FIRST_SHOWN}{line}" for line in seen[0].first_in_lines())]


def unused_words(config: RunConfig, names: Sequence[str]) -> Iterator[str]:
    """Says which keys do nothing in a run of these devices."""
    split, federation = config.split, config.federation
    hosts = local_hosts(config)
    tables = {"split.fronts": split.named_fronts, "split.backs": split.backs, "lora.ranks": config.lora.ranks}
    for key, patterns in tables.items():
        nodes = [*names, *hosts] if key == "lora.ranks" else names
        for pattern in patterns:
            if not any(fnmatchcase(node, pattern) for node in nodes):
                yield f"WARNING: {key}: {pattern!r} is the name of no node of this run ({', '.join(nodes)})"
    for key, number in {
        "devices_per_round": federation.devices_per_round,
        "enough_nodes": federation.enough_nodes,
    }.items():
        if number > len(names):
            yield f"WARNING: federation.{key} = {number} is more than the {human_count(len(names), 'device')} of this run"
    if federation.expect_nodes not in (0, len(names)):
        yield (
            f"WARNING: federation.expect_nodes = {federation.expect_nodes} does nothing here: a run on this machine waits for its "
            f"{human_count(len(names), 'device')}"
        )
    if split.sites > len(names):
        yield f"WARNING: split.sites = {split.sites} is more than the {human_count(len(names), 'device')} of this run: some sites have none"
