"""Checks a run file's `[privacy]` against the rest of it: what cannot keep the promise is refused by name, with what can.

Runs before anything is started. How many devices come is not known yet: `server.private_terms.terms_of` checks that.
"""

from __future__ import annotations

from collections.abc import Mapping

from edgelam_fl.config import PrivacySection, RunConfig
from edgelam_fl.errors import ConfigError
from edgelam_fl.plan.modes import host_mode, label_place
from server.private_terms import MODES, check_devices, only_hosts_train, planned_noise, shares_hosts
from strategies.registry import BUILT_IN, Capabilities, LoadedStrategy, load

_OF_A_PROMISE = ("epsilon", "delta", "noise", "clip", "clip_quantile", "accountant")


def check_privacy(config: RunConfig, strategies: Mapping[str, LoadedStrategy], *, elsewhere: bool = False) -> None:
    """Raises ConfigError with the first setting that privacy.mode cannot be combined with.

    `strategies`: by kind, as far as they may be imported on this machine. `elsewhere`: whether the run takes place on another
    machine, which then has the library that computes epsilon.
    """
    selection = strategies["selection"].capabilities if "selection" in strategies else None
    if selection is not None and selection.sampling_rate:
        check_coins(config)
    if config.privacy.mode == "none":
        check_no_promise(config)
        return
    check_rule(config, strategies["aggregation"].capabilities if "aggregation" in strategies else None)
    check_selection(config, selection)
    check_places(config)
    check_steps(config, selection)
    if MODES[config.privacy.mode].over_channel:
        check_channel(config)
    if config.privacy.clip_quantile and MODES[config.privacy.mode].device_clips:
        raise ConfigError(
            f"privacy.clip_quantile = {config.privacy.clip_quantile:g} needs whoever clips to count, and with privacy.mode = "
            f"{config.privacy.mode!r} each device clips alone. Allowed: 0, or privacy.mode = 'central'"
        )
    sampling = (selection.sampling_rate if selection is not None else 0.0) or 1.0
    if config.federation.expect_nodes:
        check_devices(config, config.federation.expect_nodes, sampling)
    if not elsewhere:
        planned_noise(config, sampling)


def check_channel(config: RunConfig) -> None:
    """Raises ConfigError if a run has no channel whose noise could protect its updates."""
    if not config.wireless.bandwidth_hz:
        raise ConfigError(
            f"privacy.mode = {config.privacy.mode!r} takes its noise from the wireless model's channels, and wireless.bandwidth_hz = 0 "
            f"says that there is none. Allowed: a bandwidth above 0, or privacy.mode = 'device' or 'central'"
        )


def check_no_promise(config: RunConfig) -> None:
    """Raises ConfigError for a key of differential privacy in a run that has none: whoever writes it relies on it."""
    usual = PrivacySection()
    for key in _OF_A_PROMISE:
        value = getattr(config.privacy, key)
        if value != getattr(usual, key):
            raise ConfigError(
                f"privacy.{key} = {value!r} has no effect with privacy.mode = 'none', which promises nothing. Allowed: privacy.mode = "
                f"{_listed(MODES)}, or leave privacy.{key} out"
            )


def check_coins(config: RunConfig) -> None:
    """Raises ConfigError for settings that a selection by independent coins cannot follow."""
    federation, name = config.federation, config.strategy.selection
    if federation.devices_per_round:
        raise ConfigError(
            f"federation.devices_per_round = {federation.devices_per_round} cannot be combined with strategy.selection = {name!r}, "
            f"which draws each device by itself: strategy.options.{name}.rate says how many a round has on average. Allowed: 0"
        )
    if config.split.host_on == "any":
        raise ConfigError(
            f"split.host_on = 'any' cannot be combined with strategy.selection = {name!r}: a device that has to host would take "
            f"part although it was not drawn. Allowed: 'edge'"
        )


def check_rule(config: RunConfig, aggregation: Capabilities | None) -> None:
    """Raises ConfigError for an aggregation that needs more of a round than the mean of its updates."""
    if aggregation is not None and not aggregation.needs_only_mean:
        can = [name for name in BUILT_IN["aggregation"] if load("aggregation", name).capabilities.needs_only_mean]
        raise ConfigError(
            f"strategy.aggregation = {config.strategy.aggregation!r} needs every device's update, and privacy.mode = "
            f"{config.privacy.mode!r} releases their noisy mean alone. Allowed: {_listed(can)}, or a class of your own with "
            f"needs_only_mean = True"
        )


