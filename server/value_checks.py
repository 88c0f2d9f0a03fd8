"""Checks a run file for settings that are about texts in a task of values, and for keys of [radio] that a task does not use.

Knows no model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from edgelam_fl.config import RunConfig, changed_keys, toml_value
from edgelam_fl.errors import ConfigError
from edgelam_fl.model.adapter import LM_HEAD
from edgelam_fl.plan.modes import label_place
from edgelam_fl.tasks.kinds import TASKS, values_of
from strategies.registry import Capabilities

_OF_TEXTS = ("template", "loss_on", "too_long", "label_smoothing", "weighting")  # keys of [task]


class _Unfit(NamedTuple):
    """A setting that a task of values cannot be combined with."""

    key: str
    value: Any
    why: str
    allowed: str


def check_values(config: RunConfig) -> None:
    """Raises ConfigError for the first setting that does not go with what the task learns from."""
    kind = config.task.kind
    values = values_of(kind)
    if values is None:
        _check_no_values(config)
        _check_radio(config, ())
        return
    _check_radio(config, values.settings)
    found = next(_unfit(config), None)
    if found is not None:
        raise ConfigError(
            f"{found.key} = {found.value!r} cannot be combined with task.kind = {kind!r}: {found.why}. Allowed: {found.allowed}"
        )
    if "series" in values.settings and config.radio.series > config.task.max_tokens:
        raise ConfigError(
            f"radio.series = {config.radio.series} must be at most task.max_tokens = {config.task.max_tokens}, as each series is a token. "
            f"Allowed: fewer series, or a larger max_tokens"
        )
    if config.radio.base == "last" and config.radio.duplex == "fdd":
        raise ConfigError(
            "radio.base = 'last' cannot be combined with radio.duplex = 'fdd', as the last value is of the band that is heard, and the other "
            "one is predicted. Allowed: duplex = 'tdd', or leave base out"
        )


def check_private_modules(config: RunConfig, aggregation: Capabilities) -> None:
    """Raises ConfigError if the server would need the modules that devices keep to themselves."""
    kept = list(config.task.private_modules)
    if not kept:
        return
    who = f"task.private_modules = {kept}"
    if config.federation.load_best:
        raise ConfigError(
            f"{who} cannot be combined with federation.load_best = true: each device has the newest of its own modules alone, which do not "
            f"fit an earlier adapter. Allowed: one of the two"
        )
    if aggregation.corrects_sgd:
        raise ConfigError(
            f"{who} cannot be combined with strategy.aggregation = {config.strategy.aggregation!r}, which corrects all that a device trains "
            f"by what the others did. Allowed: the other aggregations, for example 'fedavg'"
        )


def _check_radio(config: RunConfig, used: Collection[str]) -> None:
    """Raises ConfigError for a key of [radio] that the task does not use."""
    for key, value in changed_keys(config).items():
        section, _, name = key.partition(".")
        if section == "radio" and name not in used:
            kinds = " or ".join(
                repr(each) for each, kind in TASKS.items() if kind.values and name in kind.values.settings
            )
            raise ConfigError(
                f"{key} = {toml_value(value)} has no effect with task.kind = {config.task.kind!r}, which does not use it. Allowed: leave it "
                f"out, or task.kind = {kinds}"
            )


def _check_no_values(config: RunConfig) -> None:
    """Raises ConfigError for a key outside [radio] that is for tasks of values, in a task of texts."""
    if config.model.layers:
        raise ConfigError(
            f"model.layers = {config.model.layers} is for tasks of values, and task.kind = {config.task.kind!r} learns from texts, which takes "
            f"all layers of a language model. Allowed: leave it out"
        )
    if config.task.private_modules:
        raise ConfigError(
            f"task.private_modules = {list(config.task.private_modules)} is for tasks of values, and task.kind = {config.task.kind!r} learns "
            f"from texts. Allowed: leave it out, or for layers privacy.private_front = true"
        )


def _unfit(config: RunConfig) -> Iterator[_Unfit]:
    """Yields the settings that a task of values cannot be combined with."""
    task, split, privacy, train = config.task, config.split, config.privacy, config.lora.train
    standard = RunConfig()
    for key in _OF_TEXTS:
        if getattr(task, key) != getattr(standard.task, key):
            yield _Unfit(f"task.{key}", getattr(task, key), "it is about texts", "leave it out")
    if config.data.fields != standard.data.fields:
        names = (*config.data.fields.prompts, config.data.fields.answer)
        yield _Unfit(
            "data.fields", list(names), "the arrays of a file have the names that the task gives them", "leave it out"
        )
    if not label_place(split.labels).on_device:
        yield _Unfit(
            "split.labels", split.labels, "a host takes labels that are tokens or classes", "split.labels = 'device'"
        )
    if isinstance(split.fronts, str):
        yield _Unfit("split.fronts", split.fronts, "what a front hides is measured on texts", "split.front = NUMBER")
    if split.trust.startswith("measured"):
        yield _Unfit(
            "split.trust", split.trust, "what hosts can read is measured on texts", "split.trust = 'hosts' or 'none'"
        )
    if config.wire.gradients != "full":
        why = "the input module needs the whole gradient"
        yield _Unfit("wire.gradients", config.wire.gradients, why, "wire.gradients = 'full'")
    if size := config.wire.front_cache_mb:
        yield _Unfit(
            "wire.front_cache_mb", size, "what stands in the place of the embedding learns", "front_cache_mb = 0"
        )
    for key in ("cut_clip", "disguise", "private_front"):
        if value := getattr(privacy, key):
            why = "it defends tokens, or the layers behind a table of tokens"
            yield _Unfit(f"privacy.{key}", value, why, "leave it out")
    if head := next((word for word in config.lora.modules_to_save if LM_HEAD.endswith(word)), ""):
        yield _Unfit(
            "lora.modules_to_save",
            head,
            "the task's own module stands in the place of the head, and always learns",
            "leave it out",
        )
    if "back" not in train:
        yield _Unfit(
            "lora.train",
            list(train),
            "the modules in the places of embedding and head learn with the back",
            "lora.train with 'back'",
        )
