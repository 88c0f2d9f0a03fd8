"""What a server keeps to recognise its federation: authority, own identity, members and the address that nodes use. Knows no port."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from edgelam_fl.addresses import from_here, is_every_interface, is_loopback, join_address
from edgelam_fl.errors import EnvironmentProblem
from edgelam_fl.files import write_private
from edgelam_fl.trust.authority import Authority, issue
from edgelam_fl.trust.identity import SERVER, save_identity, valid_until
from edgelam_fl.trust.members import Members

_ADDRESS_FILE = "address"
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class ServerTrust:
    """The folder `trust` of a server's state, opened."""

    authority: Authority
    members: Members
    identity: Path
    """Folder of the server's own identity."""
    address: str
    """HOST:PORT where nodes reach the server."""
    local_address: str
    """HOST:PORT where commands of this machine reach it."""


def trust_folder(state: Path) -> Path:
    """Returns the folder of a server's state that holds what it recognises its members by."""
    return state / "trust"


def prepare_trust(state: Path, host: str, port: int, addresses: Sequence[str] = ()) -> ServerTrust:
    """Makes what is missing, and a certificate of the server for its addresses; for a server that is about to start.

    host: where the server listens. addresses: host names and IP addresses that nodes use; the first is put into invites. By
    default the listen host or, if that is every interface, this machine's name and addresses.
    """
    folder = trust_folder(state)
    authority = Authority.open(folder)
    known = list(dict.fromkeys([*addresses, *own_addresses(host), *_LOOPBACK]))
    save_identity(issue(authority, SERVER, SERVER, known), folder / SERVER)
    write_private(folder / _ADDRESS_FILE, f"{join_address(known[0], port)}\n{join_address(from_here(host), port)}\n")
    return open_trust(state)


def open_trust(state: Path) -> ServerTrust:
    """Opens what `prepare_trust` made. Raises EnvironmentProblem if no server has started with this state yet."""
    folder = trust_folder(state)
    try:
        address, local = (folder / _ADDRESS_FILE).read_text(encoding="utf-8").split()
    except (OSError, ValueError) as error:
        raise EnvironmentProblem(
            f"no server has run with the state {state} yet; start it with `edgelam server`, or name its folder with --state"
        ) from error
    return ServerTrust(Authority.open(folder), Members(folder), folder / SERVER, address, local)


def known_nodes(members: Members) -> list[dict[str, Any]]:
    """Returns what is known about each node as plain values; times in seconds since 1970, None if there is none."""
    return [
        {
            "name": node.name,
            "role": node.role,
            "since": node.since,
            "seen": node.seen,
            "until": valid_until(node.certificate).timestamp() if node.certificate else None,
            "revoked": node.revoked,
        }
        for node in members.all()
    ]


def own_addresses(host: str) -> Iterator[str]:
    """Yields the addresses of a listen host; of every interface, the likeliest that nodes use first."""
    if not is_every_interface(host):
        yield host
    else:
        found = [address for each in psutil.net_if_addrs().values() for address in each]
        for family in (socket.AF_INET, socket.AF_INET6):
            for address in found:
                if address.family == family and not is_loopback(address.address) and "%" not in address.address:
                    yield address.address
    yield socket.gethostname()
