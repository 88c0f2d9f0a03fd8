"""Reads and checks a matrix file: the settings that all cells have in common, and the axes in which they differ.

[bench] has the data and the devices, [base] any part of a run file ([base.model], [base.federation], ...), [axes] the
values to try in every combination, [protocols] how to read the results, [tune] what is chosen for each strategy beforehand. Knows
no process and no data.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator

from edgelam_fl.config import RunConfig, Section, parse_run_file, parse_toml, toml_value
from edgelam_fl.errors import ConfigError, nearest
from edgelam_fl.simulation.attacks import ATTACKS
from edgelam_fl.tasks.kinds import values_of
from edgelam_fl.tasks.partition import check_partition

# The key of the run file that an axis sets; the others are about the data and the devices.
RUN_KEYS = {
    "aggregation": "strategy.aggregation",
    "selection": "strategy.selection",
    "bandwidth": "strategy.bandwidth",
    "seed": "run.seed",
    "rank": "lora.rank",
    "epsilon": "privacy.epsilon",
}
NO_PRIVACY = "none"  # of the axis epsilon
WITH_SETTINGS = (
    "aggregation",
    "selection",
)  # axes whose values may bring settings: "fedadam eta=0.1 optimizer.lr=0.002"


class Bench(Section):
    """The section [bench]: data, devices and what to compare with."""

    dataset: str = Field(
        "wordnet",
        min_length=1,
        description="wordnet, docstrings, a data file beside the matrix, or hf:NAME; of radio tasks sectors or links, drawn from a fixed seed",
    )
    examples: int = Field(0, ge=0, description="examples of the data set, chosen by a fixed seed; 0: all")
    test: float = Field(0.2, gt=0, lt=1, description="share of the examples to measure with, the same for all cells")
    devices: int = Field(20, ge=1, le=1000, description="devices that the other examples are dealt to")
    baseline: str = Field("fedavg", description="the aggregation, selection or bandwidth to compare the others with")
    references: bool = Field(
        True, description="also measure TF-IDF with logistic regression, and one device with all data"
    )


class Axes(Section):
    """The section [axes]: the values to try, in every combination."""

    aggregation: tuple[str, ...] = ("fedavg",)
    selection: tuple[str, ...] = ("all",)
    bandwidth: tuple[str, ...] = ("uniform",)
    partition: tuple[str, ...] = ("iid",)
    rank: tuple[int, ...] = (8,)
    attack: tuple[str, ...] = ("none",)
    epsilon: tuple[float | str, ...] = (NO_PRIVACY,)
    seed: tuple[int, ...] = (1,)

    @field_validator("*", mode="before")
    @classmethod
    def as_tuple(cls, value: Any) -> Any:
        """Makes a single value an axis of one."""
        values = tuple(value) if isinstance(value, list | tuple) else (value,)
        if not values or len(set(values)) < len(values):
            raise ValueError("must hold at least one value, each once")
        return values

    @field_validator("epsilon")
    @classmethod
    def epsilons(cls, value: tuple[float | str, ...]) -> tuple[float | str, ...]:
        """Refuses what is neither a privacy budget nor its absence."""
        if not all(one == NO_PRIVACY or (isinstance(one, float) and one > 0) for one in value):
            raise ValueError(f"must hold numbers above 0, or '{NO_PRIVACY}' for a run without privacy")
        return value


class Protocols(Section):
    """The section [protocols]: at which budget or target to read the results."""

    budget_bytes: float = Field(
        0.0, ge=0, description="read the quality once this many bytes were sent and received; 0: do not"
    )
    budget_seconds: float = Field(0.0, ge=0, description="read the quality after this many virtual seconds; 0: do not")
    budget_joules: float = Field(
        0.0, ge=0, description="read the quality once this much energy was spent, in joules; 0: do not"
    )
    target: float = Field(
        0.0, ge=0, description="read bytes, seconds and energy when the quality first reaches this; 0: do not"
    )


class Tune(Section):
    """The section [tune]: settings that are chosen for each strategy, before the cells run."""

    keys: dict[str, list[Any]] = Field(
        {}, description="values to choose from, by the run file's key, as in { 'optimizer.lr' = [2e-3, 5e-3] }"
    )
    seed: int = Field(0, ge=0, description="seed of the tries, none of the axis")
    share: float = Field(0.2, gt=0, lt=1, description="share of the training examples that the tries are measured with")


@dataclass(frozen=True)
class Cell:
    """One federation of the matrix: a value per axis, by the axis' name."""

    values: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The cell's name and its folder's; independent of the order of the axes in the file. Says epsilon if there is one."""
        values = {axis: _in_names(str(self.values[axis])) for axis in Axes.model_fields if axis != "epsilon"}
        seed = values.pop("seed")
        return "_".join([*values.values(), *([f"epsilon-{self.values['epsilon']:g}"] if self.private else []), seed])

    @property
    def private(self) -> bool:
        """Whether the run promises an epsilon."""
        return bool(self.values["epsilon"] != NO_PRIVACY)

    def settings(self) -> Iterator[tuple[str, str, Any]]:
        """Yields the section, key and value of each setting that a value of an axis brings, and of each such strategy's name."""
        for axis in WITH_SETTINGS:
            name, *settings = str(self.values[axis]).split()
            yield "strategy", axis, name
            for setting in settings:
                key, _, text = setting.partition("=")
                section, _, inner = key.rpartition(".")
                value = parse_toml(f"value = {text}", setting)["value"]
                yield (section, inner, value) if section else (f"strategy.options.{name}", key, value)

    def same_but(self, *axes: str) -> tuple[Any, ...]:
        """Returns a key that this cell has in common with the cells that differ in `axes` only."""
        return tuple(value for axis, value in sorted(self.values.items()) if axis not in axes)


