"""The work of one node. Written by its stage host into events.jsonl of the node's own state folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edgelam_fl.telemetry.events.base import DataCounts, Event
from edgelam_fl.telemetry.human import human_count


@dataclass(frozen=True, kw_only=True)
class NodeReady(Event):
    """The stage host listens and takes jobs."""

    name: str
    """Name of the node."""
    address: str
    """HOST:PORT at which others reach it; "" for a device that only dials."""
    chip: str = ""
    """What it computes on, or why not on what is here; "" for a CPU and nothing beside it."""


@dataclass(frozen=True, kw_only=True)
class SliceComing(Event):
    """Tensors are on their way from the server's hub; repeated every few seconds."""

    model: str
    """Name of the model."""
    bytes: int
    """Bytes that have come."""
    of: int
    """Bytes of all tensors that were missing."""


@dataclass(frozen=True, kw_only=True)
class SliceReceived(Event):
    """All tensors that a job needs are here."""

    model: str
    """Name of the model."""
    base: str
    """Format of the frozen weights."""
    tensors: int
    """Number of tensors of the slice."""
    bytes: int
    """Bytes that came now."""
    slice_bytes: int
    """Bytes of the whole slice."""
    seconds: float
    """Seconds that the transfer took."""


@dataclass(frozen=True, kw_only=True)
class JobEvent(Event):
    """An event of one job: a node's part of one attempt at a round."""

    job: str = ""
    """Name of the job. The stage host adds it to the events of the parts that it runs."""


EmitInJob = Callable[[JobEvent], None]  # takes an event of one job, which it need not name


@dataclass(frozen=True, kw_only=True)
class JobStarted(JobEvent):
    """The layers are loaded and the job begins."""

    role: str
    """Either "device" or "edge": the node's role in the plan."""
    layers: tuple[tuple[int, ...], ...]
    """The layers that it holds, as [first, last) each."""
    seconds: float
    """Seconds of loading."""


@dataclass(frozen=True, kw_only=True)
class TensorsAsked(JobEvent):
    """What the node holds of its adapter is not what the server took it to hold; it asks for the tensors that differ."""

    held: int
    """Tensors that it holds, whose digests it has told."""


@dataclass(frozen=True, kw_only=True)
class TextReadableHere(JobEvent):
    """What hosts can read of this device's text under its plan; written before its part begins, if it differs from the part before."""

    text: float | None
    """Share of the text's tokens, in [0, 1], as measured before; None: the model was not measured."""
    labels: float | None
    """Share of the labels; None: not measured."""
    words: str
    """The same as a sentence, without a full stop."""


@dataclass(frozen=True, kw_only=True)
class DataRead(JobEvent, DataCounts):
    """A device has read its data and made examples of them. Names and places are in this event alone, which stays on the device."""

    examples: int
    """Examples that it trains on."""
    held_out: int
    """Examples that it measures with."""
    max_tokens: int
    """task.max_tokens of the run."""
    bad_places: tuple[str, ...] = ()
    """Places in the file of the first examples that cannot be read."""
    unread_names: tuple[str, ...] = ()
    """Names of the fields that nothing is learned from."""
    also_learned: int = 0
    """Examples of the evaluation file that the data has too, so that they are learned as well as measured."""
    remarks: tuple[str, ...] = ()
    """What else the owner of the data should know of the examples, as sentences without a full stop."""

    def words(self) -> tuple[str, ...]:
        """Returns what the owner of the data should hear of, as sentences without a full stop; none if all is used and whole."""
        return (*self.in_words(self.examples, self.held_out, self.max_tokens), *self.places_and_names())

    def places_and_names(self) -> tuple[str, ...]:
        """Returns the part of the words that stays on the device."""
        said = []
        if self.bad_places:
            more = ", ..." if self.bad > len(self.bad_places) else ""
            said.append(f"examples that cannot be read: {', '.join(self.bad_places)}{more}")
        if self.unread_names:
            said.append(f"fields that nothing is learned from: {', '.join(self.unread_names)}")
        if self.also_learned:
            said.append(
                f"WARNING: examples of the evaluation file that are in the data too: {self.also_learned}. They are learned, so what is "
                f"measured with them says little about new texts"
            )
        return (*said, *self.remarks)


