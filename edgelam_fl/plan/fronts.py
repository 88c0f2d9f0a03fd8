"""Finds what hosts could read under a run file, and how many layers devices need in front so that it is little enough.

Pure functions. Judges by numbers that were measured before (`privacy.known`), and knows the memory of devices from their
profiles; measures nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from edgelam_fl.config import RunConfig, share_after
from edgelam_fl.errors import ConfigError, DoesNotFit
from edgelam_fl.model.adapter import Span
from edgelam_fl.model.identity import leakage_key
from edgelam_fl.model.source import ModelSource
from edgelam_fl.plan.bases import choose_base
from edgelam_fl.plan.footprint import Footprints
from edgelam_fl.plan.layout import by_name, device_ends
from edgelam_fl.plan.modes import label_place
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.privacy.known import KnownLeakage, known_leakage
from edgelam_fl.privacy.limits import MEASURE, HostReading, layers, percent, why_refused
from edgelam_fl.tasks.kinds import values_of
from edgelam_fl.wire import edgelam_pb2 as pb


def host_readings(config: RunConfig, digest: str = "") -> list[HostReading]:
    """Returns what hosts can read per number of layers that a run file gives devices; empty without hosts.

    digest: the model's `leakage_key`; empty: its files were not looked at. With split.fronts = 'auto:...', `with_auto_front` comes first.
    """
    split = config.split
    if not split.hosts:
        return []
    back = min([split.back, *split.backs.values()])
    return host_readings_at(config, digest, {(front, back) for front in (split.front, *split.named_fronts.values())})


def host_readings_at(config: RunConfig, digest: str, ends: Collection[tuple[int, int]]) -> list[HostReading]:
    """Returns what hosts can read per pair (layers in front, layers at the back), the fewest first."""
    known, labels_sent = known_leakage(config.model.name, digest), not label_place(config.split.labels).on_device
    of_values = values_of(config.task.kind) is not None
    return [HostReading(config.model.name, front, back, known, labels_sent, of_values) for front, back in sorted(ends)]


def host_reading_of(plan: pb.Plan) -> HostReading | None:
    """Returns what hosts can read of a device's text by its plan; None if no other node computes on it."""
    route = next(iter(plan.routes), None)
    if route is None or all(hop.node == plan.node for hop in route.hops):
        return None
    known = known_leakage(plan.model.name, leakage_key(plan.model.weights_digest, plan.model.files))
    back = plan.model.num_layers - route.back_first
    of_values = values_of(plan.task.kind) is not None
    return HostReading(plan.model.name, route.front, back, known, not label_place(plan.labels).on_device, of_values)


def why_owner_refuses(config: RunConfig, digest: str, device: pb.Profile) -> str:
    """Returns why a device would refuse its plan, as it says itself what its owner allows; empty: nothing is known against it.

    A model that was not measured here may have been measured on the device, which decides for itself.
    """
    split = config.split
    if device.trust in ("", "hosts") or not split.hosts:
        return ""
    front = by_name(split.named_fronts, device.name, split.front)
    (reading,) = host_readings_at(config, digest, {(front, by_name(split.backs, device.name, split.back))})
    if reading.worst is None and device.trust != "none" and not reading.labels_sent:
        return ""
    problem = why_refused(device.trust, reading)
    return problem and f"its owner's --trust {device.trust} refuses the run: {problem}"


def check_trust(config: RunConfig, digest: str = "") -> None:
    """Raises ConfigError if some device would have so few layers that hosts read more than split.trust allows."""
    trust = config.split.trust
    for reading in host_readings(config, digest):
        if problem := why_refused(trust, reading):
            raise ConfigError(
                f"split.trust = {trust!r} refuses this run: {problem}. Allowed: {_ways_out(trust, reading)}"
            )


