"""A node's side of joining: makes its key, knows the server by its fingerprint, has the key signed, and renews later.

The private key never leaves the node, and the token goes to nobody but the server that the invitation names. Knows neither the
node's processes nor Flower.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelam_fl.addresses import split_address
from edgelam_fl.errors import EnvironmentProblem, Refused
from edgelam_fl.files import write_private
from edgelam_fl.trust.identity import (
    Identity,
    fingerprint,
    first_certificate,
    has_identity,
    identity_of,
    load_identity,
    new_key,
    public_key,
    save_identity,
)
from edgelam_fl.trust.invites import Invitation
from edgelam_fl.trust.join_service import AUTHORITY, JOIN, RENEW, ROUTE, SYNC
from edgelam_fl.trust.signed import sign_request

_ANSWER_S = 15.0
_MAX_ANSWER_BYTES = 64 << 10
_TOLERATED_S = 60.0  # clocks that differ by less are not worth a word
_MOST_AHEAD_S = 60 * 86400.0  # a clock further ahead takes the certificates of other nodes for expired
_NAME_IS_WRONG = {62, 64}  # OpenSSL's numbers: the host name, the IP address is not in the certificate
_EXPIRED = 10
_JOINING, _JOINED = "joining.pem", "joined"


@dataclass(frozen=True)
class Membership:
    """What a node has after it joined or asked for renewal."""

    identity: Identity
    ahead_s: float
    """How far the node's clock is ahead of the server's; negative: behind."""

    @property
    def clock_is_right(self) -> bool:
        """Whether the node's clock is close enough to the server's."""
        return abs(self.ahead_s) < _TOLERATED_S


def join(invitation: Invitation, folder: Path, clock: Callable[[], float] = time.time) -> Membership:
    """Makes this machine a member, with its identity in `folder`; an identity from another invite is replaced.

    A join that broke off is taken up again by the same invitation, with the same key. Raises EnvironmentProblem if the server
    is not reached or is not the one of the invitation, Refused if it declines.
    """
    authority = _authority_of(invitation)
    context = _context(authority)
    ahead_s = clock() - float(_ask(invitation.server, context, AUTHORITY, {})["clock"])
    if ahead_s > _MOST_AHEAD_S:
        raise EnvironmentProblem(
            f"{clock_words(ahead_s)}: certificates would look expired here. Set the clock (timedatectl set-ntp true), then join"
        )
    key = _key_for_joining(folder)
    fields = {
        "purpose": JOIN,
        "name": invitation.name,
        "token": invitation.token,
        "public_key": public_key(key).decode(),
    }
    answer = _ask(invitation.server, context, JOIN, sign_request(fields, key))
    identity = identity_of(key, str(answer.get("certificate")).encode(), authority)
    save_identity(identity, folder)
    write_private(folder / _JOINED, _hashed(invitation))
    (folder / _JOINING).unlink()
    return Membership(identity, ahead_s)


def has_joined(invitation: Invitation, folder: Path) -> bool:
    """Returns whether this very invitation was used here, as when a service's command line still holds it."""
    with contextlib.suppress(OSError):
        return has_identity(folder) and (folder / _JOINED).read_text(encoding="ascii") == _hashed(invitation)
    return False


def renew(server: str, folder: Path, clock: Callable[[], float] = time.time) -> Membership:
    """Asks the server for a certificate that lasts, and keeps it; also tells the server that the node is here.

    Works after the old certificate has expired, because it is the key that counts. Raises EnvironmentProblem if the server is
    not reached or is not of the node's federation, Refused if the node is no member any more.
    """
    identity = load_identity(folder)
    request = sign_request({"purpose": RENEW, "name": identity.name}, identity.key)
    answer = _ask(server, _context(identity.authority), RENEW, request)
    current = identity_of(identity.key, str(answer.get("certificate")).encode(), identity.authority)
    if current != identity:
        save_identity(current, folder)
    return Membership(current, clock() - float(answer["clock"]))


def sync(server: str, authority: bytes) -> None:
    """Has the server bring Flower in step with its members at once. Raises EnvironmentProblem if it is not reached."""
    _ask(server, _context(authority), SYNC, {})


