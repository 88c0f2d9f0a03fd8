"""Answers the server's question of what a node can do: its profile as protobuf. Knows no plans.

A link or a layer that cannot be measured is left out; what keeps the node out of the run is named in `problem`.
"""

from __future__ import annotations

import importlib.metadata
from contextlib import suppress
from functools import cache

import torch

from edgelam_fl.bounds import Bounds
from edgelam_fl.errors import EnvironmentProblem, Mismatch, ModelError, code_of
from edgelam_fl.files import cache_folder
from edgelam_fl.machine import disk_free_bytes, resident_bytes
from edgelam_fl.model.bases import usable_bases
from edgelam_fl.model.chip import chip_free_bytes, chip_name
from edgelam_fl.model.layer_speed import measure_layers
from edgelam_fl.model.speed import measure_bases
from edgelam_fl.node.examples import DeviceExamples
from edgelam_fl.node.outward import outward
from edgelam_fl.node.profile.measure import disk_write_bytes_per_s
from edgelam_fl.node.server_hub import ServerHub
from edgelam_fl.tasks.kinds import make_task
from edgelam_fl.tasks.metrics import load_metrics
from edgelam_fl.telemetry.events import EmitInJob
from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.codecs import CODECS

_MOST_TOKENIZED = 50_000  # examples, which take a small board a minute
VERSIONED = ("edgelam-fl", "flwr", "torch", "transformers", "peft", "grpcio", "numpy")


def answer_profile(
    request: pb.ProfileRequest,
    own: pb.Profile,
    examples: DeviceExamples | None,
    hub: ServerHub,
    emit: EmitInJob,
    chip: torch.device,
    bounds: Bounds,
) -> pb.Profile:
    """Returns the profile that a request asks for.

    `own`: name, role, address and tags. `examples`: None for an edge server. `chip`: what the node computes on, whose speed and
    memory count. `bounds`: modules that metrics of the run's own may come from. `emit`: hears what a device has read. What keeps the node out of the run, such as a data
    file that does not fit or a model that is neither here nor at the hub, becomes its `problem`.
    """
    profile = pb.Profile(
        protocol_version=PROTOCOL_VERSION,
        memory_available_bytes=chip_free_bytes(chip),
        cpu_threads=torch.get_num_threads(),
        chip="" if chip.type == "cpu" else f"{chip} {chip_name(chip)}",
        bases=usable_bases(chip),
        codecs=list(CODECS),
        versions={package: importlib.metadata.version(package) for package in VERSIONED},
    )
    profile.MergeFrom(own)
    if request.protocol_version != PROTOCOL_VERSION:
        profile.problem = f"speaks protocol version {PROTOCOL_VERSION}, the server {request.protocol_version}"
        profile.code = Mismatch.code
        return profile
    try:
        if examples is not None:
            load_metrics(request.task.metrics, bounds)
            _count(profile, request, examples, hub, emit)
            profile.memory_available_bytes = chip_free_bytes(chip)  # the examples and what made them stay in memory
        _add_measured(profile, request, hub, chip)
    except Exception as error:  # noqa: BLE001 - whatever a data file sets off, the node is refused and the run goes on
        profile.problem, profile.code = outward(own.name, error, "profile"), code_of(error)
    return profile


def _count(
    profile: pb.Profile, request: pb.ProfileRequest, examples: DeviceExamples, hub: ServerHub, emit: EmitInJob
) -> None:
    """Counts a device's examples as the run's tokenizer leaves them.

    They are counted before it if no model is asked for, none is at hand, or there are so many that the server might not wait: the
    reports of rounds have the counts then.
    """
    source = None
    if request.model:
        with suppress(ModelError, EnvironmentProblem):  # a part that needs the model says so
            source = hub.find(
                request.model, request.model_digest, request.hub_port, request.slices_token, tokenizer=True, download=False
            )  # fmt: skip
    if source is None:
        counted = examples.count(request.task)
    else:
        task = make_task(request.task, source.folder)
        counted = examples.count_tokenized(task, request.task, source.digest, _MOST_TOKENIZED, emit)
    profile.examples, profile.held_out, counts = counted
    profile.data.CopyFrom(counts)


def _add_measured(profile: pb.Profile, request: pb.ProfileRequest, hub: ServerHub, chip: torch.device) -> None:
    if request.measure_model:
        source = hub.find(request.measure_model, request.model_digest, request.hub_port, request.slices_token)
        profile.base_seconds.update(measure_bases(source, chip))
    profile.disk_free_bytes = disk_free_bytes(cache_folder())
    if request.measure_layers:
        with suppress(ModelError, EnvironmentProblem):  # the model is not here; the cache cannot be written
            source = hub.find(request.measure_layers, request.model_digest, request.hub_port, request.slices_token)
            for tokens, seconds in measure_layers(source, chip=chip).items():
                profile.layer_times.add(tokens=tokens, seconds=seconds)
            profile.disk_write_bytes_per_s = disk_write_bytes_per_s(cache_folder())
        # Both at the same moment: the modules imported for measuring stay in memory, which is no longer free.
        profile.idle_bytes, profile.memory_available_bytes = _idle_bytes(), chip_free_bytes(chip)
    if request.measure_link and request.hub_port and hub.host:
        with suppress(EnvironmentProblem):  # no hub answers
            link = hub.measure_link(request.hub_port)
            profile.link_up_bps, profile.link_down_bps = link.up_bps, link.down_bps
            profile.round_trip_s = link.round_trip_s


@cache
def _idle_bytes() -> int:
    """Returns this process's resident memory at the first call: a node is asked before its first plan, and holds nothing yet."""
    return resident_bytes()
