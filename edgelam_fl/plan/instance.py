"""Makes the planner's instances: one planning problem per site, from profiles, the run file and what rounds taught.

Chooses no layers. Free memory is that of a node when it joined, before it held anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import mean

from edgelam_fl.errors import RunFailed
from edgelam_fl.model.adapter import Span
from edgelam_fl.plan.bases import choose_base, host_pairs
from edgelam_fl.plan.chain_cost import fastest_layer_s
from edgelam_fl.plan.facts import DeviceEnds, NodeResources, SiteInstance, StepFacts
from edgelam_fl.plan.footprint import IDLE_BYTES, Footprints
from edgelam_fl.plan.layout import check_hosts, device_ends
from edgelam_fl.plan.modes import host_mode, label_place
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.plan.speeds import LayerTimes, Speeds, head_layers, layer_s
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.relay import BEHIND


@dataclass(frozen=True)
class InstanceMaker:
    """All that the instances of one moment have in common."""

    footprints: Footprints
    speeds: Speeds
    measured: Sequence[pb.Profile]  # of all nodes whose speeds are known
    window: int
    shares: Mapping[str, float] = field(default_factory=dict)  # of the capacity, by device

    @property
    def spec(self) -> RunSpec:
        return self.footprints.spec

    def of_sites(self, devices: Sequence[pb.Profile], hosts: Sequence[pb.Profile]) -> list[SiteInstance]:
        """Makes an instance per site, of fewer sites than `split.sites` if hosts or devices are missing.

        Sites get devices in turn, by name, and hosts by speed. Raises RunFailed if there are too few for one site.
        """
        split = self.spec.config.split
        check_hosts(self.spec.config, hosts)
        if not devices:
            raise RunFailed("no device is here to plan for")
        ordered = sorted(devices, key=lambda device: device.name)
        count = min(split.sites, len(ordered), len(hosts) // split.least_hosts)
        profiles = {host.name: host for host in hosts}
        shared_out = share_out_hosts([self._host(host, None) for host in hosts], count)
        return [
            self.of_site(ordered[number::count], [profiles[node.name] for node in nodes])
            for number, nodes in enumerate(shared_out)
        ]

    def of_site(self, devices: Sequence[pb.Profile], hosts: Sequence[pb.Profile]) -> SiteInstance:
        """Makes the instance of one site with these devices and hosts."""
        ends = {device.name: self._device(device) for device in devices}
        # A device that hosts trains too, here or at another site.
        elsewhere = [host for host in hosts if host.role == pb.DEVICE and host.name not in ends]
        as_device = ends | {host.name: self._device(host) for host in elsewhere}
        nodes = tuple(self._host(host, as_device.get(host.name), len(ends)) for host in hosts)
        pairs = {pair for node in nodes for pair in node.layer_s}
        step = self._step(sorted(pairs), len(ends), mean(node.round_trip_s for node in nodes))
        return SiteInstance(step, tuple(ends.values()), nodes)

    def _step(self, pairs: Sequence[str], devices: int, round_trip_s: float) -> StepFacts:
        spec, config, split = self.spec, self.spec.config, self.spec.config.split
        on_device = label_place(split.labels).on_device
        return StepFacts(
            footprints={pair: self.footprints.of_host(pair, devices, self.window) for pair in pairs},
            tensor_bytes=round(spec.unit_rows * self.speeds.tokens * spec.token_bytes),
            micro_batches=config.step_micro_batches,
            window=self.window,
            front_learns="front" in config.lora.train,
            cut_share=spec.cut_share,
            gradient_share=spec.gradient_share,
            back_on_device=on_device,
            head_layers=0.0 if on_device else head_layers(spec),
            growth_bytes=self.footprints.growth_bytes,
            by_relay=self.speeds.by_relay,
            relay_bps=config.wire.capacity_bps or math.inf,
            # The way through the server is taken to be twice as long as the direct way.
            relay_round_trip_s=round_trip_s,
        )

    def _device(self, device: pb.Profile) -> DeviceEnds:
        spec, wire = self.spec, self.spec.config.wire
        front, back_first = device_ends(spec, device.name)
        spans = [Span(0, front, embed=True)]
        if label_place(spec.config.split.labels).on_device:
            spans.append(Span(back_first, spec.source.num_layers, head=True))
        pair = "/".join(choose_base(spec, device, spans))
        layers = [span.last - span.first + (head_layers(spec) if span.head else 0) for span in spans]
        seconds = self._layer_s(device, pair)
        share_bps = self.shares.get(device.name, 0.0) * wire.capacity_bps or math.inf
        node = self._node(device)
        node = replace(
            node,
            layer_s={pair: seconds},
            up_bps=min(node.up_bps, share_bps),
            down_bps=min(node.down_bps, share_bps),
            ends_s=sum(layers) * seconds,
            back_s=sum(layers[1:]) * seconds,
            ends_bytes=self.footprints.of_device(device.name, spans, pair, self.window),
        )
        return DeviceEnds(node, front, back_first)

    def _host(self, host: pb.Profile, as_device: DeviceEnds | None, devices: int = 1) -> NodeResources:
        """Makes a host's resources. `as_device`: its needs as a device; None if it is only a host. `devices`: that it computes for."""
        node = as_device.node if as_device is not None else self._node(host)
        pairs = host_pairs(self.spec.config, host)
        split = self.spec.config.split
        in_flight = min(self.window, self.spec.config.step_micro_batches)
        workers = host_mode(split.host_mode).workers(devices, in_flight, max(1, host.cpu_threads))
        return replace(node, workers=workers, layer_s={pair: self._layer_s(host, pair) for pair in pairs})

    def _node(self, profile: pb.Profile) -> NodeResources:
        return NodeResources(
            profile.name,
            free_bytes=profile.memory_available_bytes or math.inf,
            up_bps=_measured(profile.link_up_bps) or math.inf,
            down_bps=_measured(profile.link_down_bps) or math.inf,
            round_trip_s=_measured(profile.round_trip_s),
            reachable=not profile.address.startswith(BEHIND),
            idle_bytes=profile.idle_bytes or IDLE_BYTES,
        )

    def _layer_s(self, profile: pb.Profile, pair: str) -> float:
        return layer_s(self.spec, self.speeds, profile, pair, self.measured)


def planned_times(instances: Iterable[SiteInstance]) -> LayerTimes:
    """Returns the seconds per layer and unit that the instances are made of, by node and pair."""
    nodes = [node for instance in instances for node in [*(d.node for d in instance.devices), *instance.hosts]]
    return {(node.name, pair): seconds for node in nodes for pair, seconds in node.layer_s.items()}


def planned_workers(instances: Iterable[SiteInstance]) -> dict[str, int]:
    """Returns the units that each host of the instances computes at once."""
    return {host.name: host.workers for instance in instances for host in instance.hosts}


def share_out_hosts(hosts: Sequence[NodeResources], sites: int) -> list[list[NodeResources]]:
    """Shares out hosts among sites so that each gets fast and slow ones: in turn by speed, there and back. Not a search."""
    ordered = sorted(hosts, key=lambda host: (fastest_layer_s(host), host.name))
    shared_out: list[list[NodeResources]] = [[] for _ in range(sites)]
    for number, host in enumerate(ordered):
        turn, place = divmod(number, sites)
        shared_out[place if turn % 2 == 0 else sites - 1 - place].append(host)
    return shared_out


def _measured(value: float) -> float:
    """Returns a number that a node reported; 0 if it did not measure it, or reported nonsense."""
    return value if math.isfinite(value) and value > 0 else 0.0