def clock_words(ahead_s: float) -> str:
    """Returns a sentence about a clock that differs from the server's; empty if it is close enough."""
    if abs(ahead_s) < _TOLERATED_S:
        return ""
    amount, unit = next(
        (abs(ahead_s) / seconds, unit)
        for unit, seconds in [("years", 365 * 86400), ("days", 86400), ("hours", 3600), ("minutes", 60)]
        if abs(ahead_s) >= seconds
    )
    return f"this machine's clock is {amount:.1f} {unit} {'ahead of' if ahead_s > 0 else 'behind'} the server's"


def _authority_of(invitation: Invitation) -> bytes:
    """Asks a server that is not known yet for its authority, tells it nothing, and believes only the fingerprint."""
    unverified = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    unverified.check_hostname = False
    unverified.verify_mode = ssl.CERT_NONE
    authority = first_certificate(str(_ask(invitation.server, unverified, AUTHORITY, {}).get("authority", "")).encode())
    if fingerprint(authority) != invitation.fingerprint:
        raise EnvironmentProblem(
            f"the server at {invitation.server} is not the one that the invite is from: its fingerprint begins with "
            f"{fingerprint(authority)[:16]}, the invite's with {invitation.fingerprint[:16]}. Nothing secret was sent. If the server was "
            f"set up again, ask for a new invite; else somebody is between this machine and the server"
        )
    return authority


def _key_for_joining(folder: Path) -> bytes:
    """Returns the key of a join that broke off, or a new one; it stays on this machine until the join is done."""
    file = folder / _JOINING
    if not file.exists():
        write_private(file, new_key())
        folder.chmod(0o700)
    return file.read_bytes()


def _hashed(invitation: Invitation) -> str:
    return hashlib.sha256(invitation.text.encode()).hexdigest()


def _context(authority: bytes) -> ssl.SSLContext:
    """Returns what verifies the server by a federation's authority (PEM) alone."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=authority.decode())
    return context


def _ask(server: str, context: ssl.SSLContext, handler: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """Sends one request to the server and returns its answer."""
    host, port = split_address(server, "--server")
    connection = http.client.HTTPSConnection(host, port, timeout=_ANSWER_S, context=context)
    try:
        connection.request("POST", ROUTE + handler, json.dumps(request), {"Content-Type": "application/json"})
        with connection.getresponse() as response:
            status, body = response.status, response.read(_MAX_ANSWER_BYTES)
    except ssl.SSLError as error:
        raise EnvironmentProblem(_why_no_tls(server, host, error)) from error
    except (OSError, http.client.HTTPException) as error:
        raise EnvironmentProblem(
            f"no server answers at {server} ({error}); start one there with `edgelam server`, or check the way to it"
        ) from error
    finally:
        connection.close()
    return _content(server, status, body)


def _content(server: str, status: int, body: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict) or status not in (200, 400, 403):
        raise EnvironmentProblem(
            f"what answers at {server} is no EdgeLAM-FL server of this version (HTTP {status}); check --server"
        )
    if status != 200:
        raise Refused(f"the server at {server} declines: {str(answer.get('detail'))[:500]}")
    return answer


def _why_no_tls(server: str, host: str, error: ssl.SSLError) -> str:
    code = getattr(error, "verify_code", None)
    if code is None:
        return (
            f"{server} does not answer in TLS ({error.reason}): it is no EdgeLAM-FL server of this version, or was started with "
            f"--insecure; start it without, or check the address"
        )
    if code in _NAME_IS_WRONG:
        return (
            f"the certificate of the server at {server} does not name {host}. On the server, add the address that nodes use: "
            f"edgelam server --address {host}"
        )
    if code == _EXPIRED:
        return (
            f"the certificate of the server at {server} has expired, by this machine's clock, which says "
            f"{time.strftime('%Y-%m-%d', time.gmtime())}; set the clock (timedatectl set-ntp true) here or on the server"
        )
    return (
        f"the server at {server} belongs to another federation than this machine's keys do. Check the address; if the server was "
        f"set up again, join again with a new invite (edgelam invite NAME, on the server)"
    )
