"""The members whose membership has ended, as far as this process has heard. Knows no gRPC and no members' book.

The hub says it (`hub.membership`), `wire.grpc.following` listens, and every link asks here whether it may stay open.
"""

from __future__ import annotations

from collections.abc import Iterable

MEMBERSHIP_SERVICE, ENDED = "Membership", "Ended"


class Ended:
    """What was heard last. Until something was heard, and while nobody can be asked, nobody is barred who was not before."""

    def __init__(self) -> None:
        self._serials: frozenset[str] = frozenset()
        self._names: frozenset[str] = frozenset()

    def replace(self, serials: Iterable[str], names: Iterable[str]) -> None:
        """Notes all that have ended, in the place of what was known: certificates by number, and nodes without any."""
        self._serials, self._names = frozenset(serials), frozenset(names)

    def certificate(self, serial: str) -> bool:
        """Returns whether the certificate with this number is no longer good."""
        return serial in self._serials

    def node(self, name: str) -> bool:
        """Returns whether the node has no certificate that is still good."""
        return name in self._names
