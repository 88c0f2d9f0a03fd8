"""The planner's numbers: facts about the nodes of a site and about a step (in), the cost of a chain of hosts (out).

Knows no model, no run file and no protobuf. `instance` makes these facts from profiles; docs/planner.md explains them.

A unit is one micro-batch of one device. Its cycle is its way forward through the device's front layers and all hosts, and
back again. A base is the pair "base/compute" that a node holds its layers in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

Chain = tuple[tuple[str, int], ...]  # (host, the layer at which its slice ends), in the routes' order


# ---------------------------------------------------------------- in


@dataclass(frozen=True)
class NodeResources:
    """Speed, memory and links of one node. An unknown rate or memory is infinite."""

    name: str
    layer_s: Mapping[str, float] = field(default_factory=dict)  # per layer and unit, forward and backward, by base
    workers: int = 1  # units that it computes at once, each of which then takes so many times `layer_s`
    free_bytes: float = math.inf
    up_bps: float = math.inf
    down_bps: float = math.inf
    round_trip_s: float = 0.0  # to the server
    reachable: bool = True  # whether others can dial it; if not, links to it pass the relay
    ends_s: float = 0.0  # per unit, for its own layers, head and loss; 0 if the node is not a device
    back_s: float = 0.0  # the part of `ends_s` that comes after the hosts
    ends_bytes: int = 0  # memory for its own layers and their units; 0 if the node is not a device
    idle_bytes: int = 0  # memory of its process before it holds a layer; `free_bytes` is what remained then


@dataclass(frozen=True)
class DeviceEnds:
    """A device of the site and the layers that it keeps: [0, front), and from `back_first` on."""

    node: NodeResources
    front: int
    back_first: int


@dataclass(frozen=True)
class Footprint:
    """Memory of a host's slice in one base."""

    layer_bytes: tuple[int, ...]  # weights and adapters of each layer of the model
    unit_bytes: int = 0  # kept for the units in flight of one device, however many layers the slice has
    unit_layer_bytes: int = 0  # kept for the same units, per layer
    head_bytes: int = 0  # of the head and its units, at the last host; 0 if devices hold the head


@dataclass(frozen=True)
class StepFacts:
    """Facts about a step that are the same for every node."""

    footprints: Mapping[str, Footprint]  # by base
    tensor_bytes: int  # size of a unit's hidden states on a link
    micro_batches: int = 1  # of each device
    window: int = 1  # micro-batches of one device that may be in flight at once
    front_learns: bool = True  # whether gradients return to the devices' front layers
    # With a cut adapter: the size of its values in tensors. They return to the device beside the hidden states, their gradient
    # comes back alone, and no other gradient travels. 0: there is none.
    cut_share: float = 0.0
    gradient_share: float = (
        1.0  # size of a gradient on a link by that of the hidden states, or cut adapter's values, that it is of
    )
    back_on_device: bool = True  # whether hidden states return to the device, which then sends the first gradient
    head_layers: float = 0.0  # computing time of the last host's head, in layers
    growth_bytes: int = 0  # memory that a node's process adds with its first slice, on top of weights and units
    by_relay: frozenset[tuple[str, str]] = frozenset()  # (dialling node, dialled node): pairs without a direct link
    relay_bps: float = math.inf
    relay_round_trip_s: float = 0.0  # added to the round trip of a link that passes the relay


@dataclass(frozen=True)
class SiteInstance:
    """One planning problem: which of `hosts` do the routes of `devices` cross, and with which layers?"""

    step: StepFacts
    devices: tuple[DeviceEnds, ...]
    hosts: tuple[NodeResources, ...]

    @cached_property
    def first(self) -> int:
        """The first layer that a host must hold."""
        return min(device.front for device in self.devices)

    @cached_property
    def last(self) -> int:
        """The end of the layers that hosts must hold."""
        return max(device.back_first for device in self.devices)


# ---------------------------------------------------------------- out


@dataclass(frozen=True)
class NodeLoad:
    """Work and memory of one node in a step. A host holds layers [first, last), a device all layers except these."""

    node: str
    first: int
    last: int
    base: str  # empty for a device
    memory_bytes: int  # peak of its whole process
    compute_s: float
    up_bytes: int
    down_bytes: int


@dataclass(frozen=True)
class ChainCost:
    """A chain of hosts with the length of a step over it, and how that comes about."""

    hosts: tuple[NodeLoad, ...]  # in the routes' order
    devices: tuple[NodeLoad, ...]
    step_s: float
    cycle_s: float
    limit: str  # what a step waits for: a node's computing, a link, the relay or the window
    memory_limit: str = ""  # the host that would hold more layers with more memory, and the step that this would give
    left_out: tuple[str, ...] = ()  # hosts that a step is shorter without

    @property
    def chain(self) -> Chain:
        return tuple((host.node, host.last) for host in self.hosts)
