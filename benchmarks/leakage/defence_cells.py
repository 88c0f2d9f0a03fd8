"""The cells of the defences' table: what each setting asks of a run, the order of cells, and the file of those that are measured.

Knows neither training nor attacks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgelam_fl.config import RunConfig
from tests.support import run_config

MODEL, BASE, RANK, ALPHA = "smollm2-135m", "bf16", 16, 32.0
TEXTS_PER_STEP, SEEDS = 4, (1, 2, 3)
COMMON = (
    f"model.base={BASE}", f"lora.rank={RANK}", f"lora.alpha={ALPHA}", "lora.targets=all-linear", "task.template=plain",
    "task.loss_on=all", "task.max_tokens=96", f"federation.batch_size={TEXTS_PER_STEP}", "federation.evaluate_every=1000",
    "federation.step_deadline_s=36000.0", "federation.round_deadline_s=360000.0", "split.micro_batches=1", "split.window=1",
)  # fmt: skip
PRIVATE_FRONT = "privacy.private_front=true"
RIDGE, INVERTER, REPLAY = "ridge map", "inverter", "token by token"


@dataclass(frozen=True)
class Setting:
    """A defence as a run file would ask for it, tried at one or more cuts; the first one is trained at.

    `headline`: all its seeds are measured before those of the others.
    """

    name: str
    cuts: tuple[int, ...]
    keys: tuple[str, ...] = ()
    headline: bool = False

    @property
    def is_private(self) -> bool:
        return PRIVATE_FRONT in self.keys

    def config(self, model: str, cut: int, seed: int) -> RunConfig:
        return run_config(model, *COMMON, f"split.front={cut}", f"run.seed={seed}", *self.keys)

    def attackers(self, seed: int) -> tuple[bool, ...]:
        """Returns the attackers of a seed, each by whether it has the front's adapter.

        Of a private front one has it as an upper line, with the first seed alone.
        """
        if not self.is_private:
            return (True,)
        return (True, False) if seed == SEEDS[0] else (False,)


def blurred(noise: float) -> tuple[str, ...]:
    return "privacy.cut_clip=2.0", f"privacy.cut_noise={noise}"


def disguised(weight: float) -> tuple[str, ...]:
    return PRIVATE_FRONT, f"privacy.disguise={weight}"


def coded(codec: str) -> tuple[str, ...]:
    return f"wire.activation_codec={codec}", f"wire.gradient_codec={codec}"


NONE = Setting("no defence", (2, 8), headline=True)
SETTINGS = (
    NONE,
    Setting("noise 0.5", (2,), blurred(0.5)),
    Setting("noise 0.25", (2,), blurred(0.25)),
    Setting("noise 0.25, deep", (16,), blurred(0.25)),
    Setting("private front, deep", (8,), (PRIVATE_FRONT,)),
    Setting("private front, disguise 0.1, deep", (8,), disguised(0.1), headline=True),
    Setting("private front, disguise 0.3, deep", (8,), disguised(0.3), headline=True),
    Setting("private front, disguise 1", (2,), disguised(1.0)),
    Setting("private front, disguise 1, deep", (8,), disguised(1.0), headline=True),
    Setting("private front, disguise 1, noise 0.25, deep", (8,), (*disguised(1.0), *blurred(0.25))),
    Setting("int8 on the wire", (2,), coded("int8")),
    Setting("int4 on the wire", (2,), coded("int4")),
    Setting("int8 weights", (2,), ("model.base=int8",)),
    Setting("nf4 weights", (2,), ("model.base=nf4",)),
)
SMOKE = Setting("all", (2,), (*disguised(1.0), *blurred(0.125), *coded("int8")))


@dataclass(frozen=True)
class Sizes:
    """Steps, and numbers of texts: held out, attacked, attacked token by token, and of each public kind."""

    steps: int = 30
    held_out: int = 30
    read: int = 40
    replayed: int = 6
    glosses: int = 200
    docstrings: int = 250


SMALL = Sizes(steps=2, held_out=2, read=4, replayed=1, glosses=6, docstrings=6)


@dataclass(frozen=True)
class Row:
    """One setting at one cut with one seed. `known`: whether the attacker has a private front's adapter."""

    name: str
    cut: int
    seed: int
    known: bool
    perplexity: float
    cpu_s_per_step: float
    bytes_per_step: int
    weights_bytes: int
    shares: dict[str, float]

    @property
    def best(self) -> float:
        return max(self.shares.values())


def in_order(settings: Sequence[Setting], seeds: Sequence[int]) -> Iterator[tuple[Setting, int]]:
    """Yields the cells in the order in which they are worth most: headlines with all seeds, then the others, seed by seed."""
    for headline in (True, False):
        yield from ((setting, seed) for seed in seeds for setting in settings if setting.headline is headline)


class Kept:
    """The cells that were measured, one line of a file each, written as soon as it is done."""

    def __init__(self, file: Path, terms: Mapping[str, Any]) -> None:
        """`terms`: what all cells have in common; cells of other terms do not count."""
        self._file, self._terms = file, dict(terms)

    def rows(self, setting: Setting, seed: int) -> list[Row] | None:
        """Returns what a cell measured; None: it was not measured under these keys and terms."""
        lines = self._file.read_text(encoding="utf-8").splitlines() if self._file.exists() else []
        own = self._head(setting, seed)
        for line in map(json.loads, lines):
            if {key: line[key] for key in own} == own:
                return [Row(**row) for row in line["rows"]]
        return None

    def add(self, setting: Setting, seed: int, rows: Sequence[Row]) -> None:
        line = self._head(setting, seed) | {"rows": [asdict(row) for row in rows]}
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _head(self, setting: Setting, seed: int) -> dict[str, Any]:
        return {"setting": setting.name, "keys": list(setting.keys), "seed": seed, "terms": self._terms}
