"""Writes run files for people: every key with its range and description, as the models of `config` have them.

`edgelam init` writes a file, `edgelam run --explain` prints one. Knows no key by itself but those that most people touch.
Lines of text begin with "# "; a line that begins with "#" and a key is that key at its default.
"""

from __future__ import annotations

import textwrap
import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from edgelam_fl.config import RunConfig, Section, toml_value
from edgelam_fl.errors import ConfigError, ModelNotFound
from edgelam_fl.model.adapter import target_modules
from edgelam_fl.model.generation import check_answers, has_chat_template
from edgelam_fl.model.limits import check_limits, check_tokens, positions_of
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.names import printable
from edgelam_fl.plan.fronts import check_trust, host_readings, with_auto_front
from edgelam_fl.plan.making import task_settings
from edgelam_fl.privacy.limits import HostReading
from edgelam_fl.tasks.data import device_pairs
from edgelam_fl.tasks.named import local_data
from edgelam_fl.tasks.suggest import suggest

COMMON = {
    "model.name", "model.base", "split.front", "split.back", "split.hosts", "lora.rank", "lora.alpha", "lora.targets",
    "task.max_tokens", "task.template", "data.fields", "federation.rounds", "federation.local_steps",
    "federation.batch_size", "federation.min_nodes", "optimizer.lr", "strategy.aggregation", "run.seed",
}  # fmt: skip
_HEADER = """\
# A run file of EdgeLAM-FL. Every key has a default: a key behind a '#' has that default, so take the '#' away and
# change the value. `edgelam run {name} --explain` shows what a run would use; `--set lora.rank=4` overrides for once.
"""
_CLASSIFIER = "minilm-l6"
_INDENT, _WIDTH = 36, 120


# ---------------------------------------------------------------- edgelam init


def write_run_file(file: Path, data: Path | None, model: str) -> list[str]:
    """Writes a new run file for the fields of `data` and for `model` ("": the default). Returns the choices as lines.

    The data are read with the new file as a run reads them, so that they fit it. Raises ConfigError if `file` exists (nothing is
    ever overwritten), DataError for data that no run file fits.
    """
    if file.exists():
        raise ConfigError(f"{file} exists; give another name (nothing is ever overwritten)")
    source = find_model(model) if model else None
    sections = _for_model(source) if source else {}
    chosen = [f"model.name = {model!r}"] if source else []
    if "task" in sections:
        chosen.append("task.template = 'plain': the model has no chat template")
    if data is not None:
        data = local_data(data)
        found = suggest(data, *_answers_of(source))
        if found.classifies and source is None:
            chosen.append(f"model.name = {_CLASSIFIER!r}: a model that answers with classes; --model chooses another")
            sections = {"model": {"name": _CLASSIFIER}, "lora": {"targets": ("query", "value")}}
        for section, keys in found.sections.items():
            sections[section] = {**sections.get(section, {}), **keys}
        chosen += found.said
    config = RunConfig.model_validate(sections)
    if data is not None:  # as a run does it
        unread = device_pairs(data, task_settings(config)).unread
        chosen += [f"not learned: the field {printable(name, 60)!r} of {data}, which no key names" for name in unread]
    changed = {f"{section}.{key}" for section, keys in sections.items() for key in keys}
    text = f"{_HEADER.format(name=file.name)}\n{described(config, shown=COMMON | changed)}"
    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror}") from error
    return chosen


def _answers_of(source: ModelSource | None) -> tuple[bool | None, bool]:
    """Returns whether a model answers with classes, and whether it has a chat template; without a model None, and True."""
    if source is None:
        return None, True
    return source.family.task_head is not None, has_chat_template(source.folder)


def _for_model(source: ModelSource) -> dict[str, dict[str, Any]]:
    """Returns the keys that must differ from their defaults so that the file runs with this model."""
    check_tokens(source)
    sections: dict[str, dict[str, Any]] = {"model": {"name": source.name}}
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
    if source.family.task_head is None and not has_chat_template(source.folder):
        sections["task"] = {"template": "plain"}
    return sections


# ---------------------------------------------------------------- edgelam run --explain


def explained(config: RunConfig) -> str:
    """Returns the run file as a run would use it, and below it, as comments, what hosts can read.

    Raises ConfigError if split.trust or split.fronts = 'auto:...' refuses that, ModelError for a model that is here and cannot be
    used, or, with 'auto:...', that is not here.
    """
    digest = ""
    if isinstance(config.split.fronts, str):
        source = find_model(config.model.name)
        digest, config = source.leakage_key, with_auto_front(config, source)
        _check_model(config, source)
    else:
        with suppress(ModelNotFound):  # it may be where the run will take place
            source = find_model(config.model.name, download=False)
            digest = source.leakage_key
            _check_model(config, source)
    check_trust(config, digest)
    return f"{described(config, mark_changed=True)}\n{_readable(config, host_readings(config, digest))}"


def _check_model(config: RunConfig, source: ModelSource) -> None:
    """Raises ModelError or ConfigError if the model is too small for the run, or lacks lora.targets or an end of answers."""
    check_limits(config, source)
    target_modules(source, config.lora.targets, config.lora.layers_to_transform)
    check_answers(config, source)


