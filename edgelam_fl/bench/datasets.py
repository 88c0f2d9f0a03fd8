"""Loads the data set of a matrix and deals it to devices as files, but for a test set that all share. Knows no run."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from edgelam_fl.bench import wordnet
from edgelam_fl.bench.matrix import Bench, Cell, attackers
from edgelam_fl.errors import ConfigError
from edgelam_fl.simulation.nodes_file import SimulatedNode, write_federation
from edgelam_fl.tasks.files import read_records
from edgelam_fl.tasks.named import local_data
from edgelam_fl.tasks.partition import deal

Row = tuple[str, str]  # prompt, answer
_CHOICE_SEED = 1
_FIELDS = (("gloss", "domain"), ("prompt", "answer"), ("question", "answer"), ("text", "label"))


@dataclass(frozen=True)
class Data:
    """The rows of a matrix: those to learn from and those to measure."""

    training: list[Row]
    test: list[Row]
    classes: tuple[str, ...]  # the answers of a classification; empty: answers are texts


def load(bench: Bench, folder: Path) -> Data:
    """Loads the data set; the test set is the same for every cell. folder: a data file's path is relative to it."""
    rows = _rows(bench.dataset, folder)
    chosen = random.Random(_CHOICE_SEED)
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


def _rows(dataset: str, folder: Path) -> list[Row]:
    if dataset == "wordnet":
        return wordnet.rows()
    if dataset == "docstrings":
        from edgelam_fl.tasks.docstrings import docstring_pairs

        return sorted({(pair.prompt, pair.answer) for pair in docstring_pairs()})
    path = local_data(Path(dataset)) if dataset.startswith("hf:") else folder / dataset
    if not path.exists():
        raise ConfigError(
            f"bench.dataset = {dataset!r} must be 'wordnet', 'docstrings', a data file or hf:NAME; none is at {path}"
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
        name = device_name(number)
        _write(folder / f"{name}.jsonl", [data.training[row] for row in chosen])
        _write(folder / f"{name}.test.jsonl", data.test[number :: bench.devices])
        attack = kind_count[0] if number < kind_count[1] else ""
        nodes.append(SimulatedNode(name=name, data=f"{name}.jsonl", held_out=f"{name}.test.jsonl", attack=attack))
    write_federation(folder, nodes)


def device_name(number: int) -> str:
    """Returns the name of a device, counted from 0."""
    return f"device-{number + 1:03d}"


def _write(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"prompt": prompt, "answer": answer}, ensure_ascii=False) + "\n" for prompt, answer in rows]
    path.write_text("".join(lines), encoding="utf-8")
