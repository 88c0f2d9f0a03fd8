"""What a stage host adds to its answer to the server: its profile as protobuf. A part that fails stays unmeasured."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cache

from edgelam_fl.errors import EnvironmentProblem, ModelError
from edgelam_fl.files import cache_folder
from edgelam_fl.hub.link_speed import measure_link
from edgelam_fl.machine import disk_free_bytes, memory_free_bytes, resident_bytes
from edgelam_fl.model.layer_speed import measure_layers
from edgelam_fl.model.source import ModelSource
from edgelam_fl.node.profile.measure import disk_write_bytes_per_s
from edgelam_fl.wire import edgelam_pb2 as pb


def add_measured(
    profile: pb.Profile, request: pb.ProfileRequest, find: Callable[..., ModelSource], server: str
) -> None:
    """`find`: a model by name, digest and the hub's port. `server`: the host that the hub is on; "": there is none."""
    profile.disk_free_bytes = disk_free_bytes(cache_folder())
    if request.measure_layers:
        with suppress(ModelError, EnvironmentProblem):  # the model is not here; a cache that is read only
            source = find(request.measure_layers, request.model_digest, request.hub_port)
            for tokens, seconds in measure_layers(source).items():
                profile.layer_times.add(tokens=tokens, seconds=seconds)
            profile.disk_write_bytes_per_s = disk_write_bytes_per_s(cache_folder())
        # Both of the same moment: what was imported for measuring stays, and is no longer free.
        profile.idle_bytes, profile.memory_available_bytes = _idle_bytes(), memory_free_bytes()
    if request.measure_link and request.hub_port and server:
        with suppress(EnvironmentProblem):  # nothing answers there
            link = measure_link(server, request.hub_port)
            profile.link_up_bps, profile.link_down_bps = link.up_bps, link.down_bps
            profile.round_trip_s = link.round_trip_s


@cache
def _idle_bytes() -> int:
    """When it was asked for the first time: a node is asked before it is first planned for, and so holds nothing yet."""
    return resident_bytes()