def _in_names(value: str) -> str:
    return re.sub(r"[^\w.+-]", "-", value)


def _at(data: dict[str, Any], section: str) -> dict[str, Any]:
    """Returns the table of a dotted name, which is made if it is not there; tables on the way are copied."""
    for name in section.split("."):
        data[name] = dict(data.get(name, {}))
        data = data[name]
    return data


@dataclass(frozen=True)
class Matrix:
    """A matrix file, read and checked."""

    name: str
    folder: Path  # the file's
    bench: Bench
    axes: Axes
    protocols: Protocols
    base: Mapping[str, Any]
    tune: Tune = field(default_factory=Tune)

    def cells(self) -> list[Cell]:
        """Lists the cells seed by seed, so that an interrupted matrix has whole comparisons."""
        axes = {name: getattr(self.axes, name) for name in Axes.model_fields}
        names = ["seed", *(name for name in axes if name != "seed")]
        return [Cell(dict(zip(names, values, strict=True))) for values in itertools.product(*(axes[n] for n in names))]

    def trainings(self, cells: Sequence[Cell]) -> list[list[Cell]]:
        """Groups `cells` by training: with a wireless model, cells that differ in the bandwidth only need one training.

        What a round learns does not depend on the shares of the band, so the times of the other cells are replayed.
        """
        replays = bool(self.base.get("wireless", {}).get("bandwidth_hz"))
        found: dict[Any, list[Cell]] = {}
        for cell in cells:
            found.setdefault(cell.same_but("bandwidth") if replays else cell.name, []).append(cell)
        return list(found.values())

    @property
    def compared(self) -> str:
        """The axis that has the baseline among its values."""
        axes = ("aggregation", "selection", "bandwidth")
        return next((axis for axis in axes if self.bench.baseline in getattr(self.axes, axis)), axes[0])

    def varied(self) -> list[str]:
        """Lists the axes with more than one value, without the seed."""
        return [name for name in Axes.model_fields if name != "seed" and len(getattr(self.axes, name)) > 1]

    def config(self, cell: Cell, classes: Sequence[str]) -> RunConfig:
        """Returns the run file of a cell; without an epsilon, it has no section [privacy].

        Raises ConfigError for a value that no run file may have.
        """
        data = {section: dict(keys) for section, keys in self.base.items()}
        if cell.private:
            data["privacy"] = {"mode": "central", **data.get("privacy", {})}
        else:
            data.pop("privacy", None)
        for axis, key in RUN_KEYS.items():
            section, name = key.split(".")
            if axis not in WITH_SETTINGS and (axis != "epsilon" or cell.private):
                data.setdefault(section, {})[name] = cell.values[axis]
        for section, name, value in cell.settings():
            _at(data, section)[name] = value
        if classes:
            data.setdefault("task", {}).update(kind="classification", classes=list(classes))
        federation = data.setdefault("federation", {})
        federation.setdefault("min_nodes", 1)
        federation.update(wait="park", expect_nodes=self.bench.devices)
        if values_of(str(data.get("task", {}).get("kind", ""))) is None:
            data["data"] = {**data.get("data", {}), "fields": {"prompt": "prompt", "answer": "answer"}}
        text = "".join(
            f"[{section}]\n" + "".join(f"{key} = {toml_value(value)}\n" for key, value in keys.items())
            for section, keys in data.items()
        )
        config = parse_run_file(text, source=f"the matrix {self.name}")
        if config.task.metrics:
            raise ConfigError(
                f"task.metrics = {list(config.task.metrics)} in the matrix {self.name}: simulated nodes keep what frozen layers make of "
                f"each text, and would keep it for every token of every answer. Allowed: no metrics, or `edgelam run` for them"
            )
        return config


