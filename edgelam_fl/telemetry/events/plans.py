"""The plan of a round, and what was chosen for it. Written by the ServerApp into RUN/events.jsonl.

Layers are numbered from 0; a range of layers is [first, last), so `last` is the first layer after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgelam_fl.telemetry.events.base import Event


@dataclass(frozen=True, kw_only=True)
class LayersHeld:
    """Layers [first, last) at one node."""

    node: str
    """Name of the host."""
    first: int
    """Its first layer."""
    last: int
    """The first layer after its own."""


@dataclass(frozen=True, kw_only=True)
class RoutePicture:
    """The way of one device's activations: its first layers, hosts, its last layers."""

    device: str
    """Name of the device."""
    front: int
    """Number of layers that the device keeps before the hosts."""
    back_first: int
    """First of the layers that it keeps after the hosts."""
    num_layers: int
    """Number of layers of the model."""
    hops: tuple[LayersHeld, ...]
    """The hosts on the way, with the layers that this route uses there; empty if the device trains the whole model."""


@dataclass(frozen=True, kw_only=True)
class SitePicture:
    """A chain of hosts and the devices that train over it."""

    site: str
    """Name of the site."""
    hosts: tuple[LayersHeld, ...]
    """The hosts with all layers that they hold; a route may use a part of them."""
    devices: tuple[str, ...]
    """Names of its devices."""


@dataclass(frozen=True, kw_only=True)
class NodePicture:
    """Formats and rank of one node's part of the model."""

    base: str
    """Format of the frozen weights: "fp32", "bf16", "int8" or "nf4"."""
    compute: str
    """Format that it computes in: "fp32" or "bf16"."""
    rank: int
    """Rank of its adapter."""


@dataclass(frozen=True, kw_only=True)
class DemandSeen:
    """One device before the round, as the bandwidth strategy saw it."""

    payload_bytes: float
    """Bytes that the device was expected to send."""
    compute_s: float
    """Virtual seconds that it was expected to receive and compute."""
    snr: float | None
    """Signal-to-noise ratio over the whole band."""


@dataclass(frozen=True, kw_only=True)
class PlanMade(Event):
    """An attempt at a round begins. The evaluation after the last round is round = rounds + 1."""

    round: int
    """Number of the round, from 1."""
    attempt: int
    """Number of the attempt at it, from 1."""
    selected: tuple[str, ...]
    """Names of the devices that the selection chose."""
    why: Mapping[str, str]
    """Reason per device that is here, chosen or not."""
    shares: Mapping[str, float]
    """Share of the capacity per chosen device, in [0, 1]."""
    routes: tuple[RoutePicture, ...]
    """A route per device that trains."""
    sites: tuple[SitePicture, ...]
    """The sites that have hosts."""
    nodes: Mapping[str, NodePicture]
    """Formats and rank per node of the plan."""
    personal: bool
    """Whether the aggregation lets devices continue with tensors of their own."""
    demands: Mapping[str, DemandSeen] | None = None
    """Input of the bandwidth strategy per chosen device; None without [wireless]."""
    unfit: Mapping[str, str] | None = None
    """Reason per device that is here and can be in no round; None if all can."""
    first_step: int = 0
    """Steps of the round that an earlier attempt has done, and that are not done again; of several sites the most."""


@dataclass(frozen=True, kw_only=True)
class TextReadable(Event):
    """What hosts can read of the devices' text under the run's plans; written when it changes, and never without hosts.

    It was measured before, on the published model without defences at the cut.
    """

    round: int
    """Number of the round, from 1."""
    front: int
    """Layers in front on the device that keeps the fewest."""
    back: int
    """Layers at its back."""
    text: float | None
    """Share of the text's tokens, in [0, 1]; None: the model was not measured."""
    labels: float | None
    """Share of the labels; None: not measured."""
    words: str
    """The same as a sentence, without a full stop."""


@dataclass(frozen=True, kw_only=True)
class NodePlaced:
    """One node's part of a chain, with what a training step is predicted to cost there."""

    node: str
    """Name of the node."""
    first: int
    """A host holds layers [first, last), a device all others."""
    last: int
    """See `first`."""
    base: str
    """The host's "base/compute"; "" for a device."""
    memory_bytes: int
    """Memory of its process at the peak."""
    compute_s: float
    """Seconds of computing per step."""
    up_bytes: int
    """Bytes sent per step."""
    down_bytes: int
    """Bytes received per step."""


@dataclass(frozen=True, kw_only=True)
class SitePlaced:
    """One site's chain, with what it is predicted to cost."""

    hosts: tuple[NodePlaced, ...]
    """The hosts, in the order of their layers."""
    devices: tuple[NodePlaced, ...]
    """The devices of the site."""
    step_s: float
    """Predicted seconds of a training step."""
    limit: str
    """The bottleneck of a step, in words."""
    memory_limit: str
    """The node whose memory keeps a step from being faster, in words; "" if no host would hold more."""
    left_out: tuple[str, ...]
    """Hosts without which a step is no longer."""


@dataclass(frozen=True, kw_only=True)
class PiecesChosen(Event):
    """The planner decided what the run file leaves open of split.micro_batches, split.window and split.checkpointing; for the whole run."""

    micro_batches: int
    """Pieces of a device's batch."""
    window: int
    """Micro-batches of one device under way at a time."""
    checkpointing: bool
    """Whether activations are computed anew in the backward pass."""
    step_s: float
    """Predicted seconds of a training step."""
    steps_s: Mapping[str, float]
    """The shortest predicted step per number of micro-batches that was tried and fits."""

    def words(self) -> str:
        """Returns what was chosen and why, without a full stop."""
        others = ", ".join(f"{number}: {step_s:.3g} s" for number, step_s in self.steps_s.items())
        anew = " with activations computed anew, as nothing fits otherwise" if self.checkpointing else ""
        return (
            f"split.micro_batches = {self.micro_batches}, split.window = {self.window}{anew}: a step by the number of micro-batches "
            f"should take {others}"
        )


@dataclass(frozen=True, kw_only=True)
class PlacementMade(Event):
    """The planner chose the layers of each node, before the round's plan; only with split.cuts = "auto"."""

    round: int
    """Number of the round; 0: no training follows (`edgelam plan`)."""
    changed: bool
    """Whether layers moved."""
    reason: str
    """Why this placement, in words."""
    step_s: float
    """Predicted seconds of a training step at the slowest site."""
    window: int
    """Micro-batches per device in flight, as memory allows."""
    tokens: float
    """Tokens per row that times were predicted with."""
    sites: tuple[SitePlaced, ...]
    """The chains."""
    measured: tuple[str, ...]
    """Observations of the round before, in words: nodes or steps far from the prediction, pairs that only the relay joins."""