def _ways_out(trust: str, reading: HostReading) -> str:
    """Lists what a run file may say instead of what was refused."""
    ways = [
        "split.hosts = 0, where only adapters leave a device",
        "split.trust = 'hosts' if the hosts may read the text",
    ]
    known, kind = reading.known, trust.partition(":")[0]
    if kind == "none":
        return ", or ".join(ways)
    if reading.labels_sent:
        return ", or ".join(["split.labels = 'device'", *ways])
    front = known.front_for(share_after(kind, trust, "")) if known else None
    if front is not None and front > reading.front:
        ways.insert(0, f"at least {layers(front)} in front (split.front, split.fronts)")
    elif known and front is not None:
        ways.insert(0, "more layers at the back (split.back, split.backs)")
    return ", or ".join(ways)


def with_auto_front(config: RunConfig, source: ModelSource) -> RunConfig:
    """Returns the run file with split.front as split.fronts = 'auto:LEAK' needs it for this model; others unchanged.

    Raises ConfigError if the model was not measured, if no number of layers is enough, or if there are no hosts.
    """
    split = config.split
    if not isinstance(split.fronts, str):
        return config
    front = needed_front(split.fronts, config.model.name, known_leakage(config.model.name, source.leakage_key))
    if not split.hosts:
        raise ConfigError(
            f"split.fronts = {split.fronts!r} needs split.hosts of at least 1: with split.hosts = 0 each device trains the whole model, "
            f"and nobody reads hidden states"
        )
    return config.model_copy(update={"split": split.model_copy(update={"front": front})})


def needed_front(auto: str, model: str, known: KnownLeakage | None) -> int:
    """Returns the fewest layers with which hosts read at most the share of "auto:SHARE". Raises ConfigError if none are enough."""
    limit = share_after("auto", auto, "a table")
    if known is None:
        raise ConfigError(
            f"split.fronts = {auto!r}: what hosts read is not measured for model.name = {model!r}; {MEASURE}"
        )
    front = known.front_for(limit)
    if front is None:
        cut, share = min(known.read.items(), key=lambda pair: (pair[1], pair[0]))
        raise ConfigError(
            f"split.fronts = {auto!r}: hosts read more than {percent(limit)} of the text at every number of layers that was "
            f"measured for {model}; the least is {percent(share)}, with {layers(cut)}. Allowed: a share of at least that, or split.hosts = 0"
        )
    return front


# ---------------------------------------------------------------- memory


def check_memory_for_fronts(spec: RunSpec, devices: Sequence[pb.Profile]) -> None:
    """Raises DoesNotFit with the first device that lacks the memory for what split.fronts = 'auto:...' asks of it."""
    for device in devices:
        if problem := why_too_small(spec, device):
            raise DoesNotFit(f"device {device.name} {problem}")


def why_too_small(spec: RunSpec, device: pb.Profile) -> str:
    """Returns why a device cannot keep the layers that split.fronts = 'auto:...' needs; empty: it can, or they are given by hand.

    As for any device, one micro-batch in flight has to fit beside its layers at both ends.
    """
    auto = spec.config.split.fronts
    if not isinstance(auto, str) or not device.memory_available_bytes:
        return ""
    needed, back_first = device_ends(spec, device.name)
    footprints, free_bytes = Footprints(spec), device.memory_available_bytes

    def fits(front: int) -> bool:
        return ends_bytes(footprints, device, front, back_first) + footprints.growth_bytes <= free_bytes

    if fits(needed):
        return ""
    most = next((front for front in range(needed - 1, -1, -1) if fits(front)), None)
    free = f"{free_bytes / 1e6:.0f} MB free"
    if most is None:
        return f"has no memory even for the embedding and its last layers ({free}), and split.fronts = {auto!r} needs {needed} layers"
    return f"has memory for {layers(most)} in front ({free}), and split.fronts = {auto!r} needs {needed}"


def ends_bytes(footprints: Footprints, device: pb.Profile, front: int, back_first: int) -> int:
    """Returns the memory that a device needs for layers [0, front) and from `back_first` on, with one micro-batch in flight."""
    spec = footprints.spec
    spans = [Span(0, front, embed=True)]
    if label_place(spec.config.split.labels).on_device:
        spans.append(Span(back_first, spec.source.num_layers, head=True))
    pair = "/".join(choose_base(spec, device, spans))
    return footprints.of_device(device.name, spans, pair, window=1)
