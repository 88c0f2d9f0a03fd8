"""Differential privacy on the server: what a run promises, what it has spent of it, and the private mean of a round's updates.

The unit is one device with all its data. Each device's update, all tensors that the devices train as one vector, is clipped;
the sum over the devices gets noise, and is divided by a constant. What a round's rule of aggregation gets is that one mean, so
nothing else about single devices can follow from it. Knows no plans and no messages; `edgelam_fl.privacy` has the arithmetic.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from edgelam_fl.config import RunConfig
from edgelam_fl.errors import ConfigError, RunFailed
from edgelam_fl.files import write_atomically
from edgelam_fl.model.adapter import Adapter, initial_adapter, layer_number
from edgelam_fl.plan.making import ClientSettings, RoundPrivacy
from edgelam_fl.plan.modes import host_mode
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.privacy.accounting import Releases, epsilon_of, noise_for, rounds_within
from edgelam_fl.privacy.channel import Exposure
from edgelam_fl.privacy.mechanism import Bound, clip_to, gaussian, secret_generator
from edgelam_fl.telemetry.events import ChannelNoise, PrivacyPromised, PrivacySpent
from edgelam_fl.wire import edgelam_pb2 as pb
from server.emulated_channel import EmulatedChannel, RoundOnAir
from strategies.aggregation.factors import A, B
from strategies.aggregation.fedavg import WeightedMean
from strategies.api import Contribution

LEDGER = "privacy.json"
NOT_COVERED = "losses, counts, and the hidden states and gradients at the cut"
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
    delta, wanted = config.privacy.delta, config.federation.devices_per_round
    if delta >= 1 / devices:
        raise ConfigError(
            f"privacy.delta = {delta:g} must be below 1 / the number of devices, 1 / {devices} = {1 / devices:.3g}: with a larger "
            f"one, a run that publishes one device's data would keep the promise"
        )
    if wanted > devices:
        raise ConfigError(
            f"privacy.mode = {config.privacy.mode!r} needs the devices that its noise is planned for: federation.devices_per_round = "
            f"{wanted}, and there are {devices}. Allowed: at most {devices}"
        )
    if not shares_hosts(config):
        return
    empty = config.federation.rounds * (1 - sampling) ** (devices - 1)  # that some round draws nobody but one device
    if empty > EMPTY_SHARE * delta:
        least = 1 - (EMPTY_SHARE * delta / config.federation.rounds) ** (1 / (devices - 1)) if devices > 1 else 1.0
        raise ConfigError(
            f"strategy.selection = {config.strategy.selection!r} draws none of {devices - 1} devices in some round with a probability of "
            f"{empty:.2g}, and hosts that devices share add their noise only to rounds that take place: at most {EMPTY_SHARE:g} of "
            f"privacy.delta = {delta:g} may go there. Allowed: a rate of at least {math.ceil(least * 1000) / 1000:g}, "
            f"split.host_mode = 'copies', split.hosts = 0, or a selection of a fixed number of devices"
        )


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


def start_of_updates(spec: RunSpec) -> Adapter:
    """Returns the initial values of all tensors that devices' updates can have: a constant set, whoever takes part."""
    config, layers = spec.config, spec.source.num_layers
    split, lora = config.split, config.lora
    on_device = set(lora.train) - ({"hosts"} if split.hosts and not host_mode(split.host_mode).has_copies else set())
    if config.privacy.private_front:
        on_device -= {"front"}

    def learns(name: str) -> bool:
        layer = layer_number(name)
        if layer is None or layer >= layers - split.back:
            return "back" in on_device
        return ("front" if layer < split.front else "hosts") in on_device

    whole = initial_adapter(spec.source, lora.targets, lora.rank, config.run.seed, classes=len(config.task.classes))
    return {name: array for name, array in whole.items() if learns(name)}


def is_frozen(name: str, settings: ClientSettings) -> bool:
    """Returns whether an aggregation lets a factor rest in a round."""
    return (name.endswith(A) and not settings.train_a) or (name.endswith(B) and not settings.train_b)


# ---------------------------------------------------------------- over the run


