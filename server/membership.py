"""Who the federation's members are, as the book of members beside this run's SuperLink says. Changes nothing in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from edgelam_fl.trust.identity import DEVICE, HOST
from edgelam_fl.trust.members import MEMBERS, Members
from edgelam_fl.wire import edgelam_pb2 as pb

_ROLES: Mapping[str, pb.Role] = {DEVICE: pb.DEVICE, HOST: pb.EDGE}


class Owner(NamedTuple):
    """The member that a node's key belongs to."""

    name: str
    role: pb.Role  # as which it was let in


OwnerOf = Callable[[int], Owner | None]  # Flower's node id -> the owner of the node's key; None: no member


def owners(environment: Mapping[str, str]) -> OwnerOf | None:
    """Returns what looks a node's owner up; None: this SuperLink lets anybody in, and no name belongs to a key."""
    folder = environment.get(MEMBERS)
    if not folder:
        return None
    members = Members(Path(folder))

    def owner_of(node_id: int) -> Owner | None:
        found = (member for member in members.all() if member.flower_id == node_id and member.revoked is None)
        return next((Owner(member.name, _ROLES[member.role]) for member in found), None)

    return owner_of
