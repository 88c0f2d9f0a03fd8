"""Reads and writes run files in TOML: parses them, applies overrides, explains what is wrong with them."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from edgelam_fl.config.schema import RunConfig
from edgelam_fl.errors import ConfigError, nearest
from edgelam_fl.files import from_home

_BYTE_ORDER_MARK = "\ufeff"  # with which some editors begin a file


def toml_value(value: Any) -> str:
    """Writes one value as a run file spells it."""
    if not value and isinstance(value, dict):
        return "{}"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_toml_key(key)} = {toml_value(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(toml_value(inner) for inner in value) + "]"
    # TOML's basic strings, numbers and booleans are JSON's, but for one character that TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)


def to_toml(config: RunConfig) -> str:
    """Writes the whole configuration as a run file."""
    sections = []
    for name, section in config.model_dump(mode="json").items():
        lines = [f"{key} = {toml_value(value)}" for key, value in section.items()]
        sections.append(f"[{name}]\n" + "\n".join(lines) + "\n")
    return "\n".join(sections)


def parse_run_file(text: str, *, source: str, overrides: str | list[str] = ()) -> RunConfig:  # type: ignore[assignment]
    """Parses and checks a run file's text with its `section.key=value` overrides.

    `source` says in messages where the text came from. Raises ConfigError with the key, the value and the rule.
    """
    data = parse_toml(text, source)
    try:
        words = shlex.split(overrides) if isinstance(overrides, str) else overrides
    except ValueError as error:
        raise ConfigError(f"the overrides {overrides!r} cannot be split into words: {error}") from error
    for override in words:
        _override(data, override)
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(problem, source) for problem in error.errors())) from error


def parse_toml(text: str, source: str) -> dict[str, Any]:
    """Parses TOML. `source` says in messages where the text came from. Raises ConfigError for a text that is none."""
    try:
        return tomllib.loads(text.removeprefix(_BYTE_ORDER_MARK))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source} is not TOML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{source} is not TOML: its values are nested too deeply") from error
    except ValueError as error:  # Python's limit of digits
        raise ConfigError(f"{source} is not TOML: a number in it has thousands of digits") from error


def without_home(config: RunConfig) -> RunConfig:
    """Returns the same run file with paths that begin in this user's home folder written with ~, for what people share."""
    model = config.model.model_copy(update={"name": from_home(config.model.name)})
    run = config.run.model_copy(update={"out": from_home(config.run.out)})
    return config.model_copy(update={"model": model, "run": run})


def read_run_file(path: Path, overrides: list[str] = ()) -> RunConfig:  # type: ignore[assignment]
    """Reads a run file and applies `overrides`. Raises ConfigError if it is missing, unreadable or wrong."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(
            f"no run file at {path}; `edgelam init {path}` writes one, and `edgelam demo` needs none"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"the run file {path} is not UTF-8 (byte {error.start} is {error.object[error.start]:#04x}); save it as UTF-8"
        ) from error
    except OSError as error:
        raise ConfigError(f"the run file {path} cannot be read: {error.strerror}") from error
    return parse_run_file(text, source=str(path), overrides=overrides)


def _override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or "." not in key:
        raise ConfigError(f"--set {override!r} must look like section.key=value, as in --set federation.rounds=2")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text  # bare words need no quotes on a command line
    *parents, last = key.strip().split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise ConfigError(f"--set {override!r}: {parent} is a value, not a section")
    data[last] = value


def _explain(problem: Mapping[str, Any], source: str) -> str:
    """Turns one pydantic problem into one line with key, value, rule and place."""
    where = [str(part) for part in problem["loc"] if not isinstance(part, int)]
    key, value, context = ".".join(where), problem["input"], problem.get("ctx", {})
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key} in {source}: {nearest(key, known_keys())}"
    if problem["type"] == "value_error":
        rule = str(context["error"])
        return f"{key} = {value!r} {rule} (in {source})" if key else f"{rule} (in {source})"
    rule = (
        problem["msg"]
        .replace("Input should be", "must be")
        .replace("Tuple should", "must")
        .replace("String should", "must")
    )
    return f"{key} = {value!r} {rule} (in {source})"


def known_keys() -> list[str]:
    """Lists every key of a run file with its dots, and every section."""
    keys = []
    for section, field in RunConfig.model_fields.items():
        keys.append(section)
        for key, inner in field.annotation.model_fields.items():  # type: ignore[union-attr]
            keys.append(f"{section}.{key}")
            if isinstance(inner.annotation, type) and issubclass(inner.annotation, BaseModel):
                keys.extend(f"{section}.{key}.{leaf}" for leaf in inner.annotation.model_fields)
    return keys
