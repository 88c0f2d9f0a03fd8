"""What nodes and hub agree on about relayed links: two nodes that cannot reach each other both dial the server's hub.

The hub's side is `hub.relay`, the nodes' is `wire.grpc`. Knows no gRPC; the service is declared in edgelam.proto.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass

RELAY_SERVICE = "Relay"
LISTEN, DIAL, ACCEPT = "Listen", "Dial", "Accept"
RELAY = "relay"  # instead of an address to listen on: nobody can dial this node directly
BEHIND = f"{RELAY}:"  # starts the address of such a node
BY_RELAY = " by relay"  # ends the name of a relayed link, at the end that dialled
_PART, _TOKEN, _NUMBER = "part-bin", "token-bin", "number-bin"
Metadata = tuple[tuple[str, bytes], ...]


@dataclass(frozen=True)
class Relay:
    """A way to or from a host through the hub, for one part in a round."""

    hub: str  # HOST:PORT
    part: str  # id of the host's part, as plan.reading.part_id makes it
    token: bytes  # allows either to listen or to dial

    @property
    def metadata(self) -> Metadata:
        return ((_PART, self.part.encode()), (_TOKEN, self.token))


def make_token(key: bytes, method: str, part: str) -> bytes:
    """Returns the token that lets a node call `method` (LISTEN or DIAL) for a host's part; `key` is the server's secret."""
    return hmac.digest(key, f"{method} {part}".encode(), hashlib.sha256)


def read_metadata(metadata: Iterable[tuple[str, str | bytes]]) -> tuple[str, bytes]:
    """Returns the part and the token of a call, each empty if the call has none."""
    values = _bytes(metadata)
    return values.get(_PART, b"").decode(errors="replace"), values.get(_TOKEN, b"")


def number_metadata(number: bytes) -> Metadata:
    """Returns the metadata of a call that accepts the dialler with this number."""
    return ((_NUMBER, number),)


def read_number(metadata: Iterable[tuple[str, str | bytes]]) -> bytes:
    """Returns the dialler's number in a call, empty if the call has none."""
    return _bytes(metadata).get(_NUMBER, b"")


def _bytes(metadata: Iterable[tuple[str, str | bytes]]) -> dict[str, bytes]:
    return {key: value for key, value in metadata if isinstance(value, bytes)}