@dataclass(frozen=True, kw_only=True)
class DataChanged(JobEvent):
    """A device's data are not those of its part before, and were read again; the order of its batches starts from the new ones."""

    examples: int
    """Examples that it trains on now."""
    held_out: int
    """Examples that it measures with now."""

    def words(self) -> str:
        """Returns the same as a sentence, without a full stop."""
        return f"the data have changed and were read again: {human_count(self.examples, 'example')}, {self.held_out} held out"


@dataclass(frozen=True, kw_only=True)
class WindowGranted(JobEvent):
    """A host has memory for fewer micro-batches per device in flight than the plan asks for."""

    granted: int
    """Micro-batches that it takes."""
    asked: int
    """Micro-batches that the plan asks for."""
    memory_free_bytes: int
    """Free memory."""


@dataclass(frozen=True, kw_only=True)
class JobResumed(JobEvent):
    """The part goes on from this node's snapshot of an earlier attempt of the round."""

    steps: int
    """Steps of the round that are done in it."""
    attempt: int
    """Attempt that the snapshot is of."""


@dataclass(frozen=True, kw_only=True)
class SnapshotLost(JobEvent):
    """A snapshot could not be written; the part goes on without it."""

    file: str
    """Name of the file."""
    reason: str
    """Reason, in words."""


@dataclass(frozen=True, kw_only=True)
class SnapshotIgnored(Event):
    """A snapshot on the disk is damaged; it was removed, as if it had never been written."""

    file: str
    """Name of the file."""
    reason: str
    """Reason, in words."""


@dataclass(frozen=True, kw_only=True)
class Evaluated(JobEvent):
    """A device has measured the adapter that it received."""

    loss_sum: float
    """Sum of the losses of all held-out labels, in nats or in the unit of a task of values."""
    labels: int
    """Held-out labels."""
    seconds: float
    """Seconds that it took."""


@dataclass(frozen=True, kw_only=True)
class StepDone(JobEvent):
    """A device has finished a training step."""

    step: int
    """Number of the step in the round, from 0."""
    loss: float
    """Mean loss per label, in nats or in the unit of a task of values."""
    labels: int
    """Labels of the step."""
    seconds: float
    """Seconds that it took."""


@dataclass(frozen=True, kw_only=True)
class NodeLeftOut:
    """A device whose part of a step was not counted."""

    node: str
    """Name of the device."""
    reason: str
    """Reason, in words."""


@dataclass(frozen=True, kw_only=True)
class StepClosed(JobEvent):
    """A host closed a step without some device; written when the set of missing devices grows."""

    step: int
    """Number of the step in the round, from 0."""
    counted: tuple[str, ...]
    """Devices whose part was counted."""
    left_out: tuple[NodeLeftOut, ...]
    """Devices whose part was not."""


@dataclass(frozen=True, kw_only=True)
class LinkLost(JobEvent):
    """A link of a host broke before its device had finished."""

    link: str
    """Name of the device whose route the link belongs to."""
    reason: str
    """Reason, in words."""


@dataclass(frozen=True, kw_only=True)
class LinkSuspended(JobEvent):
    """A link has lost its stream; it keeps its place, and goes on if it gets another in time."""

    link: str
    """Name of the link at this end."""
    reason: str
    """Reason, in words."""


@dataclass(frozen=True, kw_only=True)
class LinkResumed(JobEvent):
    """A link goes on over another stream; nothing of what it carries is lost or comes twice."""

    link: str
    """Name of the link at this end."""
    seconds: float
    """Time without a stream, in seconds; 0.0: the other end came again before the loss was noticed here."""
    resent_bytes: int
    """Messages that this end sends once more, in bytes."""


@dataclass(frozen=True, kw_only=True)
class JobDone(JobEvent):
    """The job is over."""

    state: str
    """Either "done" or "failed"."""
    error: str
    """Reason, in words, if it failed; else ""."""
