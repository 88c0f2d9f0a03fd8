"""A federation in this process: its members with their keys, its book of members, and its hub on a port of this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgelam_fl.addresses import free_port
from edgelam_fl.hub.daemon import SERVICES, HubServer, MakeService
from edgelam_fl.hub.membership import read_ended
from edgelam_fl.hub.passes import relay_key
from edgelam_fl.trust.authority import Authority, issue
from edgelam_fl.trust.identity import DEVICE, SERVER, Identity
from edgelam_fl.trust.members import Members
from edgelam_fl.wire.grpc.secure import Security
from edgelam_fl.wire.relay import Relay, make_token

PART = "test/1/1/edge-1"


class SmallFederation:
    """A server's book of members, a hub that reads it, and the identities of the members."""

    def __init__(self, folder: Path, services: Sequence[MakeService] = SERVICES) -> None:
        self.folder, self._services = folder, services
        self.state = folder / "hub"
        self._authority = Authority.open(folder / "trust")
        self.members = Members(folder / "trust")
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        security = Security(issue(self._authority, SERVER, SERVER))
        self.hub = HubServer(
            "127.0.0.1", self.port, self.state, self._services, security, lambda: read_ended(self.members), 0.05
        )

    def join(self, name: str, role: str = DEVICE) -> Identity:
        identity = issue(self._authority, name, role)
        self.members.add(identity)
        return identity

    def way(self, method: str, node: str) -> Relay:
        return Relay(self.address, make_token(relay_key(self.state), method, PART, node, 1))
