"""Memory of a site's nodes: what a slice needs in a base, whether a host has it, and how much is missing.

Knows neither times nor the order of hosts. Sizes come from `Footprint`; `footprint` computes them from the model.
"""

from __future__ import annotations

import math

from edgelam_fl.errors import DoesNotFit
from edgelam_fl.plan.facts import NodeResources, SiteInstance

UNITS_SHARE = (
    0.8  # units in flight may fill this share of a host's free memory; the rest is for buffers and other programs
)
_MB = 1e6


def slice_bytes(instance: SiteInstance, base: str, first: int, last: int) -> tuple[int, int]:
    """Returns the bytes of a host's slice [first, last): (weights and adapters, full windows of all devices)."""
    footprint = instance.step.footprints[base]
    weights = sum(footprint.layer_bytes[first:last]) + (footprint.head_bytes if last == instance.last else 0)
    per_device = footprint.unit_bytes + (last - first) * footprint.unit_layer_bytes
    return weights, len(instance.devices) * per_device


def missing_bytes(instance: SiteInstance, host: NodeResources, base: str, first: int, last: int) -> float:
    """Returns the bytes that a host lacks for a slice; 0 or less if the slice fits."""
    weights, units = slice_bytes(instance, base, first, last)
    return weights + units / UNITS_SHARE + instance.step.growth_bytes + host.ends_bytes - host.free_bytes


def fitting_base(instance: SiteInstance, host: NodeResources, first: int, last: int) -> str | None:
    """Returns the first of the host's bases in which the slice fits; None if it fits in none."""
    return next((base for base in host.layer_s if missing_bytes(instance, host, base, first, last) <= 0), None)


# ---------------------------------------------------------------- why something does not fit


def device_shortage(instance: SiteInstance) -> DoesNotFit | None:
    """Names the first device, by name, that cannot hold its own layers; None if all can."""
    for device in sorted(instance.devices, key=lambda device: device.node.name):
        node = device.node
        short = node.ends_bytes + instance.step.growth_bytes - node.free_bytes
        if short > 0:
            return DoesNotFit(
                f"device {node.name} keeps layers 0 to {device.front} and those from {device.back_first} on: "
                f"{short / _MB:.0f} MB more than its {node.free_bytes / _MB:.0f} MB of free memory",
                short,
            )
    return None


def host_shortage(instance: SiteInstance, count: int | None) -> DoesNotFit:
    """Says how many layers the hosts can hold in which memory, and how much is missing; for `count` hosts if it is given."""
    first, last = instance.first, instance.last
    room = {host.name: _most_layers(instance, host) for host in instance.hosts}
    most = sum(sorted(room.values(), reverse=True)[: count or None])
    free = {host.name: f"in {host.free_bytes / _MB:.0f} MB" for host in instance.hosts if host.free_bytes != math.inf}
    listed = ", ".join(f"{name} {layers} {free.get(name, '')}".rstrip() for name, layers in sorted(room.items()))
    short = min(_short_bytes(instance, host, last - first - most + room[host.name]) for host in instance.hosts)
    return DoesNotFit(
        f"the hosts have to hold {last - first} layers ({first} to {last}) and have memory for {most} ({listed}): "
        f"{short / _MB:.0f} MB more are needed. Counted is the memory that was free when each host joined, beside its other programs",
        short,
    )


def _most_layers(instance: SiteInstance, host: NodeResources) -> int:
    """Counts the layers that a host can hold from the first on."""
    ends = range(instance.first + 1, instance.last + 1)
    fitting = (end for end in ends if fitting_base(instance, host, instance.first, end) is not None)
    return max(fitting, default=instance.first) - instance.first


def _short_bytes(instance: SiteInstance, host: NodeResources, layers: int) -> float:
    """Returns the bytes that a host lacks for `layers`, or for one layer more than it can hold, whichever is more."""
    last = min(instance.last, instance.first + max(layers, _most_layers(instance, host) + 1))
    return max(0.0, min(missing_bytes(instance, host, base, instance.first, last) for base in host.layer_s))
