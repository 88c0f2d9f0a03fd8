"""What a run's differential privacy promises: the modes, the numbers that do not change during a run, and what cannot be kept.

Knows the run file and how many devices there are; knows neither updates nor rounds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from edgelam_fl.config import RunConfig
from edgelam_fl.errors import ConfigError, RunFailed
from edgelam_fl.plan.modes import host_mode
from edgelam_fl.privacy.accounting import Releases, epsilon_of, noise_for

NOT_COVERED = (
    "losses and other measures, counts, fields and labels, which updates were clipped, times and sizes of messages, and the hidden "
    "states and gradients at the cut"
)
UNIT = "one device with all its data"
EMPTY_SHARE = 0.01
"""Share of delta that is kept for rounds which draw nobody, if hosts add the noise: in such a round they add none."""


@dataclass(frozen=True, kw_only=True)
class Mode:
    """What a word of `privacy.mode` means."""

    word: str
    adversary: str
    """Against whom the promise holds."""
    messages: str
    """What the promise is about."""
    moves: float
    """How far one device's data can move what is released, in clipping bounds: 1 against a device that adds nothing, 2 against
    other data of the device."""
    hides_who: bool
    """Whether the adversary does not learn which devices took part, so that Poisson selection amplifies."""
    device_clips: bool
    """Whether each device clips its update; else the server does."""
    device_noise: bool
    """Whether each device adds noise to its update."""
    server_noise: bool
    """Whether the server adds noise to the sum."""
    over_channel: bool = False
    """Whether each update comes with the noise of the emulated radio channel."""


MODES: Mapping[str, Mode] = {
    mode.word: mode
    for mode in (
        Mode(
            word="central",
            adversary="whoever sees adapters or the result, but not the server and the hosts, which are trusted",
            messages="the devices' updates",
            moves=1.0,
            hides_who=True,
            device_clips=False,
            device_noise=False,
            server_noise=True,
        ),
        Mode(
            word="device",
            adversary="whoever sees adapters, updates or the result, the server included",
            messages="the devices' updates",
            moves=2.0,
            hides_who=False,
            device_clips=True,
            device_noise=True,
            server_noise=False,
        ),
        Mode(
            word="channel",
            adversary="whoever sees what arrives over the radio channel, but not this run's server, which emulates the channel",
            messages="the devices' updates",
            moves=2.0,
            hides_who=False,
            device_clips=True,
            device_noise=False,
            server_noise=False,
            over_channel=True,
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The numbers that a run's promise rests on. None of them changes during the run."""

    mode: Mode
    epsilon: float
    """The budget."""
    delta: float
    accountant: str
    noise: float
    """Standard deviation of each release's noise, in clipping bounds."""
    per_round: int
    """Releases in a round: the updates, and one for each step of hosts that train an adapter of several devices."""
    sampling: float
    """The probability with which each device takes part in a round; 1: nothing is claimed of the selection."""
    expected: float
    """Updates that a round is planned to have: the constant that their sum is divided by."""
    devices: int
    """Devices that may take part."""
    delta_of_noise: float
    """The part of delta that the noise has to keep; the rest is the chance that a round has no noise."""

    def state(self) -> dict[str, Any]:
        """Returns the terms as plain data."""
        return {**asdict(self), "mode": self.mode.word}

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> Terms:
        """Makes the terms that `state` returned: those of a run stay, whoever is here when it goes on."""
        return cls(**{**state, "mode": MODES[state["mode"]]})

    def epsilon_after(self, rounds: int) -> float:
        """Returns what `rounds` rounds spend of the budget."""
        return epsilon_of(self.releases(rounds), self.delta_of_noise, self.accountant)

    def releases(self, rounds: int) -> Releases:
        """Returns what `rounds` rounds release."""
        return Releases(self.noise / self.mode.moves, rounds, self.per_round, self.sampling)


# ---------------------------------------------------------------- before the run


def shares_hosts(config: RunConfig) -> bool:
    """Returns whether hosts train an adapter that belongs to several devices."""
    split = config.split
    return bool(split.hosts) and not host_mode(split.host_mode).has_copies and "hosts" in config.lora.train


def releases_per_round(config: RunConfig) -> int:
    """Counts the noisy releases of a round that tell about the same devices."""
    of_devices = 0 if only_hosts_train(config) else 1
    return of_devices + (config.federation.local_steps if shares_hosts(config) else 0)


def only_hosts_train(config: RunConfig) -> bool:
    """Returns whether devices train nothing of their own: all that learns is on hosts that several devices share."""
    return shares_hosts(config) and config.lora.train == ("hosts",)


def planned_noise(config: RunConfig, sampling: float) -> float:
    """Returns the noise multiplier of a run: privacy.noise, or the smallest that keeps privacy.epsilon over all rounds.

    Raises ConfigError if the given noise spends the budget in the first round.
    """
    privacy, rounds, per_round = config.privacy, config.federation.rounds, releases_per_round(config)
    mode, delta = MODES[privacy.mode], delta_of_noise(config, sampling)
    claimed = sampling if mode.hides_who else 1.0
    if not privacy.noise:
        return noise_for(privacy.epsilon, delta, rounds, per_round, claimed, privacy.accountant) * mode.moves
    first = epsilon_of(Releases(privacy.noise / mode.moves, 1, per_round, claimed), delta, privacy.accountant)
    if first > privacy.epsilon:
        least = noise_for(privacy.epsilon, delta, 1, per_round, claimed, privacy.accountant) * mode.moves
        raise ConfigError(
            f"privacy.noise = {privacy.noise:g} spends an epsilon of {first:.4g} in the first round, and privacy.epsilon = "
            f"{privacy.epsilon:g} is the budget of the whole run: a noise of at least {math.ceil(least * 1000) / 1000:g} is "
            f"needed for one round, or 0 for the smallest that is enough for all"
        )
    return privacy.noise


