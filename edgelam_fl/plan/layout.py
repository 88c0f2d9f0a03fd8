"""Says who holds which layers in a round: sites, their chains of hosts, and one route per device. Pure functions.

A site is a chain of hosts and the devices whose routes cross it. Devices may keep different numbers of layers at their ends,
so a route may enter the first host and leave the last one at any layer inside; a host holds what any of its routes needs.
Knows neither speeds nor memory (`placement` does), and no tokens and bandwidth shares (`making` adds them).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
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
    """A chain of hosts, in the routes' order, and its member devices. Without hosts each member runs the whole model."""

    hosts: tuple[HostRange, ...]
    members: tuple[str, ...]

    @property
    def name(self) -> str:
        return "+".join(host.name for host in self.hosts)

    @property
    def nodes(self) -> tuple[str, ...]:
        """Returns the names of its hosts and members, each once: a member may host."""
        return tuple(dict.fromkeys([*(host.name for host in self.hosts), *self.members]))


@dataclass(frozen=True)
class Layout:
    """All sites of a round and the routes over them."""

    sites: tuple[Site, ...]
    routes: Mapping[str, pb.Route]  # by device, in the order of names; without token and share
    bases: Mapping[str, tuple[str, str]] = field(
        default_factory=dict
    )  # (base, compute) of nodes that it is settled for

    def site_of(self, device: str) -> Site:
        """Returns the site that a device is a member of."""
        return self._site_by_device[device]

    @cached_property
    def _site_by_device(self) -> Mapping[str, Site]:
        return {device: site for site in reversed(self.sites) for device in site.members}


def site_source(site: str) -> str:
    """Returns a site's name as strategies see it, which differs from that of a device that is the site's only host."""
    return f"site {site}"


def hosts_of(source: str) -> list[str]:
    """Returns the names of a site's hosts, from its name as strategies see it."""
    return [name for name in source.removeprefix(site_source("")).split("+") if name]


def by_name(patterns: Mapping[str, int], name: str, default: int) -> int:
    """Returns a node's value: that of its exact name, else of the longest pattern that matches, else the default."""
    if name in patterns:
        return patterns[name]
    matching = sorted((pattern for pattern in patterns if fnmatchcase(name, pattern)), key=lambda p: (-len(p), p))
    return patterns[matching[0]] if matching else default


def local_hosts(config: RunConfig) -> list[str]:
    """Returns the names of the edge servers of a run on one machine; none if devices host, or if nothing is split."""
    split = config.split
    count = 0 if split.host_on == "any" else split.least_hosts * split.sites
    return [f"edge-{number}" for number in range(1, count + 1)]


def who_may_host(config: RunConfig, profiles: Iterable[pb.Profile]) -> list[pb.Profile]:
    """Lists the nodes that others can dial: edge servers by name, then devices if split.host_on = "any"."""
    allowed = [p for p in profiles if p.address and (p.role == pb.EDGE or config.split.host_on == "any")]
    return sorted(allowed, key=lambda profile: (profile.role == pb.DEVICE, profile.name))


def check_hosts(config: RunConfig, hosts: Sequence[pb.Profile]) -> None:
    """Raises RunFailed if there are too few hosts for one site."""
    least = config.split.least_hosts
    if len(hosts) < least:
        raise RunFailed(
            f"a site needs {least} hosts (split.hosts), and only {len(hosts)} of the nodes can be one: "
            f"{', '.join(host.name for host in hosts) or 'none'} (split.host_on = {config.split.host_on!r})"
        )


def make_layout(spec: RunSpec, devices: Sequence[pb.Profile], hosts: Sequence[pb.Profile]) -> Layout:
    """Assigns devices to sites in turn, by name, and to each site the next `split.hosts` of `hosts`.

    Makes fewer sites than `split.sites` if hosts or devices are missing. Raises RunFailed if there are not enough hosts for
    one site, ConfigError if a route would not cross each host of its site.
    """
    config = spec.config
    check_hosts(config, hosts)
    names = sorted(device.name for device in devices)
    length = config.split.least_hosts
    count = min(config.split.sites, len(names), len(hosts) // length if length else 1)
    chains = []
    for number in range(count):
        ends = [device_ends(spec, name) for name in names[number::count]]
        chains.append(_ranges(config, hosts[number * length : (number + 1) * length], ends))
    return layout_of_chains(spec, names, chains)


def layout_of_chains(spec: RunSpec, devices: Iterable[str], chains: Sequence[Sequence[HostRange]]) -> Layout:
    """Makes a site of each chain, assigns the devices to them in turn, by name, and makes their routes."""
    names = sorted(devices)
    ends = {name: device_ends(spec, name) for name in names}
    indices = {name: index for index, name in enumerate(names)}
    sites, routes = [], {}
    for number, chain in enumerate(chains):
        site = Site(tuple(chain), tuple(names[number :: len(chains)]))
        sites.append(site)
        for name in site.members:
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
    """Returns (front, back_first): layers [0, front) and [back_first, all) stay on the device. A network of our own has no layers."""
    split, source = spec.config.split, spec.source
    if not source.num_layers:
        return 0, 0
    front = by_name(split.named_fronts, device, split.front)
    back = by_name(split.backs, device, split.back) if label_place(split.labels).on_device else 0
    if front + back > source.num_layers:
        raise ConfigError(
            f"device {device} would keep {front} layers in front and {back} at the back (split.fronts, split.backs); "
            f"{source.name} has {source.num_layers}"
        )
    return front, source.num_layers - back


def cut_layers(config: RunConfig, first: int, last: int) -> list[int]:
    """Returns the borders of the hosts' slices: `first`, the cuts, `last`. Equal slices differ by one layer at most."""
    hosts = config.split.least_hosts
    if not hosts:
        return [first]
    if isinstance(config.split.cuts, tuple):
        return [first, *config.split.cuts, last]
    return [first + (last - first) * number // hosts for number in range(hosts + 1)]


def _ranges(config: RunConfig, hosts: Sequence[pb.Profile], ends: Sequence[tuple[int, int]]) -> list[HostRange]:
    """Cuts the layers that any member's route needs into the hosts' ranges."""
    first, last = min(front for front, _ in ends), max(back_first for _, back_first in ends)
    borders = pairwise(cut_layers(config, first, last))
    return [HostRange(host.name, host.address, low, high) for host, (low, high) in zip(hosts, borders, strict=True)]


def _hop(config: RunConfig, host: HostRange, device: str, front: int, back_first: int) -> pb.Hop:
    """Returns the part of a host's range that a device's route crosses."""
    first, last = max(front, host.first), min(back_first, host.last)
    if first >= last:
        raise ConfigError(
            f"device {device} keeps layers 0 to {front} and those from {back_first} on, so its route does not cross host "
            f"{host.name} with layers {host.first} to {host.last}; it must cross each host of its site by at least one layer "
            f"(split.fronts, split.backs, split.cuts = {config.split.cuts!r})"
        )
    return pb.Hop(node=host.name, first=first, last=last, address=host.address)
