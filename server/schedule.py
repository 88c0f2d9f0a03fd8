"""The devices of a round and their shares of the bandwidth, as the strategies choose them from what rounds measured.

With `[wireless]`, the numbers come from the model of a cell instead (server.virtual.clock). Strategies see plain data; their
choices and shares are checked here before use.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from random import Random, SystemRandom
from typing import Any

from edgelam_fl.bounds import DEFAULT_BOUNDS, Bounds
from edgelam_fl.config import RunConfig
from edgelam_fl.errors import RunFailed
from edgelam_fl.plan.fronts import why_owner_refuses
from edgelam_fl.plan.making import own_steps
from edgelam_fl.plan.spec import RunSpec, tensors_per_round
from edgelam_fl.telemetry.events import VirtualDevice, VirtualRound
from edgelam_fl.telemetry.timeline import covered
from edgelam_fl.wire import edgelam_pb2 as pb
from server.replies import Reply
from server.virtual.clock import VirtualTime
from strategies.api import Candidate, Demand, RoundOutcome, RoundState, Selected
from strategies.registry import load

_BELOW_SHARE = 0.8  # a device that sends slower than this part of its share is held up by its own link
_LEAST_OF_ESTIMATE = 0.1  # a device that moved less was left out of steps, and must not get a smaller share for it
_LEAST_OF_LARGEST = 0.01  # a device that has nothing to train still sends messages, and a share of 0 would never end


def unfit(config: RunConfig, profile: pb.Profile, digest: str = "") -> str:
    """Returns why a device is not a candidate; empty: it is one. `digest`: the model's `leakage_key`, to know what hosts can read."""
    strategy = config.strategy
    missing = [tag for tag in strategy.require_tags if tag not in profile.tags]
    if missing:
        return f"has no tag {', '.join(missing)} (strategy.require_tags)"
    if profile.memory_available_bytes < strategy.min_memory_bytes:
        return (
            f"has {profile.memory_available_bytes / 1e6:.0f} MB of free memory, "
            f"{strategy.min_memory_bytes / 1e6:.0f} are required (strategy.min_memory_bytes)"
        )
    return why_owner_refuses(config, digest, profile)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineup:
    """The devices of a round, and their shares of the capacity."""

    selected: Selected
    shares: Mapping[str, float]
    dropped: Sequence[str] = ()
    """Selected devices that the wireless model makes fail: with a share, in no plan."""
    demands: Sequence[Demand] | None = None
    """What the bandwidth strategy saw; None without virtual time."""
    unfit: Mapping[str, str] = field(default_factory=dict)
    """Why devices that are here are no candidates."""

    @property
    def names(self) -> list[str]:
        """The devices that get a plan, in the order of their selection."""
        return [name for name in self.selected.names if name not in self.dropped]


