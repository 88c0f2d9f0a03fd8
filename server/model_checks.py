"""Checks a run file against the model that it names: dropout, cuts, ranks, patterns, and whether anything learns.

Knows a model's shapes and none of its numbers, and knows no nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from edgelam_fl.errors import ConfigError
from edgelam_fl.model.adapter import adapter_shapes, target_modules
from edgelam_fl.model.families import most_dropout
from edgelam_fl.model.index import layer_number
from edgelam_fl.model.lora import matches
from edgelam_fl.plan.spec import RunSpec
from strategies.registry import Capabilities


def check_dropout(spec: RunSpec) -> None:
    """Raises ConfigError for a dropout that the model does not have."""
    if spec.config.model.dropout == "own" and not most_dropout(spec.source.config):
        raise ConfigError(
            f"model.dropout = 'own' has no effect: {spec.source.name} has no dropout in its config.json. Allowed: 'off', and "
            f"lora.dropout for the adapter's own"
        )


def check_cuts(spec: RunSpec) -> None:
    """Raises ConfigError if the layers at the devices' ends, or the given cuts, do not fit the model."""
    split, source = spec.config.split, spec.source
    layers = source.num_layers
    if source.is_network:
        return  # all of it is on each device
    hosts = split.least_hosts
    room = layers - hosts
    if split.front + split.back > room:
        raise ConfigError(
            f"split.front + split.back = {split.front} + {split.back} is outside the model: {source.name} has {layers} layers"
            + (f", and {hosts} hosts need at least one each" if hosts else "")
            + f"; together they may be at most {room}"
        )
    _check_values("split.fronts", split.named_fronts, 0, room, f"{source.name}'s layers minus one per host")
    _check_values("split.backs", split.backs, 0, room, f"{source.name}'s layers minus one per host")
    first, last = split.front, layers - split.back
    if isinstance(split.cuts, tuple):
        borders = [first, *split.cuts, last]
        rising = all(low < high for low, high in pairwise(borders))
        if len(split.cuts) != max(0, hosts - 1) or not rising:
            raise ConfigError(
                f"split.cuts = {list(split.cuts)} must be {max(0, hosts - 1)} rising layer numbers for {hosts} hosts, "
                f"each above {first} and below {last} (or 'equal', 'auto')"
            )


def check_ranks(spec: RunSpec) -> None:
    """Raises ConfigError for a target that the model lacks, or a rank that a matched matrix cannot have."""
    lora, source = spec.config.lora, spec.source
    if spec.cut and lora.rank > source.hidden_size:
        raise ConfigError(
            f"lora.rank = {lora.rank} must be at most {source.hidden_size} with wire.gradients = 'lowrank': the width of {source.name}'s "
            f"hidden states, whose gradient has no more numbers"
        )
    shapes = target_modules(source, lora.targets, lora.layers_to_transform).values()
    if source.is_network:
        return
    most = min(min(shape) for shape in shapes)
    why = f"the smallest width of the modules in lora.targets ({source.name})"
    _check_values("lora.ranks", lora.ranks, 1, most, why)
    if lora.rank > most:
        raise ConfigError(f"lora.rank = {lora.rank} must be at most {most}, {why}")


def check_patterns(spec: RunSpec) -> None:
    """Raises ConfigError for a key of a pattern that matches no module with an adapter, or a rank that a matched one cannot have."""
    lora, source = spec.config.lora, spec.source
    if lora.rank_pattern and lora.ranks:
        raise ConfigError(
            "lora.rank_pattern cannot be combined with lora.ranks: one gives a module its rank on all nodes, the other a node its rank "
            "in all modules. Allowed: either of them; lora.alpha_pattern goes with both"
        )
    modules = target_modules(source, lora.targets, lora.layers_to_transform)
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(lora, key):
            if not any(matches(pattern, module) for module in modules):
                example = next(iter(modules))
                raise ConfigError(
                    f"lora.{key}: {pattern!r} matches no module that gets an adapter. Allowed: the end of a name, such as "
                    f"{example.rsplit('.', 1)[-1]!r} or {example!r}, or a regular expression for it"
                )
    for terms in spec.kind.own:
        for module in terms.modules:
            if terms.rank > (most := min(modules[module])):
                raise ConfigError(
                    f"lora.rank_pattern gives {module} the rank {terms.rank}; allowed: 1 to {most}, its smallest width"
                )


def check_something_learns(spec: RunSpec) -> None:
    """Raises ConfigError for a module that cannot learn as a whole, and if nothing that could learn is in a place that does."""
    config, source = spec.config, spec.source
    lora, split = config.lora, config.split
    shapes = adapter_shapes(source, lora.targets, lora.rank, spec.kind)
    if not lora.layers_to_transform or split.named_fronts or split.backs or config.task.classes or spec.cut:
        return
    places = {_place(layer_number(name), split.front, source.num_layers - split.back) for name in shapes}
    if not places & set(lora.train):
        raise ConfigError(
            f"lora.layers_to_transform = {list(lora.layers_to_transform)} has no layer that learns: with split.front = {split.front} and "
            f"split.back = {split.back} of {source.num_layers} layers they are in {', '.join(sorted(places))}, and lora.train = "
            f"{list(lora.train)}. Allowed: a layer in one of these places, or lora.train with {sorted(places)[0]!r}"
        )


def _place(layer: int | None, front: int, back_first: int) -> str:
    if layer is None or layer >= back_first:
        return "back"
    return "front" if layer < front else "hosts"


def check_carry(spec: RunSpec, aggregation: Capabilities) -> None:
    """Raises ConfigError for a limit on the rank of carry factors that is above every module's rank."""
    config, source = spec.config, spec.source
    cap = aggregation.most_carry_rank
    if source.is_network:
        return
    modules = target_modules(source, config.lora.targets, config.lora.layers_to_transform)
    most = max(map(min, modules.values()))
    if cap > most:
        name = config.strategy.aggregation
        raise ConfigError(
            f"strategy.options.{name}.residual = 'svd:{cap}' must be at most 'svd:{most}', the largest rank of a module in lora.targets "
            f"({source.name}), or 'exact'"
        )


def _check_values(key: str, values: Mapping[str, int], least: int, most: int, why: str) -> None:
    """Raises ConfigError for a value of a table by node name outside `least` to `most`; `why`: what `most` is."""
    for pattern, value in values.items():
        if not least <= value <= most:
            raise ConfigError(f"{key}: {pattern!r} = {value} must be {least} to {most}, {why}")
