"""A matrix file: what all cells share, and the axes that tell them apart. One TOML file, every value checked.

[bench] says on what data and devices, [base] is any part of a run file ([base.model], [base.federation], ...), [axes] the
values that are tried in every combination, [protocols] how the results are read.
"""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator

from edgelam_fl.bench.partition import check_partition
from edgelam_fl.config import RunConfig, Section, parse_run_file, toml_value
from edgelam_fl.errors import ConfigError, nearest
from edgelam_fl.simulation.attacks import ATTACKS

# The key of the run file that an axis sets; the others are about the data and the devices.
RUN_KEYS = {
    "aggregation": "strategy.aggregation",
    "selection": "strategy.selection",
    "bandwidth": "strategy.bandwidth",
    "seed": "run.seed",
    "rank": "lora.rank",
}


class Bench(Section):
    dataset: str = Field("wordnet", min_length=1, description="wordnet, docstrings, or a data file beside the matrix")
    examples: int = Field(0, ge=0, description="of the data set, chosen by a fixed seed; 0: all")
    test: float = Field(0.2, gt=0, lt=1, description="share that is measured, the same for all cells of a seed")
    devices: int = Field(20, ge=1, le=1000, description="that the rest is dealt to")
    baseline: str = Field(
        "fedavg", description="the aggregation, selection or bandwidth that the others are compared with"
    )
    references: bool = Field(True, description="measure TF-IDF with logistic regression, and one device with all data")


class Axes(Section):
    aggregation: tuple[str, ...] = ("fedavg",)
    selection: tuple[str, ...] = ("all",)
    bandwidth: tuple[str, ...] = ("uniform",)
    partition: tuple[str, ...] = ("iid",)
    rank: tuple[int, ...] = (8,)
    attack: tuple[str, ...] = ("none",)
    seed: tuple[int, ...] = (1,)

    @field_validator("*", mode="before")
    @classmethod
    def as_tuple(cls, value: Any) -> Any:
        """A single value is an axis of one."""
        values = tuple(value) if isinstance(value, list | tuple) else (value,)
        if not values or len(set(values)) < len(values):
            raise ValueError("must hold at least one value, each once")
        return values


class Protocols(Section):
    budget_bytes: float = Field(0.0, ge=0, description="quality when so many bytes have gone up and down; 0: not asked")
    budget_seconds: float = Field(0.0, ge=0, description="quality after so many virtual seconds")
    budget_joules: float = Field(0.0, ge=0, description="quality when so much energy is spent")
    target: float = Field(0.0, ge=0, description="bytes, seconds and energy until the quality is so good")


@dataclass(frozen=True)
class Cell:
    """One federation of the matrix: an axis' value by its name."""

    values: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Of its folder; the same whatever the order of the axes."""
        return "_".join(str(self.values[axis]).replace(":", "-") for axis in Axes.model_fields)

    def same_but(self, *axes: str) -> tuple[Any, ...]:
        """What it shares with the cells that differ in these axes only."""
        return tuple(value for axis, value in sorted(self.values.items()) if axis not in axes)


@dataclass(frozen=True)
class Matrix:
    name: str
    folder: Path  # where the file lies
    bench: Bench
    axes: Axes
    protocols: Protocols
    base: Mapping[str, Any]

    def cells(self) -> list[Cell]:
        """Seed by seed, so that an interrupted matrix has whole comparisons."""
        axes = {name: getattr(self.axes, name) for name in Axes.model_fields}
        names = ["seed", *(name for name in axes if name != "seed")]
        return [Cell(dict(zip(names, values, strict=True))) for values in itertools.product(*(axes[n] for n in names))]

    def trainings(self, cells: Sequence[Cell]) -> list[list[Cell]]:
        """`cells` by what has to be trained once: on the wireless model those that differ in the bandwidth are one training.

        What a round learns does not depend on how the band was shared out, so the other cells' times are replayed.
        """
        replays = bool(self.base.get("wireless", {}).get("bandwidth_hz"))
        found: dict[Any, list[Cell]] = {}
        for cell in cells:
            found.setdefault(cell.same_but("bandwidth") if replays else cell.name, []).append(cell)
        return list(found.values())

    @property
    def compared(self) -> str:
        """The axis that the baseline is a value of."""
        axes = ("aggregation", "selection", "bandwidth")
        return next((axis for axis in axes if self.bench.baseline in getattr(self.axes, axis)), axes[0])

    def varied(self) -> list[str]:
        """The axes with more than one value, but the seed."""
        return [name for name in Axes.model_fields if name != "seed" and len(getattr(self.axes, name)) > 1]

    def config(self, cell: Cell, classes: Sequence[str]) -> RunConfig:
        """The run file of a cell. Raises ConfigError where it cannot be one."""
        data = {section: dict(keys) for section, keys in self.base.items()}
        for axis, key in RUN_KEYS.items():
            section, name = key.split(".")
            data.setdefault(section, {})[name] = cell.values[axis]
        if classes:
            data.setdefault("task", {}).update(kind="classification", classes=list(classes))
        federation = data.setdefault("federation", {})
        federation.setdefault("min_nodes", 1)
        federation.update(wait="park", expect_nodes=self.bench.devices)
        data["data"] = {**data.get("data", {}), "fields": {"prompt": "prompt", "answer": "answer"}}
        text = "".join(
            f"[{section}]\n" + "".join(f"{key} = {toml_value(value)}\n" for key, value in keys.items())
            for section, keys in data.items()
        )
        return parse_run_file(text, source=f"the matrix {self.name}")


def read_matrix(path: Path) -> Matrix:
    """Raises ConfigError with what is wrong in the file."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"no matrix file at {path}; the built ones are in benchmarks/matrices") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the matrix file {path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    return parse_matrix(data, path)


