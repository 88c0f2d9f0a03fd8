"""A round: its losses and its result. Written by the ServerApp into RUN/events.jsonl.

Layers are numbered from 0; a range of layers is [first, last), so `last` is the first layer after it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from edgelam_fl.telemetry.events.base import DataCounts, Event


def _loss(value: float | None) -> str:
    return "none that is finite" if value is None else f"{value:.4f}"


# ---------------------------------------------------------------- during


class TimelineInterval(NamedTuple):
    """A stretch of time in which a node did one thing; an array in the file."""

    kind: str
    """Either "forward", "backward", "step" (of the optimizer) or "send"."""
    role: str
    """Either "device" or "host": the part that the node played."""
    start_s: float | None
    """Seconds since training opened at that node; None if it was not finite."""
    seconds: float | None
    """Length; None if it was not finite."""
    step: int
    """Number of the training step in the round, from 0."""
    micro_batch: int
    """Number of the micro-batch in the step, from 0."""
    peer: str
    """The device that a host worked for, or the node that was sent to; else ""."""


@dataclass(frozen=True, kw_only=True)
class NodeShares:
    """What one node did in a round's training; the three add up to the time that all nodes still know."""

    computed_s: float
    """Seconds of computing."""
    sent_s: float
    """Seconds of sending while it did not compute."""
    waited_s: float
    """Seconds of neither."""

    @property
    def phase_s(self) -> float:
        """The time of all three."""
        return self.computed_s + self.sent_s + self.waited_s


@dataclass(frozen=True, kw_only=True)
class RoundShares(Event):
    """What each node's time in a round's training went to; written before `round_done`."""

    round: int
    """Number of the round."""
    nodes: Mapping[str, NodeShares]
    """Per node; its parts as device and host together."""


@dataclass(frozen=True, kw_only=True)
class RoundTimeline(Event):
    """The work of each node in a round's training, in RUN/timelines.jsonl, which keeps the newest rounds alone (older versions wrote
    it into events.jsonl). A node keeps its newest intervals only.
    """

    round: int
    """Number of the round."""
    nodes: Mapping[str, tuple[TimelineInterval, ...]]
    """The intervals per node."""


@dataclass(frozen=True, kw_only=True)
class NodeLost(Event):
    """A node of the plan delivered nothing that can be used."""

    round: int
    """Number of the round."""
    node: str
    """Name of the node."""
    reason: str
    """Reason, in words."""
    code: str = ""
    """Kind of the reason, as in edgelam_fl/errors.py: "data", "model", "mismatch" ...; "" if it is unknown."""


@dataclass(frozen=True, kw_only=True)
class NodeSilent(Event):
    """A node that plays its part gives no sign of life, and is waited for. Repeated every 10 s."""

    round: int
    """Number of the round."""
    node: str
    """Name of the node."""
    seconds: float
    """Seconds since its last sign of life."""
    limit_s: float
    """Seconds of silence after which it is lost."""


@dataclass(frozen=True, kw_only=True)
class MessageResent(Event):
    """A node's part is handed over again, because its message or its reply seems to be lost."""

    round: int
    """Number of the round."""
    attempt: int
    """Number of the attempt."""
    node: str
    """Name of the node."""
    seconds: float
    """Seconds since the message was sent, or since the node's part was over."""
    reason: str
    """Reason, in words."""


@dataclass(frozen=True, kw_only=True)
class AttemptAborted(Event):
    """A host is out, so the attempt ends at once for all nodes of its site."""

    round: int
    """Number of the round."""
    attempt: int
    """Number of the attempt."""
    site: str
    """Name of the site."""
    node: str
    """Name of the host."""
    reason: str
    """Reason, in words."""
    seconds: float
    """Seconds since the attempt began."""


@dataclass(frozen=True, kw_only=True)
class NodeSetAside(Event):
    """A node has failed in several attempts in a row, and sits out some rounds if others can do without it."""

    round: int
    """Number of the round."""
    node: str
    """Name of the node."""
    failures: int
    """Attempts in a row that it failed in."""
    back_in: int
    """Number of the round that it may take part in again."""
    reason: str
    """Reason of the newest failure, in words."""


