"""Makes a run of data files alone: which files are meant, what their devices are called, and the run file that fits them.

Knows no process: `federation.runs` starts the run.
"""

from __future__ import annotations

import glob
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelam_fl.array_files import holds_arrays, read_arrays
from edgelam_fl.config import RunConfig, parse_run_file, toml_value
from edgelam_fl.errors import ConfigError, DataError, nearest
from edgelam_fl.model.adapter import target_modules
from edgelam_fl.model.generation import has_chat_template
from edgelam_fl.model.limits import check_tokens, positions_of
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.names import folded, printable, why_no_name
from edgelam_fl.plan.making import task_settings
from edgelam_fl.tasks.data import DataSettings, DevicePairs
from edgelam_fl.tasks.kinds import TASKS, device_data, values_of
from edgelam_fl.tasks.named import local_data
from edgelam_fl.tasks.suggest import Suggestion, suggest

MOST_DEVICES = 16
"""Devices that one machine plays at most."""
_CLASSIFIER = "minilm-l6"
_PATTERN = re.compile(r"[*?\[]")
_NAME_CHARACTERS = 40
_ODD_ONE_OUT = ("chat", "missing-field", "passages", "unknown-class")  # faults of a file that is unlike the others
_EDGE_NAME = re.compile(r"edge-\d+")

Sections = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class FromData:
    """A run file that fits data, and a line for each choice that was made."""

    config: RunConfig
    said: list[str]


# ---------------------------------------------------------------- which files


def expanded(given: Sequence[Path]) -> list[Path]:
    """Returns the files that are meant, with patterns such as 'people/*.jsonl' replaced by what fits them, by name.

    A name that is a file itself, or that of a data set of a hub, stays. Raises DataError for a pattern that fits nothing, and for a file
    that is given twice.
    """
    files = list[Path]()
    for each in given:
        text = str(each)
        if not _PATTERN.search(text) or each.exists() or text.startswith("hf:"):
            files.append(each)
            continue
        found = sorted(Path(name) for name in glob.glob(str(each.expanduser()), recursive=True))
        if not found:
            raise DataError(f"no file fits --data {text!r} (looked from {Path.cwd()})", "missing-file")
        files += found
    twice = next((file for file, times in Counter(map(_place, files)).items() if times > 1), "")
    if twice:
        raise DataError(
            f"{twice} is given twice: each device has a file of its own, and --split deals one file", "several-sets"
        )
    return files


def _place(file: Path) -> str:
    return str(file.resolve()) if file.exists() else str(file)


def device_names(files: Sequence[Path]) -> list[str]:
    """Names a device per file after the file, each once: ann.jsonl is ann, and a/data.jsonl and b/data.jsonl are a-data and b-data."""
    names = [_name(file.stem) for file in files]
    times = Counter(map(folded, names))
    names = [
        _name(f"{file.absolute().parent.name}-{name}") if times[folded(name)] > 1 else name
        for file, name in zip(files, names, strict=True)
    ]
    taken = set[str]()
    for number, name in enumerate(names):
        if why_no_name(name) or _EDGE_NAME.fullmatch(folded(name)):  # reserved
            name = f"{name}-data"
        unique, count = name, 2
        while folded(unique) in taken:
            unique, count = f"{name}-{count}", count + 1
        taken.add(folded(unique))
        names[number] = unique
    return names


def _name(text: str) -> str:
    """Writes a text as a node's name may be."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:_NAME_CHARACTERS] or "data"


# ---------------------------------------------------------------- the run file that fits


def config_from_data(files: Sequence[Path], overrides: Sequence[str] = (), task: str = "") -> FromData:
    """Makes the configuration of a run for the data of its devices. overrides: `section.key=value`, as of `edgelam run --set`.

    task: the kind of task; empty: the data decide. Raises ConfigError or DataError with what fits nothing.
    """
    asked = parse_run_file("", source="--set", overrides=list(overrides))
    set_keys = {override.partition("=")[0].strip() for override in overrides}
    model = asked.model.name if "model.name" in set_keys else ""
    kind = task or (asked.task.kind if "task.kind" in set_keys else "")
    names_fields = any(key.startswith("data.fields") for key in set_keys)  # then nothing about the data is guessed
    sections, said = sections_for(() if names_fields else files, model, "" if names_fields else kind)
    config = parse_run_file(_toml(sections), source="the run file made for the data", overrides=list(overrides))
    return FromData(config, said)


def _toml(sections: Mapping[str, Mapping[str, Any]]) -> str:
    lines = list[str]()
    for section, keys in sections.items():
        lines += [f"[{section}]", *(f"{key} = {toml_value(_listed(value))}" for key, value in keys.items())]
    return "\n".join(lines)


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def sections_for(files: Sequence[Path], model: str, task: str = "") -> tuple[Sections, list[str]]:
    """Chooses the keys of a run file for data and a model ("": the default), and says each choice in a line.

    Without files, for the model alone. The data are read with these keys as a run reads them, so that they fit them.
    """
    check_kind(task)
    source = find_model(model) if model else None
    read = [local_data(file) for file in files]
    holds = any(map(holds_arrays, read))
    of_values = holds or values_of(task) is not None
    sections = _for_model(source, of_texts=not of_values) if source else {}
    said = [f"model.name = {model!r}"] if source else []
    if "template" in sections.get("task", {}):
        said.append("task.template = 'plain': the model has no chat template")
    if of_values:
        found = _for_arrays(read, task) if holds else _for_values(task)
        _check_network(found, source)
    elif files:
        found = suggest(read, *_answers_of(source), task)
        if found.classifies and source is None:
            said.append(f"model.name = {_CLASSIFIER!r}: a model that answers with classes; --model chooses another")
            sections = {"model": {"name": _CLASSIFIER}, "lora": {"targets": ("query", "value")}}
    elif task and TASKS[task].answers == "class":
        raise ConfigError(f"--task {task} needs --data FILE, to find the names of the classes")
    else:
        return sections, said
    _add(sections, found)
    said += found.said
    settings = task_settings(RunConfig.model_validate(sections))
    field = "array" if of_values else "field"
    for file in read:
        unread = _read(file, settings, len(read)).unread
        said += [f"not learned: the {field} {printable(name, 60)!r} of {file}, which no key names" for name in unread]
    return sections, said


def _for_arrays(files: Sequence[Path], task: str) -> Suggestion:
    """Chooses the kind of task whose arrays the devices' files have. `task`: the one that was asked for; empty: the data decide."""
    kinds = {name: kind.values.arrays for name, kind in TASKS.items() if kind.values}
    given = read_arrays(next(filter(holds_arrays, files)))
    fit = [name for name, arrays in kinds.items() if all(one.key in given for one in arrays if one.required)]
    if task not in kinds and (task or len(fit) != 1):
        asked = (
            f"--task {task} learns from texts"
            if task
            else f"--task must say what is learned ({', '.join(fit or kinds)})"
        )
        raise ConfigError(f"{asked}, and {files[0]} holds the arrays {printable(', '.join(given), 120)}")
    kind = task or fit[0]
    read = ", ".join(one.key for one in kinds[kind] if one.key in given)
    return _for_values(kind, f": {files[0]} holds the arrays {read}")