def parse_matrix(data: Mapping[str, Any], path: Path) -> Matrix:
    sections: dict[str, type[Section]] = {"bench": Bench, "axes": Axes, "protocols": Protocols}
    for name in data:
        if name not in (*sections, "base"):
            raise ConfigError(f"unknown section [{name}] in {path}: {nearest(name, [*sections, 'base'])}")
    bench, axes, protocols = (_section(name, kind, data.get(name, {}), path) for name, kind in sections.items())
    base = data.get("base", {})
    for section, keys in base.items():
        if not isinstance(keys, dict):
            raise ConfigError(
                f"[base] in {path} holds sections of a run file, as in [base.model]; got {section} = {keys!r}"
            )
        taken = [key for key in RUN_KEYS.values() if key.startswith(f"{section}.") and key.split(".")[1] in keys]
        if taken:
            axis = next(axis for axis, key in RUN_KEYS.items() if key == taken[0])
            raise ConfigError(f"base.{taken[0]} in {path} is an axis: write it as axes.{axis}")
    for partition in axes.partition:
        check_partition(partition, path)
    for attack in axes.attack:
        _check_attack(attack, bench.devices, path)
    matrix = Matrix(path.stem, path.parent, bench, axes, protocols, base)
    matrix.config(matrix.cells()[0], ())  # a misspelt key of the run file is said before data are fetched
    return matrix


def _section(name: str, kind: type[Section], values: Any, path: Path) -> Any:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in (name, *problem["loc"]) if not isinstance(part, int))
        if problem["type"] == "extra_forbidden":
            word = "axis" if name == "axes" else "key"
            raise ConfigError(
                f"unknown {word} {key} in {path}: {nearest(str(problem['loc'][-1]), kind.model_fields)}"
            ) from error
        rule = problem["msg"].replace("Input should be", "must be").removeprefix("Value error, ")
        raise ConfigError(f"{key} = {problem['input']!r} {rule} (in {path})") from error


def attackers(attack: str) -> tuple[str, int]:
    """(kind, how many devices) of "sign-flip:4"; ("", 0) of "none"."""
    kind, _, count = attack.partition(":")
    return ("", 0) if attack == "none" else (kind, int(count))


def _check_attack(attack: str, devices: int, path: Path) -> None:
    kind, colon, count = attack.partition(":")
    if attack == "none":
        return
    if kind not in ATTACKS:
        raise ConfigError(f"axes.attack = {attack!r} in {path} is not known; {nearest(kind, [*ATTACKS, 'none'])}")
    if not (colon and count.isdigit() and 1 <= int(count) < devices):
        raise ConfigError(
            f"axes.attack = {attack!r} in {path} must say how many of the {devices} devices are malicious, 1 to "
            f"{devices - 1}, as in '{kind}:1'"
        )
