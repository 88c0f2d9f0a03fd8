"""Who holds which layers in a round: the sites, their chains of hosts, and a route a device. Pure functions.

A site is a chain of hosts and the devices whose routes cross it. Devices may keep unlike numbers of layers at their ends,
so a route may enter the first host and leave the last one at any layer inside; a host holds what any of its routes needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import pairwise

from edgelam_fl.config import RunConfig
from edgelam_fl.errors import ConfigError, RunFailed
from edgelam_fl.plan.modes import label_place
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.wire import edgelam_pb2 as pb


@dataclass(frozen=True)
class HostRange:
    """A host and the layers [first, last) that it holds for its site."""

    name: str
    address: str
    first: int
    last: int


@dataclass(frozen=True)
class Site:
    hosts: tuple[HostRange, ...]  # in the routes' order; none: each member runs the whole model
    members: tuple[str, ...]

    @property
    def name(self) -> str:
        return "+".join(host.name for host in self.hosts)


@dataclass(frozen=True)
class Layout:
    sites: tuple[Site, ...]
    routes: Mapping[str, pb.Route]  # by device, by name; without token and share
    bases: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # (base, compute) of nodes, where settled

    def site_of(self, device: str) -> Site:
        return next(site for site in self.sites if device in site.members)


def site_source(site: str) -> str:
    """A site's name as strategies see it: never that of a device, which may be the site's only host."""
    return f"site {site}"


def by_name(patterns: Mapping[str, int], name: str, default: int) -> int:
    """The value for a node: of its exact name, else of the longest pattern that matches it, else the default."""
    if name in patterns:
        return patterns[name]
    matching = sorted((pattern for pattern in patterns if fnmatchcase(name, pattern)), key=lambda p: (-len(p), p))
    return patterns[matching[0]] if matching else default


def who_may_host(config: RunConfig, profiles: Iterable[pb.Profile]) -> list[pb.Profile]:
    """The nodes that others can dial: edge servers by name; with split.host_on = "any" the devices after them."""
    allowed = [p for p in profiles if p.address and (p.role == pb.EDGE or config.split.host_on == "any")]
    return sorted(allowed, key=lambda profile: (profile.role == pb.DEVICE, profile.name))


def make_layout(spec: RunSpec, devices: Sequence[pb.Profile], hosts: Sequence[pb.Profile]) -> Layout:
    """Deals the devices, by name, to the sites in turn, and to each site the next `split.hosts` of `hosts`.

    Where hosts or devices are missing for all `split.sites`, fewer sites are made. Raises RunFailed where there are not
    enough hosts for one, ConfigError where a route would not cross each host of its site.
    """
    config = spec.config
    names = sorted(device.name for device in devices)
    length = config.split.least_hosts
    if len(hosts) < length:
        raise RunFailed(
            f"a site needs {length} hosts (split.hosts), and {len(hosts)} nodes can be one: "
            f"{', '.join(host.name for host in hosts) or 'none'} (split.host_on = {config.split.host_on!r})"
        )
    count = min(config.split.sites, len(names), len(hosts) // length if length else 1)
    chains = []
    for number in range(count):
        ends = [device_ends(spec, name) for name in names[number::count]]
        chains.append(_ranges(config, hosts[number * length : (number + 1) * length], ends))
    return lay_out(spec, names, chains)


def lay_out(spec: RunSpec, devices: Iterable[str], chains: Sequence[Sequence[HostRange]]) -> Layout:
    """Sites of these chains, to which the devices are dealt in turn, by name; their routes."""
    names = sorted(devices)
    ends = {name: device_ends(spec, name) for name in names}
    indices = {name: index for index, name in enumerate(names)}
    sites, routes = [], {}
    for number, chain in enumerate(chains):
        members = names[number :: len(chains)]
        site = Site(tuple(chain), tuple(members))
        sites.append(site)
        for name in members:
            front, back_first = ends[name]
            routes[name] = pb.Route(
                device=name,
                device_index=indices[name],
                front=front,
                back_first=back_first,
                hops=[_hop(spec.config, host, name, front, back_first) for host in site.hosts],
            )
    return Layout(tuple(sites), {name: routes[name] for name in names})


def device_ends(spec: RunSpec, device: str) -> tuple[int, int]:
    """(front, back_first): layers [0, front) and [back_first, all) stay on the device."""
    split, source = spec.config.split, spec.source
    front = by_name(split.fronts, device, split.front)
    back = by_name(split.backs, device, split.back) if label_place(split.labels).on_device else 0
    if front + back > source.num_layers:
        raise ConfigError(
            f"device {device} would keep {front} layers in front and {back} at the back (split.fronts, split.backs); "
            f"{source.name} has {source.num_layers}"
        )
    return front, source.num_layers - back


def cut_layers(config: RunConfig, first: int, last: int) -> list[int]:
    """The borders of the hosts' slices: `first`, the cuts, `last`. Equal cuts differ by one layer at most."""
    hosts = config.split.least_hosts
    if not hosts:
        return [first]
    if isinstance(config.split.cuts, tuple):
        return [first, *config.split.cuts, last]
    return [first + (last - first) * number // hosts for number in range(hosts + 1)]


def _ranges(config: RunConfig, hosts: Sequence[pb.Profile], ends: Sequence[tuple[int, int]]) -> list[HostRange]:
    """The hosts' ranges cover what any member's route needs."""
    first, last = min(front for front, _ in ends), max(back_first for _, back_first in ends)
    borders = pairwise(cut_layers(config, first, last))
    return [HostRange(host.name, host.address, low, high) for host, (low, high) in zip(hosts, borders, strict=True)]


def _hop(config: RunConfig, host: HostRange, device: str, front: int, back_first: int) -> pb.Hop:
    first, last = max(front, host.first), min(back_first, host.last)
    if first >= last:
        raise ConfigError(
            f"device {device} keeps layers 0 to {front} and those from {back_first} on, so its route does not cross host "
            f"{host.name} with layers {host.first} to {host.last}; it must cross each host of its site by one layer at least "
            f"(split.fronts, split.backs, split.cuts = {config.split.cuts!r})"
        )
    return pb.Hop(node=host.name, first=first, last=last, address=host.address)