@dataclass(frozen=True, kw_only=True)
class LateUpdate(Event):
    """It is settled what becomes of the update of a device that was late for its round."""

    round: int
    """Number of that round."""
    node: str
    """Name of the device."""
    used_in: int
    """Number of the round whose aggregate has the update; 0: none, it is dropped."""
    weight: float
    """Factor of its weight there; 0 if it is dropped."""
    reason: str
    """Why it is dropped, in words; empty if it is used."""


@dataclass(frozen=True, kw_only=True)
class SiteLost(Event):
    """A site lacks a host's reply, so nothing of this site is aggregated in this attempt."""

    round: int
    """Number of the round."""
    site: str
    """Name of the site."""
    missing: tuple[str, ...]
    """The hosts that did not deliver."""


@dataclass(frozen=True, kw_only=True)
class ContributionLeftOut(Event):
    """The contribution of a device or a site does not count in the aggregate: its update is far larger than the others'."""

    round: int
    """Number of the round."""
    source: str
    """Name of the device, or "site" and the name of the site."""
    reason: str
    """Reason, in words."""


@dataclass(frozen=True, kw_only=True)
class AggregateRefused(Event):
    """The contributions of an attempt made no adapter that can be used; the one before the round stays."""

    round: int
    """Number of the round."""
    attempt: int
    """Number of the attempt."""
    reason: str
    """Reason, in words."""


# ---------------------------------------------------------------- after


@dataclass(frozen=True, kw_only=True)
class NodeResult:
    """One node's part of a round, as a device or as a host. Bytes and seconds are None if the file does not say."""

    name: str
    """Name of the node."""
    peak_rss_bytes: int | None
    """Largest resident memory of its stage host's process."""
    moments: str
    """Either "warm" (its optimizer kept the moments of the round before) or "cold" (it began with empty ones)."""
    digest_before: str
    """SHA-256 of the adapter that the plan demands of the node."""
    digest_after: str
    """SHA-256 of the adapter that it reports after training."""
    bytes_up: int | None
    """Bytes sent on its links, all kinds of frames."""
    bytes_down: int | None
    """Bytes received on its links."""
    bytes_relayed: int
    """The part of both that went over links that it dialled through the hub."""
    adapter_bytes_up: int | None
    """Bytes of adapters that it sent to the server, through Flower."""
    adapter_bytes_down: int | None
    """Bytes of adapters that it received from there; of a device that is a host too, counted at the device."""
    compute_seconds: float
    """Seconds of computing, of all workers of a host together."""
    celsius: float | None = None
    """Heat of its processor when its part was over; None: nobody tells."""
    slowed: str = ""
    """Why its processor was slowed down then, in words; empty: it was not, or nobody tells."""


@dataclass(frozen=True, kw_only=True)
class StepLeftOut:
    """A step of a device that was not counted."""

    step: int
    """Number of the step in the round, from 0."""
    reason: str
    """Reason, in words."""


class MeasuredPoint(NamedTuple):
    """The held-out measure of a task at one place of an axis, as a sum rate at one SNR; an array in the file."""

    who: str
    """What was measured: "" is the model with its adapter, else the name of a method that it is compared with."""
    at: float
    """Place on the axis."""
    value: float | None
    """Mean of the measure there; None if it was not finite."""
    values: int
    """Number of values that it is the mean of."""


def mean_of(points: Iterable[MeasuredPoint]) -> float | None:
    """Returns the mean over all values that the points are means of; None without any, or if one is not finite."""
    found = list(points)
    sums = [point.value * point.values for point in found if point.value is not None]
    return math.fsum(sums) / sum(point.values for point in found) if sums and len(sums) == len(found) else None


