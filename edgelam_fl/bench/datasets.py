"""Loads the data set of a matrix and deals it to devices as files, but for a test set that all share. Knows no run.

A data set of a radio task is drawn from a fixed seed; its rows are the numbers of samples in arrays, and what makes them unlike.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgelam_fl.bench import wordnet
from edgelam_fl.bench.matrix import Bench, Cell, attackers
from edgelam_fl.errors import ConfigError
from edgelam_fl.simulation.nodes_file import SimulatedNode, write_federation
from edgelam_fl.tasks.files import read_records
from edgelam_fl.tasks.kinds import values_of
from edgelam_fl.tasks.named import local_data
from edgelam_fl.tasks.partition import deal
from edgelam_fl.wireless.channels.paths import Paths
from edgelam_fl.wireless.channels.sectors import Sector

Row = tuple[str, str]  # prompt and answer; or the number of a sample, and the label by which a skew deals it
Arrays = Mapping[str, np.ndarray]  # by key, the first axis over samples
_CHOICE_SEED = 1
_SAMPLES = 400  # of a radio task, if bench.examples is 0
_SECTORS = {  # the kinds of sectors by name: as many users each, so that one file may hold all
    "wide": Sector(),
    "narrow": Sector(sector_deg=20.0, spread_deg=5.0),
    "uneven": Sector(spread_deg=20.0, shadow_db=8.0),
}
_FIELDS = (("gloss", "domain"), ("prompt", "answer"), ("question", "answer"), ("text", "label"))


@dataclass(frozen=True)
class Data:
    """The rows of a matrix: those to learn from and those to measure."""

    training: list[Row]
    test: list[Row]
    classes: tuple[str, ...]  # the answers of a classification; empty: answers are texts, or there are none
    arrays: Arrays = field(default_factory=dict)  # of a radio task, whose rows are numbers of samples


def load(bench: Bench, folder: Path) -> Data:
    """Loads the data set; the test set is the same for every cell. folder: a data file's path is relative to it."""
    chosen = random.Random(_CHOICE_SEED)
    if bench.dataset in _DRAWN:
        arrays, labels = _DRAWN[bench.dataset](bench.examples or _SAMPLES)
        samples = [(str(number), label) for number, label in enumerate(labels)]
        chosen.shuffle(samples)
        count = max(1, round(bench.test * len(samples)))
        return Data(samples[count:], samples[:count], (), arrays)
    rows = _rows(bench.dataset, folder)
    if bench.examples > len(rows):
        raise ConfigError(f"bench.examples = {bench.examples} must be at most {len(rows)}, what {bench.dataset} has")
    rows = chosen.sample(rows, bench.examples or len(rows))
    answers = {answer for _, answer in rows}
    classes = tuple(sorted(answers)) if len(answers) <= 100 else ()
    count = max(1, round(bench.test * len(rows)))
    test, training = rows[:count], rows[count:]
    learned = {answer for _, answer in training}
    unlearned = [row for row in test if classes and row[1] not in learned]  # no device could learn these classes
    return Data(training + unlearned, [row for row in test if row not in unlearned], classes)


def check_fits(dataset: str, data: Data, kind: str) -> None:
    """Raises ConfigError if a task of this kind does not learn from what the data set holds."""
    values = values_of(kind)
    needed = [array.key for array in values.arrays if array.required] if values is not None else []
    if bool(needed) != bool(data.arrays) or not {*needed} <= data.arrays.keys():
        holds, learns = (f"the arrays {', '.join(keys)}" if keys else "texts" for keys in (data.arrays, needed))
        raise ConfigError(
            f"bench.dataset = {dataset!r} holds {holds}, and task.kind = {kind!r} learns from {learns}. Allowed: 'sectors' with "
            f"'beamforming', 'links' with 'channel-prediction', any other data set with a task of texts"
        )


def _sectors(count: int) -> tuple[Arrays, list[str]]:
    """Returns channels of so many samples, of each kind of sector as many, and the kinds."""
    kinds = [[*_SECTORS][number % len(_SECTORS)] for number in range(count)]
    drawn = {kind: list(sector.draw(count, _CHOICE_SEED + at)) for at, (kind, sector) in enumerate(_SECTORS.items())}
    return {"channels": np.stack([drawn[kind].pop() for kind in kinds])}, kinds


def _links(count: int) -> tuple[Arrays, list[str]]:
    """Returns links of users at several speeds, half a megabyte each, and the speeds."""
    links = Paths(count, _CHOICE_SEED).draw()
    return {"up": links.up_NTFM, "speed_kmh": links.speed_kmh}, [f"{speed:g} km/h" for speed in links.speed_kmh]


_DRAWN: Mapping[str, Callable[[int], tuple[Arrays, list[str]]]] = {"sectors": _sectors, "links": _links}


def _rows(dataset: str, folder: Path) -> list[Row]:
    if dataset == "wordnet":
        return wordnet.rows()
    if dataset == "docstrings":
        from edgelam_fl.tasks.docstrings import docstring_pairs

        return sorted({(pair.prompt, pair.answer) for pair in docstring_pairs()})
    path = local_data(Path(dataset)) if dataset.startswith("hf:") else folder / dataset
    if not path.exists():
        raise ConfigError(
            f"bench.dataset = {dataset!r} must be 'wordnet', 'docstrings', 'sectors', 'links', a data file or hf:NAME; none is at {path}"
        )
    records = [values for _, values in read_records(path)]
    for prompt, answer in _FIELDS:
        if all(isinstance(record.get(name), str) for record in records for name in (prompt, answer)):
            return [(record[prompt], record[answer]) for record in records]
    raise ConfigError(f"{path} needs two fields: {', or '.join(' and '.join(pair) for pair in _FIELDS)}")


def write_cell(folder: Path, data: Data, bench: Bench, cell: Cell, hosts: int) -> None:
    """Writes a cell's federation: per device its own examples and its part of the test set.

    All devices together measure the whole test set: their mean is the accuracy of the shared adapter on it; with personal
    adapters, the mean of each adapter on its part. The malicious devices are the first ones: since the data are dealt at
    random, that is not a special choice.
    """
    seed, kind_count = int(cell.values["seed"]), attackers(str(cell.values["attack"]))
    dealt = deal([answer for _, answer in data.training], bench.devices, str(cell.values["partition"]), seed)
    nodes = [SimulatedNode(name=f"edge-{number}") for number in range(1, hosts + 1)]
    for number, chosen in enumerate(dealt):
        name, end = device_name(number), "npz" if data.arrays else "jsonl"
        _write(folder / f"{name}.{end}", [data.training[row] for row in chosen], data.arrays)
        _write(folder / f"{name}.test.{end}", data.test[number :: bench.devices], data.arrays)
        attack = kind_count[0] if number < kind_count[1] else ""
        nodes.append(SimulatedNode(name=name, data=f"{name}.{end}", held_out=f"{name}.test.{end}", attack=attack))
    write_federation(folder, nodes)


def device_name(number: int) -> str:
    """Returns the name of a device, counted from 0."""
    return f"device-{number + 1:03d}"


def _write(path: Path, rows: list[Row], arrays: Arrays) -> None:
    """Writes rows as examples of texts, or as samples of arrays; without any row an empty file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if arrays and rows:
        chosen: dict[str, Any] = {key: array[[int(number) for number, _ in rows]] for key, array in arrays.items()}
        np.savez(path, **chosen)
        return
    lines = [json.dumps({"prompt": prompt, "answer": answer}, ensure_ascii=False) + "\n" for prompt, answer in rows]
    path.write_text("".join(lines), encoding="utf-8")
