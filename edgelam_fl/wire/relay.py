"""How two nodes that cannot reach each other have a link all the same: both dial the server's hub, which joins the two ends.

What both sides of it must agree on. The hub's side is edgelam_fl.hub.relay, the nodes' is wire.grpc.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass

SERVICE = "edgelam.v1.Relay"
LISTEN, DIAL, ACCEPT = "Listen", "Dial", "Accept"
RELAY = "relay"  # in the place of an address to listen on: nobody can dial this node
BEHIND = f"{RELAY}:"  # begins such a node's address
BY_RELAY = " by relay"  # ends the name of such a link at the end that dialled
_PART, _TOKEN, _NUMBER = "part-bin", "token-bin", "number-bin"
Metadata = tuple[tuple[str, bytes], ...]


@dataclass(frozen=True)
class Relay:
    """A way to or from a host through the hub, for one part in a round."""

    hub: str  # HOST:PORT
    part: str  # the host's, as split.plan.part_id names it
    token: bytes  # of one who listens, or of one who dials

    @property
    def metadata(self) -> Metadata:
        return ((_PART, self.part.encode()), (_TOKEN, self.token))


def path(method: str) -> str:
    return f"/{SERVICE}/{method}"


def make_token(key: bytes, method: str, part: str) -> bytes:
    """What lets a node call `method` (LISTEN or DIAL) for a host's part: the server's secret is needed to make it."""
    return hmac.digest(key, f"{method} {part}".encode(), hashlib.sha256)


def read_metadata(metadata: Iterable[tuple[str, str | bytes]]) -> tuple[str, bytes]:
    """(part, token) of a call; empty where there are none."""
    values = _bytes(metadata)
    return values.get(_PART, b"").decode(errors="replace"), values.get(_TOKEN, b"")


def number_metadata(number: bytes) -> Metadata:
    return ((_NUMBER, number),)


def read_number(metadata: Iterable[tuple[str, str | bytes]]) -> bytes:
    return _bytes(metadata).get(_NUMBER, b"")


def _bytes(metadata: Iterable[tuple[str, str | bytes]]) -> dict[str, bytes]:
    return {key: value for key, value in metadata if isinstance(value, bytes)}