def read_matrix(path: Path) -> Matrix:
    """Reads a matrix file. Raises ConfigError with the first key or value that is wrong."""
    try:
        data = parse_toml(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError as error:
        raise ConfigError(
            f"no matrix file at {path}; `edgelam examples` copies the built ones (benchmarks/matrices)"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the matrix file {path} cannot be read: {error}") from error
    return parse_matrix(data, path)


def parse_matrix(data: Mapping[str, Any], path: Path) -> Matrix:
    """Checks the content of a matrix file; `path` is the file's. Raises ConfigError as `read_matrix`."""
    sections: dict[str, type[Section]] = {"bench": Bench, "axes": Axes, "protocols": Protocols, "tune": Tune}
    for name in data:
        if name not in (*sections, "base"):
            raise ConfigError(f"unknown section [{name}] in {path}: {nearest(name, [*sections, 'base'])}")
    bench, axes, protocols, tune = (_section(name, kind, data.get(name, {}), path) for name, kind in sections.items())
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
    for axis in WITH_SETTINGS:
        for value in getattr(axes, axis):
            _check_settings(axis, value, path)
    for attack in axes.attack:
        _check_attack(attack, bench.devices, path)
    if base.get("privacy") and axes.epsilon == (NO_PRIVACY,):
        raise ConfigError(
            f"[base.privacy] in {path} has no effect on a run without an epsilon: give axes.epsilon a number"
        )
    matrix = Matrix(path.stem, path.parent, bench, axes, protocols, base, tune)
    if tune.keys:
        _check_tune(matrix, path)
    matrix.config(matrix.cells()[0], ())  # refuses a misspelt key of the run file before data are fetched
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


def _check_settings(axis: str, value: str, path: Path) -> None:
    """Raises ConfigError if what follows a strategy's name on an axis is not settings."""
    for setting in value.split()[1:]:
        key, equals, text = setting.partition("=")
        try:
            parse_toml(f"value = {text}", setting)
        except ConfigError:
            equals = ""
        if not (key and equals and text):
            raise ConfigError(
                f"axes.{axis} = {value!r} in {path}: {setting!r} must be an option of the strategy or a key of the run file, as in "
                f"'fedadam eta=0.1 optimizer.lr=0.002'"
            )


def _check_tune(matrix: Matrix, path: Path) -> None:
    """Raises ConfigError if the tries could not be compared, or would be measured on a seed of the cells."""
    axis, tune = matrix.compared, matrix.tune
    if axis not in WITH_SETTINGS or matrix.bench.baseline not in getattr(matrix.axes, axis):
        raise ConfigError(
            f"[tune] in {path} chooses settings for the strategies of one axis ({', '.join(WITH_SETTINGS)}), and bench.baseline = "
            f"{matrix.bench.baseline!r} is on none of them"
        )
    if tune.seed in matrix.axes.seed:
        raise ConfigError(f"tune.seed = {tune.seed} in {path} must not be one of axes.seed: the cells would tell twice")
    for key, values in tune.keys.items():
        if "." not in key or not values:
            raise ConfigError(
                f"tune.keys.{key} = {values} in {path} must be a key of the run file with values to choose from, as in "
                f"{{ 'optimizer.lr' = [2e-3, 5e-3] }}"
            )


def attackers(attack: str) -> tuple[str, int]:
    """Splits an attack into (kind, number of devices): "sign-flip:4"; ("", 0) for "none"."""
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
