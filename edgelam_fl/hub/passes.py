"""The tokens of the hub's services: which part of a round a caller speaks for. Only this server's runs can make them.

The secret is in the hub's state folder. Knows no service; a token is good for one method and one node (`wire.relay`).
"""

from __future__ import annotations

import logging
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import grpc

from edgelam_fl.files import write_private
from edgelam_fl.trust.identity import Peer
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.grpc.secure import peer
from edgelam_fl.wire.relay import read_token, token_of

_KEY_FILE, _KEY_BYTES = "relay.key", 32
_LOG = logging.getLogger(__name__)


def relay_key(state: Path) -> bytes:
    """Returns the server's secret from the hub's state folder; the first caller makes it."""
    file, made = state / _KEY_FILE, state / f".{_KEY_FILE}.{secrets.token_hex(8)}"
    if not file.exists():
        write_private(made, secrets.token_bytes(_KEY_BYTES))
        with suppress(FileExistsError):
            os.link(made, file)  # whole, or not at all
        made.unlink()
    return file.read_bytes()


def read_pass(key: bytes, method: str, context: grpc.ServicerContext) -> tuple[pb.RelayPass, Peer | None]:
    """Returns what the caller's token allows, and who the caller is. Aborts the call if the token is not the caller's.

    On a plain port callers are not known, and a token is anybody's who has it.
    """
    who = peer(context)
    allowed = read_token(key, method, token_of(context.invocation_metadata()))
    if allowed is None:
        _LOG.warning("refused %s: %s shows no token of this server", method, who.name if who else context.peer())
        refuse(context, grpc.StatusCode.PERMISSION_DENIED, "no token of this server for that")
    if who is not None and who.name != allowed.node:
        _LOG.warning("refused %s: %s shows the token of %s for %s", method, who.name, allowed.node, allowed.part)
        refuse(context, grpc.StatusCode.PERMISSION_DENIED, f"this token is {allowed.node}'s, not {who.name}'s")
    return allowed, who


def refuse(context: grpc.ServicerContext, code: grpc.StatusCode, reason: str) -> NoReturn:
    """Aborts a call."""
    context.abort(code, reason)
    raise AssertionError("abort raises")
