"""The summary of a run, made from its events alone: the content of RUN/summary.json.

Knows nothing about how a run goes on; `summary_words` and `report` show the same values.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelam_fl.errors import INTERRUPTED, DataError
from edgelam_fl.telemetry.events import (
    BestTaken,
    BudgetSpent,
    ChannelNoise,
    DataCounts,
    DeviceResult,
    Event,
    HostResult,
    NodeJoined,
    NodeResult,
    PlanMade,
    PrivacyPromised,
    PrivacySpent,
    RoundDone,
    RunDone,
    RunFailure,
    RunResumed,
    RunStarted,
    RunWaits,
    of_kind,
)
from edgelam_fl.telemetry.events.rounds import mean_of
from edgelam_fl.telemetry.human import (
    by_name,
    total,
)
from edgelam_fl.telemetry.measures import MEASURES
from edgelam_fl.telemetry.records import read_record

LINK_BYTES = ("bytes_up", "bytes_down")
EARLY_ENDS = ("stopped", "failed")
ENDED = ("done", *EARLY_ENDS)
"""What a run says of itself at its end, as `run_state` has it."""
ADAPTER_BYTES = ("adapter_bytes_up", "adapter_bytes_down")


@dataclass(frozen=True, kw_only=True)
class DeviceSummary(DataCounts):
    """One device over a whole run."""

    name: str
    """Name of the device."""
    examples: int | None
    """Examples that it trains on."""
    held_out: int | None = None
    """Examples that it measures with."""
    perplexity_before: float | None
    """Held-out perplexity of the adapter that round 1 started from; null for a device that came later."""
    metrics_before: Mapping[str, float | None]
    """Other held-out measures at the same time: "accuracy", or the means of task.metrics; empty if there are none."""
    perplexity_after: float | None
    """Held-out perplexity at the last round_done, which is the evaluation after the last round if the run ended; with
    federation.load_best of the adapter that is the result. Null for a device that was not in it, and while there is only one
    round_done."""
    metrics_after: Mapping[str, float | None]
    """Other held-out measures at the same time."""
    tokens_per_s: float | None
    """Tokens trained over seconds of training, both summed over rounds; waiting for others is included."""
    bytes_up: int | None
    """Bytes sent on its links, all kinds of frames, over all rounds and the last evaluation."""
    bytes_down: int | None
    """Bytes received on its links."""
    adapter_bytes_up: int | None
    """Bytes of adapters that it sent to the server, through Flower."""
    adapter_bytes_down: int | None
    """Bytes of adapters that it received from there."""
    peak_rss_bytes: int | None
    """Largest resident memory of its stage host's process."""


@dataclass(frozen=True, kw_only=True)
class HostSummary:
    """One host over a whole run. A device that is a host too is among the devices as well."""

    name: str
    """Name of the host."""
    layers: tuple[int, ...] | None
    """Its layers as [first, last), in the latest round."""
    peak_rss_bytes: int | None
    """Largest resident memory of its stage host's process."""
    bytes_up: int | None
    """Bytes sent on its links, all kinds of frames, over all rounds and the last evaluation."""
    bytes_down: int | None
    """Bytes received on its links."""


@dataclass(frozen=True, kw_only=True)
class VirtualTotals:
    """All training rounds together, in the virtual time of the wireless model."""

    seconds: float
    """Virtual seconds."""
    bytes: float
    """Bytes of all devices."""
    joules: float
    """Energy of all devices."""


@dataclass(frozen=True, kw_only=True)
class ChannelSummary:
    """The updates that came with the noise of the emulated radio channel, over all rounds."""

    updates: int
    """Updates that arrived."""
    lowered: int
    """Those that were sent with less power than allowed, because the channel was too good for the promise."""
    epsilon: float
    """What the device with the best channels has given away."""


