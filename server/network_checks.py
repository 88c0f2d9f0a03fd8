"""Checks the run file of a task that is learned by a network of our own, in the place of a language model: what has no effect there.

Knows keys and names; knows no network.
"""

from __future__ import annotations

from edgelam_fl.config import RunConfig, changed_keys, toml_value
from edgelam_fl.errors import ConfigError
from edgelam_fl.model.source import OWN_NETWORKS
from edgelam_fl.tasks.kinds import TASKS, values_of
from strategies.registry import Capabilities

# Of these sections a network uses the keys named here alone; of the others, all.
_USED = {
    "model": ("name",),
    "split": ("hosts", "micro_batches"),
    "lora": (),
    "task": ("kind",),
    "wire": ("capacity",),
}


def check_network(config: RunConfig, aggregation: Capabilities) -> None:
    """Raises ConfigError for a network without its task or a task without its network, and for what a network does not have."""
    kind, model = config.task.kind, config.model.name
    values = values_of(kind)
    own = values.model if values is not None else ""
    if own and model != own:
        raise ConfigError(
            f"task.kind = {kind!r} is learned by a network of its own, not by model.name = {model!r}. Allowed: model.name = {own!r}"
        )
    if not own and model in OWN_NETWORKS:
        tasks = " or ".join(repr(name) for name, each in TASKS.items() if each.values and each.values.model == model)
        raise ConfigError(
            f"model.name = {model!r} is the network of one task and cannot learn task.kind = {kind!r}. Allowed: task.kind = {tasks}, or "
            f"another model.name"
        )
    if not own:
        return
    if config.split.hosts != 0:
        raise ConfigError(
            f"split.hosts = {toml_value(config.split.hosts)} cannot be combined with task.kind = {kind!r}: its network has no layers to "
            f"cut, and is whole on each device. Allowed: split.hosts = 0"
        )
    for key, value in changed_keys(config).items():
        section, _, name = key.partition(".")
        if section in _USED and name not in _USED[section]:
            allowed = ", ".join(f"{section}.{used}" for used in _USED[section]) or "no key"
            raise ConfigError(
                f"{key} = {toml_value(value)} has no effect with task.kind = {kind!r}, whose network has neither layers nor LoRA and sends "
                f"no hidden states. Allowed: leave it out; of [{section}], {allowed}"
            )
    if aggregation.factors_alone:
        raise ConfigError(
            f"strategy.aggregation = {config.strategy.aggregation!r} is about the factors of LoRA, and the network of task.kind = "
            f"{kind!r} has none. Allowed: rules that take each tensor's mean or median, such as 'fedavg', 'fedprox', 'scaffold', 'fedadam', "
            f"'fedmedian' or 'over_the_air'"
        )