class Ledger:
    """The rounds that a run has spent, in its folder: written before a round releases anything."""

    def __init__(self, folder: Path, terms: Terms) -> None:
        """Goes on with the ledger that the folder has, if it has one.

        Raises ConfigError if that was kept for other terms, or if it leaves nothing to spend.
        """
        self._file, self._terms = folder / LEDGER, terms
        self.rounds = 0
        if self._file.exists():
            self._resume(json.loads(self._file.read_text(encoding="utf-8")))

    @property
    def epsilon(self) -> float:
        """What is spent."""
        return self._terms.epsilon_after(self.rounds)

    @property
    def affords_a_round(self) -> bool:
        """Whether one more round stays within the budget."""
        return self._terms.epsilon_after(self.rounds + 1) <= self._terms.epsilon

    def spend_a_round(self) -> None:
        """Counts one more round as spent."""
        self.rounds += 1
        write_atomically(self._file, json.dumps(self._line() | {"rounds": self.rounds}) + "\n")

    def _resume(self, line: Mapping[str, object]) -> None:
        rounds, own = line.get("rounds"), self._line()
        if not isinstance(rounds, int) or {key: line.get(key) for key in own} != own:
            raise ConfigError(
                f"{self._file.name} in this run's folder was kept for other terms ({_words(line)}) than this run's ({_words(own)}): "
                f"what was spent there cannot be counted here. Start a run with a folder of its own"
            )
        self.rounds = rounds
        if not self.affords_a_round:
            raise ConfigError(
                f"the privacy budget is spent: {rounds} rounds took an epsilon of {self.epsilon:.4g} of privacy.epsilon = "
                f"{self._terms.epsilon:g} ({self._file.name} in this run's folder), and one more would exceed it. The adapter of the "
                f"last round stays; to train on, raise privacy.epsilon knowingly"
            )

    def _line(self) -> dict[str, object]:
        """Returns the terms that a round's cost depends on."""
        terms = self._terms
        return {
            "mode": terms.mode.word,
            "noise": terms.noise,
            "per_round": terms.per_round,
            "sampling": terms.sampling,
            "delta": terms.delta,
            "accountant": terms.accountant,
        }


