"""Reads and writes run files in TOML: parses them, applies overrides, explains what is wrong with them."""

from __future__ import annotations

import difflib
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


def changed_keys(config: RunConfig) -> dict[str, Any]:
    """Returns the keys with another value than the default, as section.key, with the values as a run file has them."""
    standard, values = RunConfig().model_dump(mode="json"), config.model_dump(mode="json")
    return {
        f"{section}.{key}": value
        for section, keys in values.items()
        for key, value in keys.items()
        if value != standard[section][key]
    }


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
    places = {"name": from_home(config.model.name), "adapter": from_home(config.model.adapter)}
    model = config.model.model_copy(update=places)
    run = config.run.model_copy(update={"out": from_home(config.run.out)})
    return config.model_copy(update={"model": model, "run": run})


def read_run_file(path: Path, overrides: list[str] = ()) -> RunConfig:  # type: ignore[assignment]
    """Reads a run file and applies `overrides`. Raises ConfigError if it is missing, unreadable or wrong."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        new = path if path.suffix == ".toml" else path.with_name("run.toml")
        raise ConfigError(
            f"no run file at {path}; `edgelam init {new}` writes one, and `edgelam run --data FILE` and `edgelam demo` need none"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"the run file {path} is not UTF-8 (byte {error.start} is {error.object[error.start]:#04x}); save it as UTF-8"
        ) from error
    except OSError as error:
        raise ConfigError(f"the run file {path} cannot be read: {error.strerror}") from error
    try:
        return parse_run_file(text, source=str(path), overrides=overrides)
    except ConfigError as error:
        if path.suffix == ".toml" or " is not TOML" not in str(error):
            raise
        ways = "a run file's name ends in .toml: `edgelam init run.toml` writes one; data go behind --data"
        raise ConfigError(f"{error}; {ways}") from error


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
        return f"unknown key {key} in {source}: {nearest_key(key)}"
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


# What other programs call a key: transformers and peft, Flower, and what is typed out of habit.
ELSEWHERE = {
    "learning_rate": "optimizer.lr", "lr_scheduler_type": "optimizer.schedule", "scheduler": "optimizer.schedule",
    "warmup": "optimizer.warmup_steps", "max_grad_norm": "optimizer.max_norm", "gradient_clipping": "optimizer.clip",
    "beta1": "optimizer.betas", "beta2": "optimizer.betas", "optim": "optimizer.name",
    "per_device_train_batch_size": "federation.batch_size", "train_batch_size": "federation.batch_size",
    "batch": "federation.batch_size", "num_train_epochs": "federation.epochs", "num_epochs": "federation.epochs",
    "max_steps": "federation.local_steps", "steps": "federation.local_steps", "num_rounds": "federation.rounds",
    "num_server_rounds": "federation.rounds", "fraction_fit": "federation.devices_per_round",
    "fraction_train": "federation.devices_per_round", "min_clients": "federation.min_nodes",
    "min_available_clients": "federation.min_nodes", "min_fit_clients": "federation.min_nodes", "r": "lora.rank",
    "lora_r": "lora.rank", "lora_alpha": "lora.alpha", "lora_dropout": "lora.dropout", "target_modules": "lora.targets",
    "max_seq_length": "task.max_tokens", "max_length": "task.max_tokens", "chat_template": "task.template",
    "model_name_or_path": "model.name", "base_model": "model.name", "path": "model.name", "dtype": "model.base",
    "torch_dtype": "model.base", "load_in_8bit": "model.base", "load_in_4bit": "model.base", "quantization": "model.base",
    "gradient_checkpointing": "split.checkpointing", "load_best_model_at_end": "federation.load_best",
    "eval_steps": "federation.evaluate_every", "compute_metrics": "task.metrics", "label_smoothing_factor": "task.label_smoothing", "test_size": "data.held_out", "output_dir": "run.out",
}  # fmt: skip


def nearest_key(key: str) -> str:
    """Returns a half-sentence about an unknown key: the key that is meant by its name, else what its section has."""
    known = known_keys()
    section, _, leaf = key.rpartition(".")
    if meant := ELSEWHERE.get(leaf.lower()):
        return f"did you mean {meant!r}?"
    moved = [each for each in known if "." in each and each.rpartition(".")[2] == leaf]
    if len(moved) == 1:
        return f"did you mean {moved[0]!r}?"
    if not section and (close := difflib.get_close_matches(key, RunConfig.model_fields, 1, 0.6)):
        return f"did you mean {close[0]!r}?"
    own = [each.rpartition(".")[2] for each in known if section and each.rpartition(".")[0] == section]
    if close := difflib.get_close_matches(leaf, own, 1, 0.6):
        return f"did you mean '{section}.{close[0]}'?"
    return f"[{section}] has {', '.join(sorted(own))}" if own else nearest(key, known)


def overrides_of(values: Mapping[str, object]) -> list[str]:
    """Returns those of `values` that are keys of the run file, as `section.key=value`; an empty text says nothing of its key.

    values: numbers, truth values and texts by their dotted keys, as a run config of Flower has them; any other value is a text in TOML.
    """
    known = set(known_keys())
    return [
        f"{key}={value if isinstance(value, str) else toml_value(value)}"
        for key, value in values.items()
        if key in known and value != ""
    ]


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
