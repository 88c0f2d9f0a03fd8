"""What can be wrong with a run file beyond its keys: against the model, and against the strategies that there are."""

from __future__ import annotations

from itertools import pairwise

from edgelam_fl.config import RunConfig
from edgelam_fl.errors import ConfigError
from edgelam_fl.model.adapter import target_modules
from edgelam_fl.model.source import ModelSource, find_model
from strategies.base import BUILT_IN, load


def check_config(config: RunConfig) -> ModelSource:
    """Finds the model. Raises ConfigError or ModelError with what is wrong; nothing has been started then."""
    for kind in BUILT_IN:
        load(kind, getattr(config.strategy, kind))
    source = find_model(config.model.name)
    check_cuts(config, source)
    target_modules(source, config.lora.targets)
    return source


def check_cuts(config: RunConfig, source: ModelSource) -> None:
    """Raises ConfigError where the device's layers do not fit the model."""
    split, layers = config.split, source.num_layers
    room = layers - split.hosts
    if split.front + split.back > room:
        raise ConfigError(
            f"split.front + split.back = {split.front} + {split.back} is outside the model: {source.name} has {layers} layers"
            + (f", and {split.hosts} hosts need at least one each" if split.hosts else "")
            + f"; together they may be at most {room}"
        )
    first, last = split.front, layers - split.back
    if split.cuts != "equal":
        borders = [first, *split.cuts, last]
        rising = all(low < high for low, high in pairwise(borders))
        if len(split.cuts) != max(0, split.hosts - 1) or not rising:
            raise ConfigError(
                f"split.cuts = {list(split.cuts)} must be {max(0, split.hosts - 1)} rising layer numbers for {split.hosts} hosts, "
                f"each above {first} and below {last} (or 'equal')"
            )
