"""The server's side of joining: answers nodes that join or renew, and keeps Flower's registrations in step with the members.

Handlers take and return plain dicts with an HTTP status; whoever listens mounts them. Knows neither HTTP nor Flower.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from edgelam_fl.errors import EdgelamError, Refused, UsageError
from edgelam_fl.trust.authority import NODE_VALID, Authority, load_public_key
from edgelam_fl.trust.identity import public_key_ssh, valid_until
from edgelam_fl.trust.members import KnownNode, Members, revoked_words
from edgelam_fl.trust.signed import fields_of, verify_request

JOIN, RENEW, AUTHORITY, SYNC = "join", "renew", "authority", "sync"
ROUTE = "/v1/edgelam/"
"""What each handler's name is appended to."""
RENEWED_BELOW = NODE_VALID / 3
"""A certificate with less time left is replaced when its node asks."""

Answer = tuple[int, dict[str, Any]]


@dataclass(frozen=True)
class JoinService:
    """Lets nodes in. All methods may be called from several threads at a time."""

    authority: Authority
    members: Members
    register: Callable[[str, str], int]
    """Registers a public key (OpenSSH) under a name at Flower and returns the node's number; for a key that Flower knows already,
    the number that it has."""
    unregister: Callable[[int], None]
    """Makes Flower forget a node; no error if it knows none of that number."""
    clock: Callable[[], float] = time.time

    @property
    def handlers(self) -> Mapping[str, Callable[[Mapping[str, Any]], Answer]]:
        """Returns what answers each of the service's requests. All may be offered to everybody."""
        return {
            AUTHORITY: lambda request: (200, self._authority()),
            JOIN: partial(answered, self._join),
            RENEW: partial(answered, self._renew),
            SYNC: partial(answered, self._sync),
        }

    def start(self) -> None:
        """Registers all members at Flower, which may have lost what it knew, and removes the revoked ones."""
        for member in self.members.all():
            if member.revoked is None:
                self._register(member)
        self._unregister_revoked()

    def _authority(self) -> dict[str, Any]:
        return {"authority": self.authority.certificate.decode(), "clock": self.clock()}

    def _join(self, request: Mapping[str, Any]) -> dict[str, Any]:
        purpose, name, token, public = fields_of(request, "purpose", "name", "token", "public_key")
        _check_purpose(purpose, JOIN)
        load_public_key(public.encode())
        verify_request(request, public.encode())
        return self._let_in(self.members.claim(token, name, public.encode()))

    def _renew(self, request: Mapping[str, Any]) -> dict[str, Any]:
        purpose, name = fields_of(request, "purpose", "name")
        _check_purpose(purpose, RENEW)
        member = self.members.find(name)
        verify_request(request, member.public_key)
        if member.revoked is not None:
            raise Refused(revoked_words(name))
        self.members.note_seen(name)
        return self._let_in(member)

    def _sync(self, request: Mapping[str, Any]) -> dict[str, Any]:
        for member in self.members.all():
            if member.revoked is None and member.flower_id is None:
                self._register(member)
        self._unregister_revoked()
        return {}

    def _let_in(self, member: KnownNode) -> dict[str, Any]:
        """Gives a member what it lacks: a certificate that lasts, and a place at Flower."""
        if not member.certificate or self._left_s(member) < RENEWED_BELOW.total_seconds():
            certificate = self.authority.sign(member.public_key, member.name, member.role)
            self.members.certify(member, certificate)
        if member.flower_id is None:
            self._register(member)
        current = self.members.find(member.name)
        return {"certificate": current.certificate.decode(), "name": current.name, "clock": self.clock()}

    def _left_s(self, member: KnownNode) -> float:
        return valid_until(member.certificate).timestamp() - self.clock()

    def _register(self, member: KnownNode) -> None:
        number = self.register(public_key_ssh(member.public_key), member.name)
        self.members.note_registered(member, number)

    def _unregister_revoked(self) -> None:
        for number in self.members.leaving():
            self.unregister(number)
            self.members.note_unregistered(number)


def _check_purpose(given: str, expected: str) -> None:
    if given != expected:
        raise UsageError(f"the request was signed for {given!r}, not for {expected!r}")


def answered(
    handle: Callable[[Mapping[str, Any]], dict[str, Any]], request: Mapping[str, Any], *, declined: int = 403
) -> Answer:
    """Returns a handler's answer with its HTTP status; for an error that the caller caused, its text.

    declined: the status for a request that is understood and not followed.
    """
    try:
        return 200, handle(request)
    except UsageError as error:
        return 400, {"detail": str(error)}
    except EdgelamError as error:
        return declined, {"detail": str(error)}