def described_data(config: RunConfig, data: Path) -> str:
    """Says as a comment what a run would learn from a device's file. Raises DataError if it does not fit."""
    found = device_pairs(local_data(data), task_settings(config))
    said = f"{data}: {len(found.training)} examples to learn, {len(found.held_out)} held out."
    if found.bad:
        said += f" Left out, since they cannot be read: {len(found.bad)} ({', '.join(found.bad[:5])}{' ...' if len(found.bad) > 5 else ''})."
    if found.unread:
        said += f" Fields that nothing is learned from: {printable(', '.join(found.unread), 200)}."
    return "\n".join(f"# {line}" for line in textwrap.wrap(said, _WIDTH - 2, break_on_hyphens=False))


def _readable(config: RunConfig, found: Sequence[HostReading]) -> str:
    """Writes what hosts can read as comments; without hosts, what leaves a device instead."""
    said = [_sentence(reading.words()) for reading in found]
    if not found:
        said.append("split.hosts = 0: nobody gets hidden states; adapters, losses and counts leave a device.")
    if found and found[0].front == 0:
        said.append("WARNING: front = 0 sends the embeddings, which are the text.")
    if found and found[0].back == 0:
        said.append("WARNING: back = 0 gives the gradient of the head away, from which labels can be solved for.")
    if found and config.privacy.defends_cut:
        said.append("These are numbers without the defences at the cut that [privacy] of this run has.")
    if found:
        said.append("`edgelam leakage RUN.toml --data FILE` measures it on your own text.")
    lines = [line for text in said for line in textwrap.wrap(text, _WIDTH - 2, break_on_hyphens=False)]
    return "".join(f"# {line}\n" for line in ["What hosts can read (PRIVACY.md):", *lines])


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


# ---------------------------------------------------------------- the text


def described(config: RunConfig, *, shown: Collection[str] | None = None, mark_changed: bool = False) -> str:
    """Returns the run file of `config` as text.

    shown: keys as section.key; all others are commented out; None: no key is. mark_changed: notes keys off their default.
    """
    values = config.model_dump(mode="json")
    sections = []
    for name, field in RunConfig.model_fields.items():
        lines = [f"[{name}]"]
        for key, inner in _section(field).model_fields.items():
            mark = "" if shown is None or f"{name}.{key}" in shown else "#"
            default = inner.get_default(call_default_factory=True)
            changed = mark_changed and getattr(getattr(config, name), key) != default
            note = f"changed, default {toml_value(_plain(default))}; " if changed else ""
            lines += _lines(f"{mark}{key} = {toml_value(values[name][key])}", note + explain(inner))
        sections.append("\n".join(lines) + "\n")
    return "\n".join(sections)


def _section(field: FieldInfo) -> type[Section]:
    return field.annotation  # type: ignore[return-value]


def _plain(value: Any) -> Any:
    return (
        value.model_dump(mode="json")
        if isinstance(value, Section)
        else list(value)
        if isinstance(value, tuple)
        else value
    )


def _lines(assignment: str, text: str) -> Iterator[str]:
    """Yields the key with its explanation beside it, or below it if the key is long, in lines of limited width."""
    first, *rest = textwrap.wrap(text, _WIDTH - _INDENT - 2, break_long_words=False, break_on_hyphens=False)
    if len(assignment) >= _INDENT:
        yield assignment
        rest = [first, *rest]
    else:
        yield f"{assignment:<{_INDENT}}# {first}"
    yield from (f"{'':<{_INDENT}}# {line}" for line in rest)


def explain(field: FieldInfo) -> str:
    """Returns a key's range and description as one text."""
    text = ": ".join(part for part in (allowed(field), field.description) if part)
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
        text += "".join(f"; {key}: {inner.description}" for key, inner in field.annotation.model_fields.items())
    return text


def allowed(field: FieldInfo) -> str:
    """Returns a key's allowed values in words; empty if any text is allowed, or if the description names them."""
    limits = {
        word: getattr(rule, word) for rule in field.metadata for word in ("ge", "gt", "le", "lt") if hasattr(rule, word)
    }
    return _range(limits) if limits else _choice(field.annotation)


def _range(limits: Mapping[str, float]) -> str:
    if limits.keys() == {"ge", "le"}:
        return f"{limits['ge']} to {limits['le']}"
    if limits.keys() == {"ge"}:
        return f"{limits['ge']} or more"
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    return ", ".join(f"{words[word]} {limit}" for word, limit in limits.items())


def _choice(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is bool:
        return "true | false"
    if origin is Literal:
        return " | ".join(arguments)
    if origin in (Union, types.UnionType):
        return " | ".join(filter(None, ("number" if part is int else _choice(part) for part in arguments)))
    if origin is tuple:
        return f"list of {_choice(arguments[0]) or ('texts' if arguments[0] is str else 'numbers')}"
    if origin is dict:
        return "table of tables by name" if get_origin(arguments[1]) is dict else "table of numbers by name"
    return ""