def _for_values(kind: str, why: str = "") -> Suggestion:
    """Chooses the keys for a task of values; for one that has a network of its own, that network."""
    values = values_of(kind)
    found = Suggestion({"task": {"kind": kind}}, [f"task.kind = {kind!r}{why}"])
    if values is not None and values.model:
        found.sections.update(_of_network(values.model))
        found.said.append(
            f"model.name = {values.model!r}, split.hosts = 0: the task's own network, whole on each device"
        )
    return found


def _of_network(name: str) -> Sections:
    return {"model": {"name": name}, "split": {"hosts": 0}}


def _check_network(found: Suggestion, source: ModelSource | None) -> None:
    """Raises ConfigError if a model was asked for with which the task cannot be learned."""
    own = found.sections.get("model", {}).get("name", "")
    if source is not None and source.name != own and (own or source.is_network):
        allowed = f"model {own!r}, or none" if own else "a language model"
        raise ConfigError(
            f"task.kind = {found.sections['task']['kind']!r} cannot be learned by the model {source.name!r}. Allowed: {allowed}"
        )


def _read(file: Path, settings: DataSettings, files: int) -> DevicePairs:
    """Reads a file by the keys that were found in all `files`. Raises DataError, which says so if there are several."""
    try:
        return device_data(file, settings)
    except DataError as error:
        if files == 1 or error.fault not in _ODD_ONE_OUT:
            raise
        words = (
            f"{error}. The devices of one run are read by the same keys: convert this file, or give it a run of its own"
        )
        raise DataError(words, error.fault, error.place) from error


def check_kind(task: str) -> None:
    """Raises ConfigError for a --task that is not known."""
    if task and task not in TASKS:
        raise ConfigError(f"--task {task!r} is not known: {nearest(task, TASKS)}. Without it the data decide")


def _add(sections: Sections, found: Suggestion) -> None:
    for section, keys in found.sections.items():
        sections[section] = {**sections.get(section, {}), **keys}


def _answers_of(source: ModelSource | None) -> tuple[bool | None, bool]:
    """Returns whether a model answers with classes, and whether it has a chat template; without a model None, and True."""
    if source is None:
        return None, True
    return source.family.task_head is not None, has_chat_template(source.folder)


def _for_model(source: ModelSource, *, of_texts: bool) -> Sections:
    """Returns the keys that must differ from their defaults so that the file runs with this model.

    `of_texts`: whether the task learns from texts.
    """
    if source.is_network:
        kind = next(name for name, kind in TASKS.items() if kind.values and kind.values.model == source.name)
        return {**_of_network(source.name), "task": {"kind": kind}}
    check_tokens(source)
    sections: Sections = {"model": {"name": source.name}}
    standard = RunConfig()
    ends = min(standard.split.front, (source.num_layers - 1) // 2)  # one layer at least is left for a host
    if ends < standard.split.front:
        sections["split"] = {"front": ends, "back": ends}
    positions = positions_of(source)
    if positions is not None and positions.most < standard.task.max_tokens:
        sections["task"] = {"max_tokens": positions.most}
    try:
        target_modules(source, standard.lora.targets)
    except ConfigError:
        sections["lora"] = {"targets": ("all-linear",)}
    if of_texts and source.family.task_head is None and not has_chat_template(source.folder):
        sections["task"] = {**sections.get("task", {}), "template": "plain"}
    return sections