@dataclass(frozen=True, kw_only=True)
class PrivacySummary:
    """What a run with differential privacy promised, and what it spent of it."""

    mode: str
    """privacy.mode of the run file."""
    epsilon: float
    """What the run has spent; 0 before its first round."""
    budget: float
    """What it may spend: privacy.epsilon."""
    delta: float
    """Probability that epsilon does not hold."""
    unit: str
    """What is protected."""
    adversary: str
    """Against whom the promise holds."""
    messages: str
    """Messages that the promise covers."""
    not_covered: str
    """What it does not cover."""
    noise: float
    """Standard deviation of the noise of each release, in clipping bounds."""
    clip: float
    """The clipping bound of the last round, an L2 norm."""
    clipped: float | None
    """Share of the updates that the bound shortened, as a mean over the rounds that had any; null if none had."""
    ended_early: bool
    """Whether the budget was spent before the last round of the run file."""
    gradients_clipped: float | None = None
    """The share of the gradients that the bound shortened in the steps of hosts that devices share; null without such hosts."""
    channel: ChannelSummary | None = None
    """The emulated radio channel's noise; null in other modes than "channel"."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The result of one run. A value that no event gives is null."""

    run: str | None
    """Name of the run."""
    state: str
    """Either "done", "failed", "stopped" by somebody, "running", "waiting" for other runs, "starting", "killed": it runs nowhere and did
    not say how it ended, or "never begun"."""
    model: str | None
    """model.name of the run file."""
    task: str | None
    """task.kind of the run file."""
    devices: tuple[DeviceSummary, ...]
    """The devices, by name."""
    hosts: tuple[HostSummary, ...]
    """The nodes that serve devices, by name."""
    rounds: int
    """Training rounds that were closed; the evaluation after the last one does not count."""
    seconds: float | None
    """Wall clock from the first event to the end of the run, or to the last event so far."""
    virtual: VirtualTotals | None
    """The run in virtual time; null without [wireless]."""
    versions: Mapping[str, str]
    """Version per package on the server."""
    privacy: PrivacySummary | None = None
    """The run's differential privacy; null if it promises none."""
    best_round: int | None = None
    """The round whose adapter is the result, 0: what the run started from; null: the last round (without federation.load_best)."""


def build_summary(events: Sequence[Event], state: str = "", name: str | None = None) -> Summary:
    """Makes a run's summary. `state`: how it stands; "": what the events alone say. `name`: of a run that has not said its own."""
    started = next(of_kind(events, RunStarted), None)
    rounds, best = finished_rounds(events), best_taken(events)
    return Summary(
        run=started.run if started else name,
        state=state or run_state(events),
        model=setting(events, "model", "name"),
        task=task_of(events),
        devices=_devices(events, rounds, best.round + 1 if best is not None else None),
        hosts=_hosts(events, rounds),
        rounds=sum(map(is_training_round, rounds)),
        seconds=_seconds(events),
        virtual=_virtual(rounds),
        versions=started.versions if started else {},
        privacy=_privacy(events),
        best_round=best.round if best is not None else None,
    )


