"""Writes the keys of the run file into pyproject.toml, as Flower's run config: `flwr run . --run-config "federation.rounds=2"`.

Flower takes only keys that pyproject.toml has, with a number, a truth value or a text. The text is empty for each key here, which means
"as in run-toml, else the default", so that a run file and single keys do not contradict each other.

    python -m tools.flower_config
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from edgelam_fl.config import RunConfig, toml_value

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
BEGIN = "# ---- keys of the run file, by `python -m tools.flower_config`; empty: as in run-toml, else the default behind it ----\n"
END = "# ---- end of the keys of the run file ----\n"


def block() -> str:
    """Returns the tables of the run config, a key per key of the run file."""
    return BEGIN + "\n".join(_table(name, field.annotation) for name, field in RunConfig.model_fields.items()) + END  # type: ignore[arg-type]


def _table(section: str, model: type[BaseModel]) -> str:
    lines = [f'{key} = ""   # {toml_value(default)}' for key, default in _leaves(model)]
    return "\n".join([f"[tool.flwr.app.config.{section}]", *lines]) + "\n"


def _leaves(model: type[BaseModel]) -> Iterator[tuple[str, object]]:
    """Yields each key with its default; of a section within a section, its keys."""
    for key, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from ((f"{key}.{inner}", default) for inner, default in _leaves(field.annotation))
        else:
            default = field.get_default(call_default_factory=True)
            yield key, list(default) if isinstance(default, tuple) else default


def with_block(project: str) -> str:
    """Returns the text of a pyproject.toml with the keys of today."""
    before, _, rest = project.partition(BEGIN)
    return f"{before}{block()}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PROJECT.write_text(with_block(PROJECT.read_text(encoding="utf-8")), encoding="utf-8")