def delta_of_noise(config: RunConfig, sampling: float) -> float:
    """Returns the part of privacy.delta that the noise has to keep."""
    return config.privacy.delta * (1 - EMPTY_SHARE if shares_hosts(config) and sampling < 1 else 1.0)


def check_devices(config: RunConfig, devices: int, sampling: float) -> None:
    """Raises ConfigError if a run with so many devices cannot keep what `[privacy]` asks for.

    `sampling`: as of `planned_noise`.
    """
    wanted = config.federation.devices_per_round
    if why := why_broken(config, devices, sampling):
        raise ConfigError(why)
    if wanted > devices:
        raise ConfigError(
            f"privacy.mode = {config.privacy.mode!r} needs the devices that its noise is planned for: federation.devices_per_round = "
            f"{wanted}, and there are {devices}. Allowed: at most {devices}"
        )


def why_broken(config: RunConfig, devices: int, sampling: float) -> str:
    """Returns why an attempt at a round that may have so many devices breaks the promise of the whole run; empty: it does not.

    `sampling`: as of `planned_noise`.
    """
    delta = config.privacy.delta
    if delta >= 1 / max(1, devices):
        return (
            f"privacy.delta = {delta:g} must be below 1 / the number of devices, 1 / {devices} = {1 / devices:.3g}: with a larger "
            f"one, a run that publishes one device's data would keep the promise"
        )
    if not shares_hosts(config):
        return ""
    if devices <= 1:
        return (
            f"privacy.mode = {config.privacy.mode!r} promises that nobody can tell whether a device took part, and the run has 1 device, "
            f"whose absence its host would see. Allowed: more devices, split.host_mode = 'copies', or split.hosts = 0"
        )
    empty = config.federation.rounds * (1 - sampling) ** (devices - 1)  # that some round draws nobody but one device
    if empty > EMPTY_SHARE * delta:
        least = 1 - (EMPTY_SHARE * delta / config.federation.rounds) ** (1 / (devices - 1))
        return (
            f"strategy.selection = {config.strategy.selection!r} draws none of {devices - 1} devices in some round with a probability of "
            f"{empty:.2g}, and hosts that devices share add their noise only to rounds that take place: at most {EMPTY_SHARE:g} of "
            f"privacy.delta = {delta:g} may go there. Allowed: a rate of at least {math.ceil(least * 1000) / 1000:g}, "
            f"split.host_mode = 'copies', split.hosts = 0, or a selection of a fixed number of devices"
        )
    return ""


def terms_of(config: RunConfig, sampling_rate: float, devices: int) -> Terms:
    """Returns the terms of a run with so many devices. `sampling_rate`: of a selection by independent coins, else 0.

    Raises ConfigError for a run that cannot keep them, RunFailed if fewer devices came than federation.expect_nodes says.
    """
    expected = config.federation.expect_nodes
    if devices < expected:
        raise RunFailed(
            f"privacy.mode = {config.privacy.mode!r} plans its noise for federation.expect_nodes = {expected} devices, and only "
            f"{devices} came: the noise would be too large for them. Start the missing ones, or lower federation.expect_nodes"
        )
    mode, sampling = MODES[config.privacy.mode], sampling_rate or 1.0
    check_devices(config, devices, sampling)
    return Terms(
        mode=mode,
        epsilon=config.privacy.epsilon,
        delta=config.privacy.delta,
        accountant=config.privacy.accountant,
        noise=planned_noise(config, sampling),
        per_round=releases_per_round(config),
        sampling=sampling if mode.hides_who else 1.0,
        expected=sampling_rate * devices if sampling_rate else float(config.federation.devices_per_round or devices),
        devices=devices,
        delta_of_noise=delta_of_noise(config, sampling),
    )


def adversary_of(config: RunConfig) -> str:
    """Says against whom a run's promise holds."""
    mode, split = MODES[config.privacy.mode], config.split
    devices_host = split.hosts and split.host_on == "any" and mode.word == "central"
    return mode.adversary + "; devices that host for others are such hosts" * bool(devices_host)


def not_covered_of(config: RunConfig, sampling: float) -> str:
    """Says what a run's promise does not cover, and who gets it. `sampling`: as of `Terms`."""
    who = "who takes part, " if sampling < 1 else ""
    trackers = config.run.report_to
    passed_on = f"; run.report_to passes it on to {', '.join(trackers)}" if trackers else ""
    return who + NOT_COVERED + passed_on


def messages_of(config: RunConfig) -> str:
    """Says which messages of a run the promise covers."""
    covered = [] if only_hosts_train(config) else [MODES[config.privacy.mode].messages]
    return " and ".join(covered + ["each step of the hosts' shared adapter"] * shares_hosts(config))