def check_selection(config: RunConfig, selection: Capabilities | None) -> None:
    """Raises ConfigError for a selection whose choice tells about the devices' data."""
    if selection is not None and not selection.ignores_data:
        can = [name for name in BUILT_IN["selection"] if load("selection", name).capabilities.ignores_data]
        raise ConfigError(
            f"strategy.selection = {config.strategy.selection!r} chooses by what devices measured, and so tells about their data, "
            f"which privacy.mode = {config.privacy.mode!r} does not account for. Allowed: {_listed(can)}, or a class of your own "
            f"with ignores_data = True"
        )


def check_places(config: RunConfig) -> None:
    """Raises ConfigError if some of what learns would be released without noise, or in a set that depends on who takes part."""
    split, lora, federation, who = (
        config.split,
        config.lora,
        config.federation,
        f"privacy.mode = {config.privacy.mode!r}",
    )
    shares = shares_hosts(config)
    if split.hosts and "hosts" in lora.train and config.privacy.mode != "central":
        raise ConfigError(
            f"{who} cannot be combined with hosts that train: a host sees what each device sends it before any noise, and only "
            f"privacy.mode = 'central' trusts hosts. Allowed: lora.train without 'hosts', split.hosts = 0, or privacy.mode = 'central'"
        )
    if shares and federation.epochs:
        raise ConfigError(
            f"federation.epochs = {federation.epochs} cannot be combined with {who} and split.host_mode = {split.host_mode!r}: the "
            f"number of the hosts' steps would depend on the devices' data. Allowed: 0, with federation.local_steps"
        )
    if not label_place(split.labels).on_device:
        raise ConfigError(
            f"split.labels = {split.labels!r} cannot be combined with {who}: the labels themselves would leave the devices. "
            f"Allowed: 'device'"
        )
    if lora.ranks:
        raise ConfigError(
            f"lora.ranks cannot be combined with {who}: what is released must not depend on which devices take part. Allowed: "
            f"lora.rank alone"
        )
    together = bool(split.hosts) and not host_mode(split.host_mode).has_copies
    if (split.fronts or split.backs) and (together or len(lora.train) < 3):
        key = "split.fronts" if split.fronts else "split.backs"
        raise ConfigError(
            f"{key} cannot be combined with {who} here: a layer would be trained by some devices and not by others, and what is "
            f"released must not depend on which devices take part. Allowed: split.front and split.back alone; or lora.train with "
            f"all of 'front', 'hosts', 'back' and either split.host_mode = 'copies' or split.hosts = 0"
        )
    if not only_hosts_train(config) and not _trains(config):
        raise ConfigError(
            f"{who} has nothing to protect: lora.train = {list(lora.train)} trains no layer of this split"
        )


def check_steps(config: RunConfig, selection: Capabilities | None) -> None:
    """Raises ConfigError if one device's data could change what is released of other devices' steps."""
    split, privacy, strategy = config.split, config.privacy, config.strategy
    if split.hosts and config.optimizer.clip == "global":
        raise ConfigError(
            f"optimizer.clip = 'global' cannot be combined with privacy.mode = {privacy.mode!r} and hosts: one scale for all would carry "
            f"the size of each device's gradient to the others. Allowed: 'stage', 'none', or split.hosts = 0"
        )
    if not shares_hosts(config):
        return
    if privacy.clip_quantile:
        raise ConfigError(
            f"privacy.clip_quantile = {privacy.clip_quantile:g} cannot be combined with split.host_mode = {split.host_mode!r} while "
            f"hosts train: it follows the devices' updates, and the hosts' bound is on gradients, whose sizes nobody releases. "
            f"Allowed: 0, split.host_mode = 'copies', lora.train without 'hosts', or split.hosts = 0"
        )
    if selection is None or not selection.sampling_rate:
        return
    who = f"strategy.selection = {strategy.selection!r} cannot be combined with"
    if host_mode(split.host_mode).steps_in_turn:
        raise ConfigError(
            f"{who} privacy.mode = {privacy.mode!r} and split.host_mode = 'sequential' while hosts train: the number of turns would say "
            f"how many devices were drawn. Allowed: split.host_mode = 'joint' or 'copies', or a selection of a fixed number of devices"
        )
    if split.sites > 1:
        raise ConfigError(
            f"{who} privacy.mode = {privacy.mode!r} and split.sites = {split.sites} while hosts train what devices share: who is drawn "
            f"decides which site each of the others trains at. Allowed: split.sites = 1, split.host_mode = 'copies', or a selection "
            f"of a fixed number of devices"
        )


def _trains(config: RunConfig) -> bool:
    """Returns whether any layer can learn."""
    split, train = config.split, config.lora.train
    return (
        bool("front" in train and split.front)
        or bool("back" in train and (split.back or config.task.classes))
        or "hosts" in train
    )


def _listed(words: Mapping[str, object] | list[str]) -> str:
    return ", ".join(map(repr, words))