class Schedule:
    def __init__(self, spec: RunSpec, bounds: Bounds = DEFAULT_BOUNDS) -> None:
        """`bounds`: the modules that the run's strategies may come from."""
        self.spec, self.config = spec, spec.config
        config = spec.config
        self.selection = load("selection", config.strategy.selection, config.strategy.options, bounds)
        self.bandwidth = load("bandwidth", config.strategy.bandwidth, config.strategy.options, bounds)
        self.virtual = VirtualTime(spec) if config.wireless.bandwidth_hz else None
        self.capacity = config.wireless.bandwidth_hz or config.wire.capacity_bps  # a band in Hz, or bits per second
        self._measured: dict[str, Candidate] = {}  # by device, as of its last round

    def state(self) -> dict[str, Any]:
        """Returns what the rounds so far have taught about the devices, as plain data; without what the strategies remember."""
        measured = {name: {**vars(facts), "tags": sorted(facts.tags)} for name, facts in self._measured.items()}
        return {"measured": measured, "virtual": self.virtual.state() if self.virtual else {}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes what `state` returned."""
        self._measured = {
            name: Candidate(**{**facts, "tags": frozenset(facts["tags"])}) for name, facts in state["measured"].items()
        }
        if self.virtual is not None:
            self.virtual.restore(state["virtual"])

    def select(
        self, number: int, here: Sequence[pb.Profile], edges: int = 0, aside: Mapping[str, str] = {}
    ) -> Selected:
        """Returns the devices of round `number`, with a reason per device that is here. Raises RunFailed for a choice that
        cannot be used.

        `edges`: the number of edge servers. If there are too few, and devices may host, listening devices are added. `aside`: why
        devices sit this round out, by name.
        """
        config = self.config
        left_out = {**aside, **self._unfit_of(here)}
        state = RoundState(
            number, self.candidates([profile for profile in here if profile.name not in left_out], number),
            self._chance(number), capacity_bps=self.capacity,
            wanted=config.federation.devices_per_round, least=config.federation.min_nodes,
        )  # fmt: skip
        chosen = self.selection.rule.select(state)
        names = [str(name) for name in chosen.names]
        least = 0 if self.selection.capabilities.sampling_rate else config.federation.min_nodes
        check_choice(config, names, {candidate.name for candidate in state.candidates}, least)
        why = {name: str(reason) for name, reason in chosen.why.items()} | left_out
        listening = sorted(p.name for p in here if p.address and p.name not in left_out)
        for name in self._missing_hosts(names, listening, edges):
            names.append(name)
            why[name] = "takes part because a host is needed (split.host_on)"
        return Selected(names, why)

    def _unfit(self, profile: pb.Profile) -> str:
        return unfit(self.config, profile, self.spec.source.leakage_key)

    def _unfit_of(self, here: Sequence[pb.Profile]) -> dict[str, str]:
        return {profile.name: reason for profile in here if (reason := self._unfit(profile))}

    def _chance(self, number: int) -> Random:
        """Returns the chance of a round's selection. Private runs draw what nobody can repeat: who knows the seed, and so who took
        part, would be told more than the run promises.
        """
        if self.config.privacy.mode != "none":
            return SystemRandom()
        return Random(f"{self.config.run.seed}/select/{number}")

    def _missing_hosts(self, names: Sequence[str], listening: Sequence[str], edges: int) -> list[str]:
        """Returns the devices that must take part too, so that one site has its hosts: a device hosts while it trains."""
        split = self.config.split
        if split.host_on != "any":
            return []
        missing = split.least_hosts - edges - len(set(names) & set(listening))
        return [name for name in listening if name not in names][: max(0, missing)]

    def lineup(
        self, number: int, attempt: int, here: Sequence[pb.Profile], edges: int, aside: Mapping[str, str] = {}
    ) -> Lineup:
        """Returns the devices that train in an attempt at round `number`. Devices that will drop out get shares, too.

        `aside`: as in `select`.
        """
        lineup = Lineup(selected=self.select(number, here, edges, aside), shares={}, unfit=self._unfit_of(here))
        if not lineup.names:
            return replace(lineup, demands=None if self.virtual is None else [])
        devices = _named(here, lineup.names)
        lineup = replace(lineup, shares=self.shares(devices, number))
        if self.virtual is None:
            return lineup
        dropped = self.virtual.dropouts(number, attempt, lineup.names)
        return replace(lineup, dropped=dropped, demands=self.demands(devices, number))

    def lineup_for_evaluation(self, number: int, here: Sequence[pb.Profile]) -> Lineup:
        """Returns all devices that may take part: each measures the result."""
        selected = self.everyone(here)
        shares = self.shares(_named(here, selected.names), number)
        return Lineup(selected=selected, shares=shares, unfit=self._unfit_of(here))

    def everyone(self, here: Sequence[pb.Profile]) -> Selected:
        """Selects all devices that may take part: for the evaluation after the last round."""
        reasons = {profile.name: self._unfit(profile) for profile in here}
        names = [name for name, reason in reasons.items() if not reason]
        return Selected(names, {name: reason or "all measure the result" for name, reason in reasons.items()})

    def demands(self, devices: Sequence[pb.Profile], number: int = 0) -> list[Demand]:
        """Returns what each device has to move. With `[wireless]`, that differs from round to round."""
        known = self.candidates(devices, number)
        least = _LEAST_OF_LARGEST * max((c.payload_bytes for c in known), default=0.0)
        return [Demand(c.name, max(c.payload_bytes, least), c.compute_s, c.limit_bps, c.snr) for c in known]

    def shares(self, devices: Sequence[pb.Profile], number: int = 0) -> dict[str, float]:
        """Returns each device's share of the capacity. Raises RunFailed if the strategy's shares cannot be used."""
        demands = self.demands(devices, number)
        shares = self.bandwidth.rule.allocate(demands, self.capacity)
        check_shares(self.config, shares, {demand.name for demand in demands})
        return {name: float(share) for name, share in shares.items()}

    def candidates(self, devices: Sequence[pb.Profile], number: int = 0) -> list[Candidate]:
        """Returns the candidates with all that is known of them. Payload and compute of unmeasured devices are estimated."""
        estimates = {device.name: estimated_payload_bytes(self.spec, device) for device in devices}
        known = {name: self._measured[name] for name in estimates if name in self._measured}
        compute_s = _mean([facts.compute_s for facts in known.values()])
        # The estimate is from above (every example as long as the longest): measured ones say by how much.
        scale = _mean([facts.payload_bytes / estimates[n] for n, facts in known.items() if estimates[n]]) or 1.0
        found = []
        for device in devices:
            facts = known.get(device.name) or Candidate(device.name, compute_s=compute_s)
            guess = scale * estimates[device.name]
            least = guess * _LEAST_OF_ESTIMATE if facts.last_round else guess
            found.append(
                replace(
                    facts,
                    payload_bytes=max(facts.payload_bytes, least),
                    examples=device.examples,
                    tags=frozenset(device.tags),
                    memory_bytes=device.memory_available_bytes,
                )
            )
        return self.virtual.candidates(number, devices, found) if self.virtual else found

    def observe(
        self, number: int, chosen: Collection[str], plans: Mapping[str, pb.Plan], replies: Mapping[str, Reply],
        virtual: VirtualRound | None = None,
    ) -> None:  # fmt: skip
        """Remembers what round `number` showed of the `chosen` devices, and shows it to strategies that observe.

        `virtual`: the round in virtual time, which then replaces measured times.
        """
        delivered = sorted(name for name in chosen if name in replies)
        for name in delivered:
            facts = measured(name, number, replies[name].report, of_values=self.spec.values is not None)
            share_bps = plans[name].routes[0].share_bps or math.inf
            held_up = facts.rate_bps is not None and facts.rate_bps < _BELOW_SHARE * share_bps
            self._measured[name] = replace(facts, limit_bps=facts.rate_bps) if held_up else facts
            if virtual:
                self._measured[name] = _in_virtual_time(facts, virtual.devices[name])
        devices = [self._measured[name] for name in delivered]
        seconds = max((device.last_seconds or 0.0 for device in devices), default=0.0)
        outcome = RoundOutcome(number, seconds, devices, sorted(set(chosen) - set(delivered)))
        for strategy in (self.selection, self.bandwidth):
            strategy.capabilities.observe(outcome)


def measured(name: str, number: int, report: pb.JobReport, *, of_values: bool = False) -> Candidate:
    """Returns a device's round in numbers. The reported numbers are not trusted to be finite. `of_values`: of a task of values."""
    steps = [step for step in report.steps if step.counted and step.labels]
    labels = sum(step.labels for step in steps)
    loss = sum(step.loss_sum for step in steps) / labels if labels else math.nan
    squared = sum(step.labels * (step.loss_sum / step.labels) ** 2 for step in steps) / labels if labels else math.nan
    return Candidate(
        name,
        examples=report.examples,
        last_loss=loss if math.isfinite(loss) else None,
        squared_loss=squared if math.isfinite(squared) else None,
        last_round=number,
        last_seconds=_sane(report.train_seconds) + _sane(report.eval_seconds),
        compute_s=_sane(report.compute_seconds),
        payload_bytes=float(sum(count.payload_bytes + count.framing_bytes for count in report.bytes)),
        rate_bps=send_rate_bps(report),
        metric=_metric(report, of_values),
    )


def send_rate_bps(report: pb.JobReport) -> float | None:
    """Returns how fast a device's tensors left it while any did; None: unknown."""
    sends = [i for i in report.timeline if i.kind == "send" and i.role == "device"]
    seconds = covered((i.start_s, i.start_s + i.seconds) for i in sends)
    if not (math.isfinite(seconds) and seconds > 0):
        return None
    return 8 * sum(i.tensor_bytes for i in sends) / seconds or None


def _named(profiles: Iterable[pb.Profile], names: Iterable[str]) -> list[pb.Profile]:
    known = {profile.name: profile for profile in profiles}
    return [known[name] for name in names]


def _in_virtual_time(facts: Candidate, device: VirtualDevice) -> Candidate:
    """Replaces measured times and rates by those of the device in virtual time."""
    return replace(
        facts,
        last_seconds=device.seconds,
        compute_s=device.download_s + device.compute_s,
        payload_bytes=device.bytes_up,
        rate_bps=device.rate_bps,
        snr=device.snr,
    )


def estimated_payload_bytes(spec: RunSpec, device: pb.Profile) -> float:
    """Returns an upper bound on the bytes per round, both ways: hidden states, and in training their gradients."""
    config = spec.config
    trained = own_steps(config, device.examples) * config.step_examples
    tensors = sum(tensors_per_round(spec, trained, device.held_out))
    return float(tensors * config.task.max_tokens * spec.token_bytes)


def check_choice(config: RunConfig, names: Sequence[str], candidates: Collection[str], least: int) -> None:
    """Raises RunFailed for devices that are not here, named twice, or fewer than `least`."""
    who = f"strategy.selection = {config.strategy.selection!r} chose {_listed(names)}"
    strangers = sorted(set(names) - set(candidates))
    if strangers:
        raise RunFailed(f"{who}; {_listed(strangers)} is not among the candidates ({_listed(sorted(candidates))})")
    if len(set(names)) < len(names):
        raise RunFailed(f"{who}; each device may be named once")
    if len(names) < least:
        raise RunFailed(f"{who} of {len(candidates)} candidates; a round needs {least} (federation.min_nodes)")


def check_shares(config: RunConfig, shares: Mapping[str, float], devices: Collection[str]) -> None:
    """Raises RunFailed for a share vector that cannot be enforced, with the strategy's name and its values."""
    values = {str(name): share for name, share in sorted(shares.items())}
    numbers = all(isinstance(share, Real) and math.isfinite(share) and share >= 0 for share in values.values())
    problem = ""
    if not numbers:
        problem = "each must be a finite number, 0 to 1"
    elif math.fsum(values.values()) > 1 + 1e-6:
        problem = f"together they are {math.fsum(values.values()):.6g}, and must be at most 1"
    elif set(values) != set(devices):
        problem = f"they must be of the chosen devices, {_listed(sorted(devices))}"
    elif (config.wire.capacity_bps or config.wireless.bandwidth_hz) and not all(values.values()):
        key = "wire.capacity" if config.wire.capacity_bps else "wireless.bandwidth_hz"
        problem = f"with {key} each must be above 0, or the device would never be through"
    if problem:
        raise RunFailed(f"strategy.bandwidth = {config.strategy.bandwidth!r} gave the shares {values}: {problem}")


def _metric(report: pb.JobReport, of_values: bool) -> float | None:
    if not report.eval_labels:
        return None
    loss = max(report.eval_loss_sum / report.eval_labels, 0.0)
    if "correct" in report.eval_sums:
        metric = report.eval_sums["correct"] / report.eval_labels
    elif of_values:
        metric = 1 / (1 + loss)  # no cross-entropy: of tens of missing bits the exponential is next to 0
    else:
        metric = math.exp(-loss)
    return metric if math.isfinite(metric) else None


def _sane(seconds: float) -> float:
    return seconds if math.isfinite(seconds) and seconds > 0 else 0.0


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values) if values else 0.0


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"
