"""A run's differential privacy on the server: the promise, the ledger of what is spent, and the sums of each round.

The unit is one device with all its data. Each device's update, all tensors that the devices train as one vector, is clipped;
the sum over the devices gets noise, and is divided by a constant (`private_sums`). What a round's rule of aggregation gets is
that one mean, so nothing else about single devices can follow from it. Knows no plans and no messages; `private_terms` says
what is promised, `edgelam_fl.privacy` has the arithmetic.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from edgelam_fl.errors import ConfigError, RunFailed
from edgelam_fl.files import sync_folder, write_atomically
from edgelam_fl.model.adapter import Adapter, layer_number
from edgelam_fl.model.value_ends import is_of_module
from edgelam_fl.plan.making import ClientSettings, RoundPrivacy
from edgelam_fl.plan.modes import host_mode
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.privacy.accounting import rounds_within
from edgelam_fl.privacy.channel import Exposure
from edgelam_fl.privacy.mechanism import Bound, secret_generator
from edgelam_fl.telemetry.events import ChannelNoise, PrivacyPromised, PrivacySpent
from edgelam_fl.wire import edgelam_pb2 as pb
from server.emulated_channel import EmulatedChannel, RoundOnAir
from server.global_adapter import first_adapter
from server.private_sums import PrivateSums
from server.private_terms import UNIT, Terms, adversary_of, messages_of, not_covered_of, shares_hosts, why_broken
from strategies.aggregation.factors import A, B

LEDGER = "privacy.json"


def start_of_updates(spec: RunSpec) -> Adapter:
    """Returns the initial values of all tensors that devices' updates can have: a constant set, whoever takes part."""
    config, layers = spec.config, spec.source.num_layers
    split, lora = config.split, config.lora
    on_device = set(lora.train) - ({"hosts"} if split.hosts and not host_mode(split.host_mode).has_copies else set())
    if config.privacy.private_front:
        on_device -= {"front"}

    def learns(name: str) -> bool:
        if is_of_module(name, config.task.private_modules):
            return False
        layer = layer_number(name)
        if layer is None or layer >= layers - split.back:
            return "back" in on_device
        return ("front" if layer < split.front else "hosts") in on_device

    return {name: array for name, array in first_adapter(spec).items() if learns(name)}


def is_frozen(name: str, settings: ClientSettings) -> bool:
    """Returns whether an aggregation lets a factor rest in a round."""
    return (name.endswith(A) and not settings.train_a) or (name.endswith(B) and not settings.train_b)


class Ledger:
    """The rounds that a run has spent, in its folder: written before a round releases anything."""

    def __init__(self, folder: Path, terms: Terms, *, goes_on: bool = False) -> None:
        """Goes on with the ledger that the folder has, if it has one. `goes_on`: of a run that is resumed, which may have an
        adapter to evaluate when nothing is left to spend.

        Raises ConfigError if that was kept for other terms, or if it leaves nothing to spend.
        """
        self._file, self._terms = folder / LEDGER, terms
        self.rounds = 0
        if self._file.exists():
            self._resume(self._read(), goes_on)

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
        write_atomically(self._file, json.dumps(self._line() | {"rounds": self.rounds}) + "\n", durable=True)
        sync_folder(self._file.parent)

    def _read(self) -> Mapping[str, object]:
        """Returns what the file says. Raises ConfigError if it does not say what was spent."""
        try:
            line = json.loads(self._file.read_text(encoding="utf-8"))
        except ValueError:
            line = None
        rounds = line.get("rounds") if isinstance(line, dict) else None
        if not isinstance(line, dict) or not isinstance(rounds, int) or rounds < 0:
            raise ConfigError(
                f"{self._file.name} in this run's folder is damaged: what was spent of the privacy budget cannot be known. Start a run "
                f"with a folder of its own"
            )
        return line

    def _resume(self, line: Mapping[str, Any], goes_on: bool) -> None:
        rounds, own = line["rounds"], self._line()
        if {key: line.get(key) for key in own} != own:
            raise ConfigError(
                f"{self._file.name} in this run's folder was kept for other terms ({_words(line)}) than this run's ({_words(own)}): "
                f"what was spent there cannot be counted here. Start a run with a folder of its own"
            )
        self.rounds = rounds
        if not self.affords_a_round and not goes_on:
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
        saved: Mapping[str, Any] | None = None,
    ) -> None:
        """`folder`: the run's. `generator`: of the noise; None: one that nobody can repeat. `saved`: what `state` of the run
        that goes on returned; None: a new run. The ledger in the folder may have counted attempts since then: they stay spent.
        Raises ConfigError if it has counted fewer, and as `Ledger` does.
        """
        privacy = spec.config.privacy
        self.spec, self.terms, self.ledger = spec, terms, Ledger(folder, terms, goes_on=saved is not None)
        self.bound = Bound(privacy.clip, privacy.clip_quantile)
        self._generator = generator or secret_generator()
        self.starts = start_of_updates(spec)
        self._channel: EmulatedChannel | None = None
        if terms.mode.over_channel:
            earlier = self.ledger.rounds * (terms.mode.moves / terms.noise) ** 2
            exposure = Exposure(terms.delta, terms.accountant, earlier)
            self._channel = EmulatedChannel(spec.config.wireless, spec.config.run.seed, exposure)
        if saved is not None:
            self._restore(saved)

    def state(self) -> dict[str, Any]:
        """Returns the terms and what the rounds so far have changed, as plain data. The noise's generator is not in it: noise
        that can be drawn again protects nothing.
        """
        return {
            "terms": self.terms.state(),
            "rounds": self.ledger.rounds,
            "bound": asdict(self.bound),
            "channel": self._channel.state() if self._channel is not None else {},
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        since = self.ledger.rounds - state["rounds"]
        if since < 0:
            raise ConfigError(
                f"{LEDGER} in this run's folder counts {self.ledger.rounds} rounds, and its checkpoint {state['rounds']}: the file was "
                f"lost or changed, and what is spent cannot be known. Start a run with a folder of its own"
            )
        self.bound = Bound(**state["bound"])
        if self._channel is not None:
            self._channel.restore(state["channel"], since * (self.terms.mode.moves / self.terms.noise) ** 2)

    def check_present(self, devices: int) -> None:
        """Raises RunFailed if an attempt that so many devices may take part in would break the promise: some may have left since it
        was made, or joined.
        """
        if why := why_broken(self.spec.config, devices, self.terms.sampling):
            raise RunFailed(
                f"{devices} of the {self.terms.devices} devices that privacy was promised to are here now, and with them the promise does "
                f"not hold: {why}. The last round's adapter stays; `edgelam run --resume` goes on when others are here"
            )

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
            adversary=adversary_of(self.spec.config),
            messages=messages_of(self.spec.config),
            not_covered=not_covered_of(self.spec.config, terms.sampling),
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
        f"privacy: protects {promised.unit}, against {promised.adversary}; covers {promised.messages}, not {promised.not_covered}\n"
        f"privacy: federation.update_factor and gradient_factor are off, since clipping bounds what a device can do"
    )


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _words(line: Mapping[str, object]) -> str:
    return ", ".join(f"{key} {value}" for key, value in line.items())
