"""The attempt at a round that is under way, as a run's folder tells it: what its nodes are to do, without secrets.

Another process that goes on with the run then knows whose snapshots fit which work. Knows nothing of what nodes have kept.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from google.protobuf.message import DecodeError

from edgelam_fl.files import sync_folder, write_private
from edgelam_fl.plan.layout import HostRange, Site
from edgelam_fl.plan.resuming import keeps_steps
from edgelam_fl.wire import edgelam_pb2 as pb
from server.state import PlannedRound

_FILE = "attempt.json"
_SECRETS = ("relay_token", "slices_token", "kept_token", "attend_token")


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfinished:
    """An attempt of which no end is known."""

    round: int
    attempt: int
    plans: Mapping[str, pb.Plan]
    """By node."""
    sites: Sequence[Site]


def note(folder: Path, planned: PlannedRound) -> None:
    """Writes what an attempt is, if its nodes keep snapshots of it, so that a power cut leaves it. A disk that is full costs this and nothing else."""
    if not any(plan.snapshot_every and keeps_steps(plan) for plan in planned.plans.values()):
        return forget(folder)
    content = {
        "round": planned.facts.round,
        "attempt": planned.facts.attempt,
        "plans": {name: base64.b64encode(_open(plan)).decode() for name, plan in planned.plans.items()},
        "sites": [asdict(site) for site in planned.layout.sites],
    }
    with suppress(OSError):
        write_private(folder / _FILE, json.dumps(content), durable=True)
        sync_folder(folder)


def read(folder: Path) -> Unfinished | None:
    """Returns the attempt that was noted last; None if there is none, or only a part of one."""
    try:
        content = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        plans = {name: pb.Plan.FromString(base64.b64decode(plan)) for name, plan in content["plans"].items()}
        sites = [
            Site(tuple(HostRange(**host) for host in site["hosts"]), tuple(site["members"]))
            for site in content["sites"]
        ]
        return Unfinished(round=content["round"], attempt=content["attempt"], plans=plans, sites=sites)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, DecodeError):
        return None


def forget(folder: Path) -> None:
    """Removes what was noted: no attempt is under way."""
    with suppress(OSError):
        (folder / _FILE).unlink(missing_ok=True)


def _open(plan: pb.Plan) -> bytes:
    """Returns a plan's bytes without what lets a node in anywhere."""
    plain = pb.Plan()
    plain.CopyFrom(plan)
    for name in _SECRETS:
        plain.ClearField(name)
    for route in (*plain.routes, *plain.serves):
        route.ClearField("token")
        for hop in route.hops:
            hop.ClearField("relay_tokens")
    return plain.SerializeToString()