class PrivateRun:
    """A run's promise and what is left of it; remembers from round to round, as strategies do."""

    def __init__(
        self,
        spec: RunSpec,
        terms: Terms,
        folder: Path,
        *,
        generator: np.random.Generator | None = None,
    ) -> None:
        """`folder`: the run's. `generator`: of the noise; None: one that nobody can repeat."""
        privacy = spec.config.privacy
        self.spec, self.terms, self.ledger = spec, terms, Ledger(folder, terms)
        self.bound = Bound(privacy.clip, privacy.clip_quantile)
        self._generator = generator or secret_generator()
        self.starts = start_of_updates(spec)
        self._channel: EmulatedChannel | None = None
        if terms.mode.over_channel:
            exposure = Exposure(terms.delta, terms.accountant)
            self._channel = EmulatedChannel(spec.config.wireless, spec.config.run.seed, exposure)

    def promise(self) -> PrivacyPromised:
        """Makes the event that says what this run promises."""
        terms, rounds = self.terms, self.spec.config.federation.rounds
        most = rounds_within(terms.epsilon, terms.delta_of_noise, terms.releases(rounds), terms.accountant)
        return PrivacyPromised(
            mode=terms.mode.word,
            epsilon=terms.epsilon,
            delta=terms.delta,
            noise=terms.noise,
            clip=self.bound.clip,
            rounds=most,
            releases_per_round=terms.per_round,
            sampling=terms.sampling,
            denominator=terms.expected,
            accountant=terms.accountant,
            unit=UNIT,
            adversary=terms.mode.adversary,
            messages=messages_of(self.spec.config),
            not_covered=NOT_COVERED,
        )

    def for_plans(self) -> RoundPrivacy:
        """Returns what nodes have to do in the coming round."""
        terms = self.terms
        return RoundPrivacy(
            clip=self.bound.clip,
            noise=terms.noise,
            devices=terms.expected,
            device_clips=terms.mode.device_clips,
            device_noise=terms.mode.device_noise,
        )

    def sums(self, number: int, start: Adapter, settings: ClientSettings, site_sources: Collection[str]) -> PrivateSums:
        """Returns an empty sum of a round's updates. `start`: the global adapter that the round `number` starts from."""
        mode = self.terms.mode
        sigma = self.bound.update_noise(self.terms.noise) * self.bound.clip if mode.server_noise else 0.0
        starts = {name: start[name] for name in self.starts if not is_frozen(name, settings)}
        return PrivateSums(
            start=starts,
            site_sources=frozenset(site_sources),
            hosts_release=shares_hosts(self.spec.config),
            clip=math.inf if mode.device_clips else self.bound.clip,
            sigma=sigma,
            expected=self.terms.expected,
            generator=self._generator,
            air=self._on_air(number, sum(array.size for array in starts.values())),
        )

    def _on_air(self, number: int, values: int) -> RoundOnAir | None:
        """Returns the channel of an attempt at a round, for updates of so many numbers; None if no channel adds the noise."""
        if self._channel is None:
            return None
        noise, moves = self.terms.noise, self.terms.mode.moves
        return self._channel.in_round(number, values=values, clip=self.bound.clip, noise=noise, moves=moves)

    def channel_noise(self, attempt: int, sums: PrivateSums) -> ChannelNoise | None:
        """Makes the event of an attempt whose updates came over the emulated channel; None for other modes."""
        if self._channel is None or sums.air is None:
            return None
        return self._channel.event(attempt, sums.air)

    def spent(self, number: int, attempt: int, sums: PrivateSums, reports: Sequence[pb.JobReport]) -> PrivacySpent:
        """Makes the event of an attempt that has been paid for, and moves an adaptive bound if the attempt released a mean.

        `reports`: of its nodes.
        """
        counts, clip = sums.released, self.bound.clip
        if counts is not None:
            self.bound = self.bound.after(
                counts.whole, counts.came, self.terms.expected, self.terms.noise, self._generator
            )
        if self.terms.mode.device_clips:
            updates = [report.update_clipped for report in reports if report.role == pb.DEVICE]
            clipped = _share(sum(updates), len(updates))
        else:
            clipped = _share(counts.came - counts.whole, counts.came) if counts is not None else None
        gradients = sum(report.host.gradients for report in reports)
        return PrivacySpent(
            round=number,
            attempt=attempt,
            epsilon=self.ledger.epsilon,
            delta=self.terms.delta,
            noise=self.terms.noise,
            clip=clip,
            clipped=clipped,
            gradients_clipped=_share(sum(report.host.gradients_clipped for report in reports), gradients),
        )


def promise_in_words(promised: PrivacyPromised, rounds: int) -> str:
    """Says what a run promises, for the terminal. `rounds`: those of the run file."""
    if promised.rounds < rounds:
        lasts = f"enough for {promised.rounds} of {rounds} rounds, after which the run ends"
    else:
        lasts = f"over {rounds} rounds"
    sampled = f", each device in a round with probability {promised.sampling:g}" if promised.sampling < 1 else ""
    return (
        f"privacy: epsilon {promised.epsilon:g} at delta {promised.delta:g}, {lasts}{sampled}; noise {promised.noise:.4g} x the "
        f"bound {promised.clip:g} on each of {promised.releases_per_round} releases per round, sums divided by {promised.denominator:g}\n"
        f"privacy: protects {promised.unit}, against {promised.adversary}; covers {promised.messages}, not {promised.not_covered}"
    )


def messages_of(config: RunConfig) -> str:
    """Says which messages of a run the promise covers."""
    covered = [] if only_hosts_train(config) else [MODES[config.privacy.mode].messages]
    return " and ".join(covered + ["each step of the hosts' shared adapter"] * shares_hosts(config))


# ---------------------------------------------------------------- a round


@dataclass(frozen=True)
class Counts:
    """The updates in a released mean."""

    came: int = 0
    whole: int = 0
    """Those that the clipping bound left as they were."""

    def plus(self, other: Counts) -> Counts:
        return Counts(self.came + other.came, self.whole + other.whole)