def read_summary(file: Path) -> Summary:
    """Reads a summary.json. Raises DataError for a file that is none."""
    try:
        return read_record(Summary, json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{file} is not a run's summary ({error!s:.100}): the file is damaged", "json") from error


def task_of(events: Iterable[Event]) -> str | None:
    """Returns task.kind of the run file."""
    kind: str | None = setting(events, "task", "kind")
    return kind


def measured(device: DeviceResult, measure: str) -> float | None:
    """Returns a device's held-out value in a round; None if it was not measured."""
    return device.perplexity if measure == "perplexity" else device.metrics.get(measure)


def pooled(devices: Iterable[DeviceResult]) -> dict[str, float]:
    """Returns the held-out measure over all devices by its name; empty if none measured.

    Sums, never a mean of the devices' means: hits / labels, exp(sum of losses / labels), or the mean over the values of all points.
    A device of an older record, which lacks its labels, counts as one label. The measure is infinite if a device's was not finite.
    """
    devices = list(devices)
    of_points = [device for device in devices if device.points]
    if of_points:
        name = next(name for name in of_points[0].metrics if MEASURES.get(name, MEASURES["perplexity"]).over)
        mean = mean_of(point for device in of_points for point in device.points if not point.who)
        return {name: math.inf if mean is None else mean}
    found = [device for device in devices if device.held_out_labels or device.perplexity or device.metrics]
    if not found:
        return {}
    labels = [device.held_out_labels or 1 for device in found]
    if any("accuracy" in device.metrics for device in found):
        hits = [count * (one.metrics.get("accuracy") or 0.0) for count, one in zip(labels, found, strict=True)]
        return {"accuracy": math.fsum(hits) / sum(labels)}
    losses = [math.log(device.perplexity) if device.perplexity else math.inf for device in found]
    return {"perplexity": math.exp(math.fsum(map(operator.mul, labels, losses)) / sum(labels))}


def mean_metrics(each: Iterable[Mapping[str, float | None]]) -> dict[str, float]:
    """Returns the mean over devices of each measure of answers (task.metrics); a task's own measure is not among them."""
    found: dict[str, list[float]] = {}
    for metrics in each:
        for name, value in metrics.items():
            if value is not None and name not in MEASURES:
                found.setdefault(name, []).append(value)
    return {name: math.fsum(values) / len(values) for name, values in found.items()}


def before_and_after(device: DeviceSummary, measure: str) -> tuple[float | None, float | None]:
    """Returns a device's held-out values at the start and at the end of the run."""
    if measure == "perplexity":
        return device.perplexity_before, device.perplexity_after
    return device.metrics_before.get(measure), device.metrics_after.get(measure)


def run_state(events: Iterable[Event]) -> str:
    """Returns what the last event that says so says of the run: "waiting" (for other runs), "running", or a word of ENDED.

    A run that had ended early may go on later. Whether a process still works on it is not seen here.
    """
    state = "running"
    for event in events:
        match event:
            case RunFailure():
                state = "stopped" if event.exit_code == INTERRUPTED else "failed"
            case RunDone():
                state = "done"
            case RunWaits():
                state = "waiting"
            case RunStarted() | RunResumed():
                state = "running"
    return state


def finished_rounds(events: Iterable[Event]) -> list[RoundDone]:
    """Returns the last event of each finished round, in order: a run that went on from an older checkpoint repeats rounds."""
    newest = {done.round: done for done in of_kind(events, RoundDone)}
    return [newest[number] for number in sorted(newest)]


def best_taken(events: Iterable[Event]) -> BestTaken | None:
    """Returns what says which adapter is the result; None: the last one, or the run goes on."""
    newest = None
    for event in events:
        match event:
            case BestTaken():
                newest = event
            case RunResumed():
                newest = None
    return newest


def is_training_round(done: RoundDone) -> bool:
    """Returns whether a device took a step in the round: false for the evaluation after the last round."""
    return any(device.step_losses or device.loss is not None for device in done.devices)


def steps_of(done: RoundDone) -> int:
    """Returns the optimizer steps of a round: those of the device that took most."""
    return max((len(device.step_losses) for device in done.devices), default=0)


def setting(events: Iterable[Event], section: str, key: str) -> Any:
    """Returns a key of the run file; None if the events do not say."""
    started = next(of_kind(events, RunStarted), None)
    return (started.config.get(section) or {}).get(key) if started else None


def _seconds(events: Sequence[Event]) -> float | None:
    """Returns the run's own measure, else the time between the events."""
    done = next(of_kind(events, RunDone), None)
    if done is not None and done.seconds is not None:
        return done.seconds
    if not events:
        return None
    end = list(of_kind(events, RunFailure))[-1] if run_state(events) in EARLY_ENDS else events[-1]
    return round((end.time or 0.0) - began(events), 3)


def began(events: Sequence[Event]) -> float:
    """Returns the Unix seconds of a run's first event after it has waited for other runs; those of its first if there is none yet."""
    first = next((event for event in events if not isinstance(event, RunWaits)), events[0])
    return first.time or 0.0


def _privacy(events: Sequence[Event]) -> PrivacySummary | None:
    promised = next(of_kind(events, PrivacyPromised), None)
    if promised is None:
        return None
    spent = list(of_kind(events, PrivacySpent))
    return PrivacySummary(
        mode=promised.mode,
        epsilon=spent[-1].epsilon if spent else 0.0,
        budget=promised.epsilon,
        delta=promised.delta,
        unit=promised.unit,
        adversary=promised.adversary,
        messages=promised.messages,
        not_covered=promised.not_covered,
        noise=promised.noise,
        clip=spent[-1].clip if spent else promised.clip,
        clipped=_mean(event.clipped for event in spent),
        ended_early=any(of_kind(events, BudgetSpent)),
        gradients_clipped=_mean(event.gradients_clipped for event in spent),
        channel=_channel(list(of_kind(events, ChannelNoise))),
    )


def _mean(shares: Iterable[float | None]) -> float | None:
    """Returns the mean of the shares that are known."""
    known = [share for share in shares if share is not None]
    return sum(known) / len(known) if known else None


def _channel(attempts: Sequence[ChannelNoise]) -> ChannelSummary | None:
    if not attempts:
        return None
    return ChannelSummary(
        updates=sum(attempt.devices for attempt in attempts),
        lowered=sum(attempt.lowered for attempt in attempts),
        epsilon=attempts[-1].epsilon,
    )


def _virtual(rounds: Iterable[RoundDone]) -> VirtualTotals | None:
    found = [done.virtual for done in rounds if done.virtual is not None]
    if not found:
        return None
    return VirtualTotals(
        seconds=sum(virtual.seconds for virtual in found),
        bytes=sum(virtual.bytes for virtual in found),
        joules=sum(virtual.joules for virtual in found),
    )


def _devices(
    events: Iterable[Event], rounds: Sequence[RoundDone], measured_in: int | None
) -> tuple[DeviceSummary, ...]:
    """Sums up the devices. measured_in: the round at whose start the result was measured; None: the last one, once there are two."""
    joined = {event.node: event for event in of_kind(events, NodeJoined) if event.role == "device"}
    records: dict[str, list[DeviceResult]] = {name: [] for name in joined}
    for device in (device for done in rounds for device in done.devices):
        records.setdefault(device.name, []).append(device)
    before = {device.name: device for done in rounds[:1] for device in done.devices}
    chosen = rounds[1:][-1:] if measured_in is None else [done for done in rounds if done.round == measured_in]
    after = {device.name: device for done in chosen for device in done.devices}
    return tuple(
        _device(name, joined.get(name), records[name], before.get(name), after.get(name))
        for name in sorted(records, key=by_name)
    )


def _device(
    name: str,
    joined: NodeJoined | None,
    records: Sequence[DeviceResult],
    before: DeviceResult | None,
    after: DeviceResult | None,
) -> DeviceSummary:
    tokens, seconds = total(record.tokens for record in records), total(record.train_seconds for record in records)
    counted = next((record for record in reversed(records) if record.held_out is not None), joined)
    return DeviceSummary(
        name=name,
        examples=next((r.examples for r in records if r.examples is not None), joined.examples if joined else None),
        held_out=counted.held_out if counted else None,
        bad=counted.bad if counted else 0,
        skipped=counted.skipped if counted else 0,
        cut=counted.cut if counted else 0,
        cut_answers=counted.cut_answers if counted else 0,
        unread_fields=counted.unread_fields if counted else 0,
        unmeasured=counted.unmeasured if counted else 0,
        perplexity_before=before.perplexity if before else None,
        metrics_before=before.metrics if before else {},
        perplexity_after=after.perplexity if after else None,
        metrics_after=after.metrics if after else {},
        tokens_per_s=round(tokens / seconds, 3) if tokens is not None and seconds else None,
        bytes_up=total(record.bytes_up for record in records),
        bytes_down=total(record.bytes_down for record in records),
        adapter_bytes_up=total(record.adapter_bytes_up for record in records),
        adapter_bytes_down=total(record.adapter_bytes_down for record in records),
        peak_rss_bytes=_peak(records),
    )


def _hosts(events: Iterable[Event], rounds: Sequence[RoundDone]) -> tuple[HostSummary, ...]:
    """Sums up the hosts that a plan names or a round reports."""
    layers: dict[str, tuple[int, ...] | None] = {}
    for plan in of_kind(events, PlanMade):
        layers |= _slices(plan)
    records: dict[str, list[HostResult]] = {}
    for host in (host for done in rounds for host in done.hosts):
        records.setdefault(host.name, []).append(host)
        layers[host.name] = host.layers
    return tuple(_host(name, layers[name], records.get(name, [])) for name in sorted(layers, key=by_name))


def _host(name: str, layers: tuple[int, ...] | None, records: Sequence[HostResult]) -> HostSummary:
    return HostSummary(
        name=name,
        layers=layers,
        peak_rss_bytes=_peak(records),
        bytes_up=total(record.bytes_up for record in records),
        bytes_down=total(record.bytes_down for record in records),
    )


def _slices(plan: PlanMade) -> dict[str, tuple[int, ...]]:
    """Returns the layers [first, last) per host that the routes of a plan need together; each may use fewer."""
    slices: dict[str, tuple[int, ...]] = {}
    for hop in (hop for route in plan.routes for hop in route.hops):
        first, last = slices.get(hop.node, (hop.first, hop.last))
        slices[hop.node] = (min(first, hop.first), max(last, hop.last))
    return slices


def _peak(records: Iterable[NodeResult]) -> int | None:
    return max((record.peak_rss_bytes for record in records if record.peak_rss_bytes is not None), default=None)
