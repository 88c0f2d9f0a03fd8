"""Writes run files for people: every key with its range and description, as the models of `config` have them.

`edgelam init` writes a file, `edgelam run --explain` prints one. Knows no key by itself but those that most people touch.
Lines of text begin with "# "; a line that begins with "#" and a key is that key at its default.
"""

from __future__ import annotations

import textwrap
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from edgelam_fl.config import RunConfig, Section, changed_keys, toml_value
from edgelam_fl.errors import ConfigError, ModelNotFound
from edgelam_fl.federation.before import before_words, check_run_file, check_steps, first_example
from edgelam_fl.federation.data_check import FileSeen
from edgelam_fl.federation.from_data import expanded, sections_for
from edgelam_fl.model.source import BUILT_IN, ModelSource
from edgelam_fl.plan.fronts import check_trust, host_readings
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.privacy.limits import HostReading

COMMON = {
    "model.name", "model.base", "split.front", "split.back", "split.hosts", "lora.rank", "lora.alpha", "lora.targets",
    "task.max_tokens", "task.template", "data.fields", "federation.rounds", "federation.local_steps",
    "federation.batch_size", "federation.min_nodes", "optimizer.lr", "strategy.aggregation", "run.seed",
}  # fmt: skip
_HEADER = """\
# A run file of EdgeLAM-FL. Every key has a default: a key behind a '#' has that default, so take the '#' away and
# change the value. `edgelam run {name} --explain` shows what a run would use; `--set lora.rank=4` overrides for once.
"""
_INDENT, _WIDTH = 36, 120


# ---------------------------------------------------------------- edgelam init


def write_run_file(file: Path, data: Sequence[Path], model: str, task: str = "") -> list[str]:
    """Writes a new run file for the devices' data and for `model` ("": the default). Returns the choices as lines.

    task: the kind of task; empty: the data decide. The data are read with the new file as a run reads them, so that they fit it. Raises
    ConfigError if `file` exists (nothing is ever overwritten), DataError for data that no run file fits.
    """
    if file.exists():
        raise ConfigError(f"{file} exists; give another name (nothing is ever overwritten)")
    sections, chosen = sections_for(expanded(data), model, task)
    config = RunConfig.model_validate(sections)
    changed = {f"{section}.{key}" for section, keys in sections.items() for key in keys}
    text = f"{_HEADER.format(name=file.name)}\n{described(config, shown=COMMON | changed)}"
    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror}") from error
    return chosen


# ---------------------------------------------------------------- edgelam run --explain


def explained(
    config: RunConfig,
    names: Sequence[str] = (),
    look: Callable[[ModelSource | None], Sequence[FileSeen]] = lambda source: (),
    *,
    here: bool = False,
) -> str:
    """Returns the run file as a run would use it, and below it, as comments, what it comes to and what hosts can read.

    names: of the devices, if they are known. look: reads their files for a model, or without one. here: whether the run takes place on
    this machine alone. Raises what a run raises before it starts; only a model that is nowhere on this machine may be where the run will
    take place.
    """
    spec = _checked(config, here, names)
    seen = look(spec.source if spec else None)
    said = list[str]()
    if spec is None:
        said.append(f"{config.model.name} is not on this machine: nothing of the model is checked here.")
        check_trust(config, "")
    else:
        config = spec.config
        check_steps(config, seen)
        said += [f"{words}." for words in before_words(spec, seen, names)]
    digest = spec.source.leakage_key if spec else ""
    changed = ", ".join(f"{key} = {toml_value(value)}" for key, value in changed_keys(config).items())
    said.append(f"Other than the defaults: {changed or 'nothing'}.")
    lines = [line for text in said for line in _wrapped(text)]
    example = first_example(seen, config.model.name)
    summary = "".join(f"# {line}\n" for line in ["What this comes to:", *lines, *example])
    return f"{described(config, mark_changed=True)}\n{summary}#\n{_readable(config, host_readings(config, digest))}"


def _checked(config: RunConfig, here: bool, devices: Sequence[str]) -> RunSpec | None:
    """Checks a run file as a run does. Returns None if the model may be where the run will take place."""
    try:
        return check_run_file(config, here=here, devices=devices, download=False)
    except ModelNotFound:
        name = config.model.name
        is_slip = "/" not in name and bool(get_close_matches(name, BUILT_IN, 1, 0.5))
        if here or is_slip or name in BUILT_IN or name.endswith(".gguf") or isinstance(config.split.fronts, str):
            raise
        return None


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH - 2, break_on_hyphens=False)


def _readable(config: RunConfig, found: Sequence[HostReading]) -> str:
    """Writes what hosts can read as comments; without hosts, what leaves a device instead."""
    said = [_sentence(reading.words()) for reading in found]
    if not found:
        said.append("split.hosts = 0: nobody gets hidden states; adapters, losses and counts leave a device.")
    of_texts = bool(found) and not found[0].of_values
    if found and found[0].front == 0:
        sent = "the embeddings, which are the text" if of_texts else "what the input module alone makes of the values"
        said.append(f"WARNING: front = 0 sends {sent}.")
    if of_texts and found[0].back == 0:
        said.append("WARNING: back = 0 gives the gradient of the head away, from which labels can be solved for.")
    if found and config.privacy.defends_cut:
        said.append("These are numbers without the defences at the cut that [privacy] of this run has.")
    if of_texts:
        said.append("`edgelam leakage RUN.toml --data FILE` measures it on your own text.")
    lines = [line for text in said for line in _wrapped(text)]
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