@dataclass
class PrivateSums:
    """The sum of a round's clipped updates, per site: as large as one update each, however many arrive.

    The adapters of sites that several devices train pass through: their noise was added on the host.
    """

    start: Adapter
    """What the updates start from: exactly the tensors that devices train in this round."""
    site_sources: frozenset[str]
    hosts_release: bool
    """Whether hosts train an adapter that several devices share, and have added the noise to it; else nothing of theirs counts."""
    clip: float
    """The L2 norm that an update may have; infinity: the devices have clipped it."""
    sigma: float
    """Standard deviation of the noise on the sum; 0: the updates have their noise."""
    expected: float
    """What the sum is divided by, whoever came."""
    generator: np.random.Generator
    air: RoundOnAir | None = None
    """The emulated channel that adds noise to each update; None: nothing is added on the way."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Why an update does not count, by device: only because parts of it are missing, since clipping bounds what it can do."""
    released: Counts | None = None
    """What the released mean is of; None: nothing was released yet."""
    _waiting: dict[tuple[str, str], Adapter] = field(default_factory=dict)  # by (site, device): updates that miss parts
    _sums: dict[str, Adapter] = field(default_factory=dict)  # by site, in float64
    _counts: dict[str, Counts] = field(default_factory=dict)
    _of_sites: dict[str, WeightedMean] = field(default_factory=dict)

    def add(self, parts: Iterable[tuple[str, Contribution]]) -> None:
        """Adds the parts of one reply, each with its site. An update that comes in several replies waits for all its parts."""
        for site, part in parts:
            if part.source in self.site_sources:
                if self.hosts_release:
                    # Weights say how many labels a device has, so they have no say in what is released.
                    self._of_sites.setdefault(site, WeightedMean()).add(replace(part, weight=1.0))
                continue
            waiting = self._waiting.setdefault((site, part.source), {})
            waiting |= {
                name: array - np.float64(self.start[name]) for name, array in part.tensors.items() if name in self.start
            }
            if len(waiting) == len(self.start):
                self._add_update(site, part.source, self._waiting.pop((site, part.source)))

    def _add_update(self, site: str, source: str, update: Adapter) -> None:
        clipped, norm = clip_to(update, self.clip)
        sums = self._sums.setdefault(site, {})
        sigma = self.air.send(source) if self.air is not None else 0.0
        for name, array in clipped.items():
            noisy = array + gaussian(array.shape, sigma, self.generator) if sigma else array
            sums[name] = sums[name] + noisy if name in sums else noisy
        self._counts[site] = self._counts.get(site, Counts()).plus(Counts(1, int(norm <= self.clip)))

    def contributions(self, broken: Collection[str]) -> list[Contribution]:
        """Returns the private mean as one contribution, and the mean of the sites; without the `broken` sites.

        Draws the noise, so it is to be called once.
        """
        for (site, source), waiting in self._waiting.items():
            if site not in broken:
                self.left_out[source] = f"its update has {len(waiting)} of {len(self.start)} tensors"
        found = list[Contribution]()
        sites = WeightedMean()
        for site in sorted(self._of_sites.keys() - set(broken)):
            sites.merge(self._of_sites.pop(site))
        found += [Contribution("the sites", weight, tensors) for weight, tensors in sites.by_weight()]
        if self.start:
            found.append(Contribution("the devices", 1.0, self._mean(broken)))
        return found

    def _mean(self, broken: Collection[str]) -> Adapter:
        counted = sorted(self._sums.keys() - set(broken))
        self.released = Counts()
        for site in counted:
            self.released = self.released.plus(self._counts[site])
        new: Adapter = {}
        for name, start in self.start.items():
            noise = gaussian(start.shape, self.sigma, self.generator)
            total = noise + sum((self._sums[site][name] for site in counted), start=np.zeros(start.shape))
            new[name] = (start + total / self.expected).astype(np.float32)
        return new


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _words(line: Mapping[str, object]) -> str:
    return ", ".join(f"{key} {value}" for key, value in line.items())
