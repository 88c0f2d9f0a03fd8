"""A run from start to end, and the nodes that come and go. Written by the ServerApp into RUN/events.jsonl."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgelam_fl.telemetry.events.base import DataCounts, Event


@dataclass(frozen=True, kw_only=True)
class RunStarted(Event):
    """The ServerApp has accepted the run file and waits for nodes."""

    run: str | None
    """Name of the run: that of its folder."""
    config: Mapping[str, Any]
    """The run file with every key resolved, by section."""
    versions: Mapping[str, str]
    """Version per package on the server."""
    name_at_nodes: str = ""
    """The name by which nodes know the run; no other run has it."""


@dataclass(frozen=True, kw_only=True)
class RunWaits(Event):
    """The run waits for another run of the same server, which uses the nodes; repeated as a sign of life."""

    run: str
    """Name of the run that it waits for: the oldest before it."""
    nodes: tuple[str, ...]
    """The nodes that the other run uses; empty if it has not planned a round yet."""
    runs_ahead: int
    """Runs before it."""
    seconds: float
    """Seconds that it has waited."""

    def words(self) -> str:
        """Returns the event as a sentence, without a full stop."""
        uses = f", which uses {', '.join(self.nodes)}" if self.nodes else ""
        others = self.runs_ahead - 1
        more = f", and for {others} more that came earlier" if others else ""
        return f"waits for run {self.run}{uses}{more}"


@dataclass(frozen=True, kw_only=True)
class LayerSeconds:
    """Time of one layer, as a node measured it."""

    tokens: int
    """Tokens in the micro-batch that was measured."""
    seconds: Mapping[str, float]
    """Seconds of one layer, forward and backward, per "base/compute"."""


@dataclass(frozen=True, kw_only=True)
class NodeJoined(Event, DataCounts):
    """A node answered with its profile and can take part. The counts of its data are 0 for an edge server."""

    node: str
    """Name of the node."""
    role: str
    """Either "device" or "edge"."""
    address: str
    """HOST:PORT at which others reach it; "" for a device that only dials."""
    examples: int
    """Examples that it trains on."""
    held_out: int
    """Examples that it measures with."""
    memory_available_bytes: int
    """Free memory."""
    cpu_threads: int
    """Threads that it computes with."""
    tags: tuple[str, ...]
    """Words that its owner gave it."""
    base_seconds: Mapping[str, float]
    """Seconds of one layer, forward and backward, per "base/compute"; empty unless model.base = "auto"."""
    link_up_bps: float = 0
    """Rate of its link towards the server's hub; 0 if it was not measured, as without split.cuts = "auto"."""
    link_down_bps: float = 0
    """Rate of its link from the hub; 0 if it was not measured."""
    round_trip_s: float = 0
    """Round trip to the hub; 0 if it was not measured."""
    layer_times: tuple[LayerSeconds, ...] = ()
    """Time of a layer for micro-batches of several sizes; only with split.cuts = "auto"."""
    idle_bytes: int = 0
    """Resident memory of its stage host before that held anything; 0 if it was not measured."""
    chip: str = ""
    """What it computes on, and whose memory is free: "cuda:0 NVIDIA H200"; "" for its CPU."""


@dataclass(frozen=True, kw_only=True)
class NodeRefused(Event):
    """A node is here and cannot take part."""

    node: str
    """Name of the node; "a second NAME" for one that gave the name of another, "a node that has not said its name (number N)" for one
    that gave none."""
    reason: str
    """Reason, in words."""
    code: str = ""
    """Kind of the reason, as in edgelam_fl/errors.py: "data", "model", "mismatch" ...; "" if it is unknown."""


@dataclass(frozen=True, kw_only=True)
class PrivacyPromised(Event):
    """The devices are known, and the run says which differential privacy it keeps."""

    mode: str
    """privacy.mode of the run file."""
    epsilon: float
    """The budget of the whole run."""
    delta: float
    """Probability that epsilon does not hold."""
    noise: float
    """Standard deviation of the noise of each release, in clipping bounds."""
    clip: float
    """The clipping bound of the first round, an L2 norm."""
    rounds: int
    """Rounds that the budget is enough for, at most those of the run file."""
    releases_per_round: int
    """Noisy sums that a round releases about the same devices."""
    sampling: float
    """Probability with which each device takes part in a round; 1: no amplification is claimed."""
    denominator: float
    """What each sum is divided by, whoever took part."""
    accountant: str
    """How epsilon is computed: "pld" or "rdp"."""
    unit: str
    """What is protected."""
    adversary: str
    """Against whom the promise holds."""
    messages: str
    """Messages that the promise covers."""
    not_covered: str
    """What it does not cover."""


@dataclass(frozen=True, kw_only=True)
class LinkMeasured(Event):
    """A node measured its link to the hub again, because a round's steps did not take as long as predicted."""

    node: str
    """Name of the node."""
    link_up_bps: float
    """Rate towards the hub."""
    link_down_bps: float
    """Rate from the hub."""
    round_trip_s: float
    """Round trip to the hub."""


@dataclass(frozen=True, kw_only=True)
class RouteReady(Event):
    """A conversation over the hosts can begin: the caller's plan is in RUN/route."""


@dataclass(frozen=True, kw_only=True)
class DiskFull(Event):
    """The run waits for room on the disk of its folder: said every ten seconds, and the next event tells that it goes on."""

    free_bytes: int
    """Room that there is."""
    needed_bytes: int
    """Room that is needed: for two checkpoints and a report before a round, else for what could not be written."""
    waited_s: float
    """Seconds of waiting so far."""


@dataclass(frozen=True, kw_only=True)
class EventsDropped(Event):
    """Events before this one are missing, since the file could not be written; also in a node's events.jsonl."""

    count: int
    """Number of these events."""
    reason: str
    """What the system said of the last of them, as "No space left on device"."""


@dataclass(frozen=True, kw_only=True)
class TrackerFailed(Event):
    """A tracker of run.report_to gets nothing more of the run; the run itself goes on."""

    tracker: str
    """Name of the tracker, as in run.report_to."""
    reason: str
    """What it said."""


@dataclass(frozen=True, kw_only=True)
class RunDone(Event):
    """The run reached its end. Its report may still be on its way to the disk."""

    summary: str
    """Path of summary.json in RUN; "" for a run that only planned or served a conversation."""
    seconds: float | None = None
    """Wall-clock seconds of the run; None: the time between its first and its last event."""


@dataclass(frozen=True, kw_only=True)
class RunFailure(Event):
    """The run ended early."""

    reason: str
    """Reason, in words."""
    kept: str
    """Files that are left in RUN, in words."""
    node: str = ""
    """The node at which it failed; "" if it was none, or if that is not known."""
    round: int = 0
    """The round in which it failed; 0: the round that was planned last."""
    exit_code: int = 4
    """The exit code of a command that followed the run: 2 if what was handed to it or to its nodes is wrong."""


@dataclass(frozen=True, kw_only=True)
class RunInterrupted(Event):
    """The run's ServerApp ended without its last word, and the server starts it again. Written by the server's SuperLink."""

    reason: str
    """What is known of its end, in words."""
    restart: int
    """How often it was started again since the last round that was finished, this time included."""


@dataclass(frozen=True, kw_only=True)
class RunResumed(Event):
    """A ServerApp goes on with a run that had ended early, or whose ServerApp had died."""

    round: int
    """The last round of the checkpoint that it goes on from; 0: it begins again."""
    problem: str = ""
    """Why an older checkpoint than the newest is used; "" if it is the newest."""


RUN_ENDS = (RunDone, RunFailure)
