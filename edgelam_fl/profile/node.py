"""What a stage host adds to its answer to the server: its profile as protobuf. A part that fails stays unmeasured."""

from __future__ import annotations

from edgelam_fl.errors import EnvironmentProblem, ModelError
from edgelam_fl.machine import disk_free_bytes
from edgelam_fl.model.layer_speed import measure_layers
from edgelam_fl.model.source import cache_folder, find_model
from edgelam_fl.profile.link import measure_link
from edgelam_fl.profile.measure import disk_write_bytes_per_s
from edgelam_fl.wire import edgelam_pb2 as pb


def add_measured(profile: pb.Profile, request: pb.ProfileRequest, server_host: str) -> None:
    profile.disk_free_bytes = disk_free_bytes(cache_folder())
    if request.measure_layers:
        _add_layers(profile, request.measure_layers)
    if request.measure_link_port and server_host:
        _add_link(profile, server_host, request.measure_link_port)


def _add_layers(profile: pb.Profile, model: str) -> None:
    try:
        for tokens, seconds in measure_layers(find_model(model)).items():
            profile.layer_times.add(tokens=tokens, seconds=seconds)
        profile.disk_write_bytes_per_s = disk_write_bytes_per_s(cache_folder())
    except (ModelError, EnvironmentProblem):  # the model is not here; a cache that is read only
        return


def _add_link(profile: pb.Profile, host: str, port: int) -> None:
    try:
        link = measure_link(host, port)
    except EnvironmentProblem:  # an older server has no hub
        return
    profile.link_up_bps, profile.link_down_bps, profile.round_trip_s = link.up_bps, link.down_bps, link.round_trip_s
