"""Answers `edgelam plan`: which node would hold which layers, at what cost and why; changes nothing on any node.

The numbers are those of the event `placement` (`telemetry.events`), made by the server's own code, from profiles in a file or
from the nodes that have joined a server. Reads and prints them; knows no planning.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf.json_format import ParseDict, ParseError
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from edgelam_fl.config import RunConfig
from edgelam_fl.errors import ConfigError, DataError, RunFailed
from edgelam_fl.federation.flower_app import app_module
from edgelam_fl.federation.operator import Operator
from edgelam_fl.federation.submission import FollowTiming, Submission
from edgelam_fl.model.base_names import PROFILED_TOKENS
from edgelam_fl.model.source import ModelSource
from edgelam_fl.plan.fronts import host_readings_at
from edgelam_fl.plan.pieces import settled
from edgelam_fl.plan.placement import first_proposal
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.privacy.limits import HostReading
from edgelam_fl.telemetry.events import (
    NodeJoined,
    NodePlaced,
    PiecesChosen,
    PlacementMade,
    RunFailure,
    SitePlaced,
    of_kind,
    read_events,
)
from edgelam_fl.telemetry.human import human_bytes, human_layers
from edgelam_fl.telemetry.records import as_json
from edgelam_fl.telemetry.waiting import waiting
from edgelam_fl.wire import edgelam_pb2 as pb

_MESSAGES_S = 180.0  # on top of the time for nodes to join: submission, and messages
_TIMING = FollowTiming(silence_s=20.0)  # somebody waits for the answer
_NOT_IN_A_PROFILE = ("time", "event", "node", "role", "findings", "profile")


@dataclass(frozen=True)
class ForeseenPlan:
    """The placement with which a run would begin."""

    placement: PlacementMade
    pieces: PiecesChosen | None  # None: the run file leaves nothing open of them
    num_layers: int  # of the model
    readable: tuple[HostReading, ...]  # what hosts can read, per number of layers that devices keep

    def to_json(self) -> dict[str, Any]:
        """Returns what `--json` prints: the fields of the event `placement`, those of `pieces` if something was open, num_layers, and
        per front what hosts can read.
        """
        read = [
            {"front": each.front, "back": each.back, "text": each.text, "labels": each.labels} for each in self.readable
        ]
        pieces = {"pieces": as_json(self.pieces)} if self.pieces is not None else {}
        return {**as_json(self.placement), **pieces, "num_layers": self.num_layers, "readable": read}


def plan_of_profiles(config: RunConfig, file: Path) -> ForeseenPlan:
    """Plans for the nodes whose profiles a file holds. Raises ConfigError, or what a run would raise."""
    profiles = read_profiles(file)
    spec: RunSpec = app_module("server.checks").check_config(config, elsewhere=True)
    spec, choice = settled(spec, profiles)
    pieces = choice.event() if choice is not None else None
    return _foreseen(first_proposal(spec, profiles).event(), pieces, spec.config, spec.source)


def plan_on_server(console: Console, config: RunConfig, source: ModelSource, operator: Operator) -> ForeseenPlan:
    """Plans for the nodes that have joined the operator's server, by a run that asks for profiles and ends.

    Raises RunFailed if the server cannot plan, or does not in time.
    """
    runs = operator.runs()
    out = (Path(tempfile.gettempdir()) if runs == Path("/") else runs) / f"plan-{time.time_ns():x}"
    submission = Submission(operator)
    with waiting(console, "asking the nodes"):
        submission.submit(config, out, "plan")
        try:
            with submission.stopped_on_error():
                found = _await_placement(submission, config.federation.join_deadline_s + _MESSAGES_S)
        finally:
            shutil.rmtree(out, ignore_errors=True)
    return _foreseen(*found, config, source)


def _foreseen(
    placement: PlacementMade, pieces: PiecesChosen | None, config: RunConfig, source: ModelSource
) -> ForeseenPlan:
    layers = source.num_layers
    ends = {(device.first, layers - device.last) for site in placement.sites for device in site.devices}
    return ForeseenPlan(placement, pieces, layers, tuple(host_readings_at(config, source.leakage_key, ends)))


def _await_placement(submission: Submission, deadline_s: float) -> tuple[PlacementMade, PiecesChosen | None]:
    pieces: PiecesChosen | None = None
    for event in submission.events(deadline_s, awaited="the server's plan", timing=_TIMING):
        if isinstance(event, PiecesChosen):
            pieces = event
        if isinstance(event, PlacementMade):
            return event, pieces
        if isinstance(event, RunFailure):
            raise RunFailed(f"the server could not plan: {event.reason}", event.exit_code)
    raise RunFailed("the server ended before it planned")


# ---------------------------------------------------------------- profiles in a file


def read_profiles(file: Path) -> list[pb.Profile]:
    """Reads the newest profile of each node from a JSON file or from a run's events.jsonl.

    The JSON is what `edgelam doctor --measure --json` prints, once or as a list. The doctor does not know a node's role:
    `"role": "edge"` beside its "profile" makes the node a host, else it is a device. Raises ConfigError for anything else.
    """
    try:
        found = _from_events(file) if file.suffix == ".jsonl" else _from_json(file)
    except (OSError, ValueError, RecursionError, DataError) as error:
        raise ConfigError(f"--profiles {file} cannot be read: {error}") from error
    profiles = {profile.name: profile for profile in (_profile(file, entry) for entry in found)}
    if not profiles:
        raise ConfigError(
            f"--profiles {file} holds no profile; it takes a list of what `edgelam doctor --measure --json` prints on each node, "
            f"or a run's events.jsonl"
        )
    return list(profiles.values())


def _from_events(file: Path) -> Iterable[Mapping[str, Any]]:
    return [{**as_json(event), "name": event.node} for event in of_kind(read_events(file), NodeJoined)]


def _from_json(file: Path) -> Iterable[Mapping[str, Any]]:
    content = json.loads(file.read_text(encoding="utf-8"))
    entries = content if isinstance(content, list) else [content]
    return [
        {**entry, **entry["profile"]} if isinstance(entry, dict) and "profile" in entry else entry for entry in entries
    ]


def _profile(file: Path, entry: Any) -> pb.Profile:
    """Reads one profile; leaves out fields that this version does not know."""
    name = entry.get("name") or entry.get("node") if isinstance(entry, dict) else None
    if not name:
        raise ConfigError(f"--profiles {file}: {entry!r:.80} is not a profile: it has no name")
    values = {key: value for key, value in entry.items() if key not in _NOT_IN_A_PROFILE and value is not None}
    values |= _doctor_fields(entry)
    role = str(entry.get("role") or "device").upper()
    if role not in ("DEVICE", "EDGE"):
        raise ConfigError(f"--profiles {file}: {name} has role = {entry['role']!r}, which must be 'device' or 'edge'")
    if role == "EDGE":
        values.setdefault("address", f"{name}:0")  # it will have one when it joins
    try:
        found: pb.Profile = ParseDict({**values, "name": name, "role": role}, pb.Profile(), ignore_unknown_fields=True)
        return found
    except ParseError as error:
        raise ConfigError(f"--profiles {file}: the profile of {name} cannot be read: {error}") from error


def _doctor_fields(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Translates the fields that have another name in a profile of the doctor's than on the wire."""
    link, layers = entry.get("link"), entry.get("layer_seconds")
    found: dict[str, Any] = {}
    if "memory_free_bytes" in entry:
        found["memory_available_bytes"] = entry["memory_free_bytes"]
    if isinstance(link, dict):
        found |= {f"link_{way}": link.get(way) for way in ("up_bps", "down_bps")}
        found["round_trip_s"] = link.get("round_trip_s")
    if isinstance(layers, dict) and layers:
        tokens = min(layers, key=lambda size: abs(int(size) - PROFILED_TOKENS))
        found["base_seconds"] = {
            pair: seconds * PROFILED_TOKENS / int(tokens) for pair, seconds in layers[tokens].items()
        }
    return {key: value for key, value in found.items() if value is not None}