@dataclass(frozen=True, kw_only=True)
class DeviceResult(NodeResult, DataCounts):
    """One device's training and measurements in a round."""

    examples: int | None
    """Examples that it trains on."""
    held_out: int | None = None
    """Examples that it measures with."""
    labels: int
    """Labels that it trained on."""
    loss: float | None
    """Mean loss per label over the round's counted steps, in nats or in the unit of a task of values; None without steps."""
    perplexity: float | None
    """Held-out perplexity of the adapter that the round started from; None if it was not measured or overflowed, or the task has
    none."""
    metrics: Mapping[str, float | None]
    """Other held-out measures of the same adapter: "accuracy" in [0, 1] of a classification, "sum rate" in bit/s per Hz or "NMSE" as a
    mean ratio of a radio task, or the means of task.metrics over its answers; empty if there are none."""
    tokens: int | None
    """Tokens that it trained on."""
    train_seconds: float | None
    """Seconds of training, waiting for others included."""
    eval_seconds: float | None
    """Seconds of the evaluation before it."""
    step_losses: tuple[float | None, ...]
    """Mean loss per label of each step, in nats or in the unit of a task of values; None for a step without labels."""
    left_out: tuple[StepLeftOut, ...]
    """The steps that were not counted."""
    held_out_labels: int | None = None
    """Labels that perplexity and metrics are means over; None if nothing was measured."""
    points: tuple[MeasuredPoint, ...] = ()
    """The measure of a radio task by SNR or by speed, of the same adapter and of the methods that it is compared with."""


@dataclass(frozen=True, kw_only=True)
class DeviceLeftOut:
    """A device that some steps of a host did not count."""

    device: str
    """Name of the device."""
    steps: int
    """Number of these steps."""
    reason: str
    """Reason in the last of them, in words."""
    out: bool
    """Whether the device was out of the round before its end."""


@dataclass(frozen=True, kw_only=True)
class HostResult(NodeResult):
    """One host's part of a round. A device that is a host too is among the devices as well."""

    layers: tuple[int, ...] | None
    """Its layers as [first, last)."""
    left_out: tuple[DeviceLeftOut, ...] = ()
    """The devices that some step of the host did not count."""


@dataclass(frozen=True, kw_only=True)
class VirtualDevice:
    """A device's part of a round in virtual time. Bytes are adapters and tensors, without the headers of frames."""

    seconds: float
    """download_s + compute_s + upload_s."""
    upload_s: float
    """Seconds of sending."""
    bytes: float
    """bytes_up + bytes_down."""
    joules: float
    """Energy of computing and sending."""
    share: float
    """Share of the band, in [0, 1]."""
    rate_bps: float
    """Rate of the upload with this share."""
    bytes_up: float
    """Bytes sent."""
    bytes_down: float
    """Bytes received."""
    snr: float
    """Signal-to-noise ratio over the whole band."""
    compute_s: float
    """Seconds of computing."""
    download_s: float
    """Seconds of receiving."""
    compute_joules: float
    """Energy of computing."""


@dataclass(frozen=True, kw_only=True)
class VirtualRound:
    """A round in the virtual time of the wireless model."""

    seconds: float
    """Seconds of the slowest device."""
    bytes: float
    """Bytes of all devices."""
    joules: float
    """Energy of all devices."""
    devices: Mapping[str, VirtualDevice]
    """The part of each device that delivered."""
    dropped: tuple[str, ...]
    """Devices that were chosen and then failed by wireless.dropout: they have a share, and no plan."""


@dataclass(frozen=True, kw_only=True)
class RoundDone(Event):
    """A round is closed and its checkpoint written; also the evaluation after the last round, with steps = 0."""

    round: int
    """Number of the round."""
    attempt: int
    """Number of the attempt that succeeded."""
    steps: int
    """Training steps planned for the round."""
    seconds: float
    """Wall-clock seconds since the plan."""
    devices: tuple[DeviceResult, ...]
    """The devices that delivered."""
    hosts: tuple[HostResult, ...]
    """The hosts that delivered."""
    bytes_by_kind: Mapping[str, int]
    """Bytes per kind of frame ("ACT", "GRAD", ...), counted at the devices in both directions."""
    checkpoint: str
    """Path of the adapter in RUN."""
    aggregation_error: float | None
    """||s B A + C - M|| / ||M|| over all trained modules: M = sum_k p_k s_k B_k A_k trained by the sources k in the
    round, B A the product of the new adapter's factors, C what the carry factors gained. None without steps, if M is
    zero, and if the replies of more than 32 nodes were summed up as they arrived."""
    aggregation: Mapping[str, float]
    """Figures of the rule's own. flora and fedex: carry_bytes, carry_rank (the largest of all modules) and carry_error
    (share of the carry factors' norm that was cut off in this round). over_the_air: air_error (the norm of the expected noise
    over that of the update that arrived)."""
    virtual: VirtualRound | None = None
    """The round in virtual time; None without [wireless] and without steps."""


