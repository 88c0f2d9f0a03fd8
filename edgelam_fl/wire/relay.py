"""What nodes and hub agree on about relayed links: two nodes that cannot reach each other both dial the server's hub.

The hub's side is `hub.relay`, the nodes' is `wire.grpc`. Knows no gRPC; the service is declared in edgelam.proto.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from edgelam_fl.wire import edgelam_pb2 as pb

RELAY_SERVICE = "Relay"
LISTEN, DIAL, ACCEPT = "Listen", "Dial", "Accept"
RELAY = "relay"  # instead of an address to listen on: nobody can dial this node directly
BEHIND = f"{RELAY}:"  # starts the address of such a node
BY_RELAY = " by relay"  # ends the name of a relayed link, at the end that dialled
_TOKEN, _NUMBER = "token-bin", "number-bin"
_SIGNATURE_BYTES = hashlib.sha256().digest_size
Metadata = tuple[tuple[str, bytes], ...]


@dataclass(frozen=True)
class Relay:
    """A way to or from a host through the hub, for one part in a round."""

    hub: str  # HOST:PORT
    token: bytes  # allows one node either to listen or to dial

    @property
    def metadata(self) -> Metadata:
        return token_metadata(self.token)


def make_token(key: bytes, method: str, part: str, node: str, links: int = 0) -> bytes:
    """Returns the token that lets one node call `method` for a part; `key` is the server's secret.

    `method`: LISTEN or DIAL for a host's part, or another of the hub's for the node's own. `part`: the part's id, as
    plan.reading.part_id makes it. `links`: to dial, the links that the node needs to the host at
    a time. The token is of no use to a node with another certificate.
    """
    says = pb.RelayPass(part=part, node=node, links=links).SerializeToString(deterministic=True)
    return _signature(key, method, says) + says


def read_token(key: bytes, method: str, token: bytes) -> pb.RelayPass | None:
    """Returns what a token says; None: it was not made with this key, or not for this method."""
    signature, says = token[:_SIGNATURE_BYTES], token[_SIGNATURE_BYTES:]
    if not hmac.compare_digest(signature, _signature(key, method, says)):
        return None
    try:
        return pb.RelayPass.FromString(says)
    except DecodeError:
        return None


def token_metadata(token: bytes) -> Metadata:
    """Returns the metadata of a call that shows a token."""
    return ((_TOKEN, token),)


def token_of(metadata: Iterable[tuple[str, str | bytes]]) -> bytes:
    """Returns the token of a call, empty if the call shows none."""
    return _bytes(metadata).get(_TOKEN, b"")


def number_metadata(number: bytes) -> Metadata:
    """Returns the metadata of a call that accepts the dialler with this number."""
    return ((_NUMBER, number),)


def read_number(metadata: Iterable[tuple[str, str | bytes]]) -> bytes:
    """Returns the dialler's number in a call, empty if the call has none."""
    return _bytes(metadata).get(_NUMBER, b"")


def _signature(key: bytes, method: str, says: bytes) -> bytes:
    return hmac.digest(key, method.encode() + b"\0" + says, hashlib.sha256)


def _bytes(metadata: Iterable[tuple[str, str | bytes]]) -> dict[str, bytes]:
    return {key: value for key, value in metadata if isinstance(value, bytes)}