# ---------------------------------------------------------------- what is printed


def plan_view(plan: ForeseenPlan) -> Group:
    """Draws a picture and a table per site, and the predicted time per step."""
    sites, layers = plan.placement.sites, plan.num_layers
    parts: list[Any] = []
    for number, site in enumerate(sites, 1):
        title = f"site {number}" if len(sites) > 1 else ""
        parts += [_picture(site, layers), _table(site, layers, title), _words(site)]
    step_s, window = plan.placement.step_s, plan.placement.window
    closing = f"a step takes {step_s:.3g} s, as predicted; micro-batches in flight: {window}"
    chosen = [Text(plan.pieces.words())] if plan.pieces is not None else []
    return Group(*parts, Text(closing), *chosen, *(Text(each.words()) for each in plan.readable))


def _picture(site: SitePlaced, layers: int) -> Text:
    lines = []
    for (first, last), names in _by_ends(site.devices).items():
        ways = [f"{', '.join(names)} [embedding{_then(0, first)}]"]
        ways += [f"{host.node} [{_layers(host, first, last)}]" for host in site.hosts]
        lines.append(" ─▶ ".join([*ways, f"{', '.join(names)} [{_then(last, layers)[2:] or 'no layer'}, head]"]))
    return Text("\n".join(lines))


def _by_ends(devices: Iterable[NodePlaced]) -> dict[tuple[int, int], list[str]]:
    """Groups the devices' names by the layers [first, last) that they leave to hosts."""
    found: dict[tuple[int, int], list[str]] = {}
    for device in devices:
        found.setdefault((device.first, device.last), []).append(device.node)
    return found


def _layers(host: NodePlaced, first: int, last: int) -> str:
    """Names the layers at the host that a route from `first` to `last` crosses."""
    return human_layers([max(first, host.first), min(last, host.last)])


def _then(first: int, last: int) -> str:
    """Continues a list with the layers [first, last); empty for none."""
    return f", {human_layers([first, last])}" if last > first else ""


def _table(site: SitePlaced, layers: int, title: str) -> Table:
    table = Table(title=title or None, box=None, pad_edge=False, header_style="bold")
    for column in ("node", "holds", "base"):
        table.add_column(column)
    for column in ("memory", "computes", "sends", "receives"):
        table.add_column(column, justify="right")
    for host in site.hosts:
        table.add_row(host.node, human_layers([host.first, host.last]), host.base, *_figures(host))
    for device in site.devices:
        kept = device.first + layers - device.last
        table.add_row(device.node, f"{kept} layers at its ends", device.base, *_figures(device))
    return table


def _figures(part: NodePlaced) -> list[str]:
    return [
        human_bytes(part.memory_bytes), f"{part.compute_s:.3g} s", human_bytes(part.up_bytes),
        human_bytes(part.down_bytes),
    ]  # fmt: skip


def _words(site: SitePlaced) -> Text:
    lines = [f"times and bytes are per step; a step takes {site.step_s:.3g} s and waits for {site.limit}"]
    if site.memory_limit:
        lines.append(f"limited by the {site.memory_limit}")
    if site.left_out:
        lines.append(f"not used: {', '.join(site.left_out)}; a step is as short without them")
    return Text("\n".join(lines))