@dataclass(frozen=True, kw_only=True)
class PrivacySpent(Event):
    """An attempt at a round of a run with differential privacy is over, and has been paid for, also if it came to nothing."""

    round: int
    """Number of the round."""
    attempt: int
    """Number of the attempt."""
    epsilon: float
    """What the run has spent so far."""
    delta: float
    """Probability that epsilon does not hold."""
    noise: float
    """Standard deviation of the noise, in clipping bounds."""
    clip: float
    """The clipping bound of this round, an L2 norm."""
    clipped: float | None
    """Share of the updates that the bound shortened. Exact, and so not covered by the promise: for the server's operator alone.
    None without a mean and without updates."""
    gradients_clipped: float | None = None
    """The same of the devices' gradients in the steps of hosts that train an adapter of several devices; None without any."""


@dataclass(frozen=True, kw_only=True)
class ChannelNoise(Event):
    """An attempt's updates arrived with the noise of the emulated radio channel (privacy.mode = "channel")."""

    round: int
    """Number of the round."""
    attempt: int
    """Number of the attempt."""
    devices: int
    """Devices whose updates arrived."""
    lowered: int
    """Those that sent with less power than they may, because their channel was too good for the promise."""
    most_over_needed: float
    """Noise of the update that arrived with most, over what the promise needs; 1 if all devices had to lower their power."""
    epsilon: float
    """What the device with the best channels so far has given away over the whole run."""


@dataclass(frozen=True, kw_only=True)
class StoppedEarly(Event):
    """The run ends before its last round, because its held-out loss has not become lower for so long (early_stopping_patience)."""

    round: int
    """The last round that was closed. Its own adapter is measured after this."""
    planned: int
    """Rounds of the run file."""
    evaluations: int
    """Evaluations in a row that were not better by more than federation.early_stopping_threshold."""
    best_round: int
    """The round whose adapter had the lowest loss so far; 0: what the run started from."""
    best_loss: float | None
    """That loss per held-out label, in nats or in the unit of a task of values; None if no evaluation gave a finite one."""

    def words(self) -> str:
        """Returns when and why the run ends, as the end of a sentence."""
        times = "1 evaluation" if self.evaluations == 1 else f"{self.evaluations} evaluations in a row"
        made = f"after round {self.best_round}" if self.best_round else "at the start"
        return f"after round {self.round} of {self.planned}, as {times} gave no lower held-out loss than {_loss(self.best_loss)}, {made}"


@dataclass(frozen=True, kw_only=True)
class BestTaken(Event):
    """The run's result is the adapter with the lowest held-out loss (federation.load_best). Written after the last evaluation."""

    round: int
    """The round that made it; 0: what the run started from."""
    loss: float | None
    """Its loss per held-out label, in nats or in the unit of a task of values; None if no evaluation gave a finite one."""
    last_round: int
    """The last round of the run."""

    def words(self) -> str:
        """Returns the event as a part of a sentence: which adapter it is."""
        made = f"after round {self.round} of {self.last_round}" if self.round else "that the run started from"
        return f"the one {made}, as it had the lowest held-out loss: {_loss(self.loss)}"


@dataclass(frozen=True, kw_only=True)
class BudgetSpent(Event):
    """The run ends early: another round would spend more than privacy.epsilon. Its result is evaluated and kept."""

    round: int
    """The last round that was closed."""
    planned: int
    """Rounds of the run file."""
    epsilon: float
    """What the run has spent."""
    budget: float
    """What the run may spend: privacy.epsilon."""
