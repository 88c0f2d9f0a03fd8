"""The hub's door: refuses every call of a node whose membership has ended, ends its open calls, and tells all nodes.

Reads the members' book; changes nothing in it. On a port without certificates nobody is known, and nobody is refused here.
"""

from __future__ import annotations

import logging
import math
import sqlite3
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc

from edgelam_fl.trust.identity import Peer
from edgelam_fl.trust.members import Members
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.grpc.secure import peer
from edgelam_fl.wire.grpc.services import Method, service_handler
from edgelam_fl.wire.membership import ENDED, MEMBERSHIP_SERVICE
from edgelam_fl.wire.relay import LISTEN

MEMBERS_EVERY_S = 1.0  # how often the book is read
_STILL_HERE_S = 10.0  # how often a node hears from the hub: routers on the way cut idle connections
# Calls that last as long as their callers want, and so keep threads: per member, with some for broken connections.
_MOST_WAITING = {ENDED: 4, LISTEN: 4}
_KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class EndedMembers:
    """The memberships that have ended."""

    serials: frozenset[str] = frozenset()  # numbers of certificates that are no longer good
    names: frozenset[str] = frozenset()  # nodes that have no other certificate


def read_ended(members: Members) -> EndedMembers:
    """Returns the memberships that have ended, from the server's book."""
    names = frozenset(member.name for member in members.all() if member.revoked is not None)
    return EndedMembers(members.revoked_serials(), names)


@dataclass(frozen=True)
class _Call:
    """An open call of a member."""

    who: Peer
    method: str
    context: grpc.ServicerContext


class Door(grpc.ServerInterceptor):
    """Stands before all services of a hub."""

    def __init__(self, read: Callable[[], EndedMembers], every_s: float) -> None:
        """`read`: returns the memberships that have ended; asked every `every_s` seconds."""
        self._read, self._every_s = read, every_s
        self._changed = threading.Condition()
        self._ended = read()
        self._calls: dict[int, _Call] = {}  # by number
        self._number = 0
        self._closed = False
        threading.Thread(target=self._follow, name="members", daemon=True).start()

    def close(self) -> None:
        """Stops to read the book."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def service(self) -> grpc.GenericRpcHandler:
        """Returns the service that tells nodes whose membership has ended."""
        return service_handler(MEMBERSHIP_SERVICE, {ENDED: self._tell})

    def intercept_service(
        self, continuation: Callable[[Any], grpc.RpcMethodHandler | None], details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler | None:
        """Puts the check before a method; gRPC calls this for every call."""
        handler = continuation(details)
        if handler is None:
            return None
        kind = next(kind for kind in _KINDS if getattr(handler, kind) is not None)
        return handler._replace(**{kind: self._checked(details.method, getattr(handler, kind))})

    def _checked(self, name: str, method: Method) -> Method:
        def call(request: Any, context: grpc.ServicerContext) -> Any:
            who = peer(context)
            if who is not None:
                self._enter(_Call(who, name.rpartition("/")[2], context))
            return method(request, context)

        return call

    def _enter(self, call: _Call) -> None:
        """Notes an open call. Aborts it if the caller's membership has ended, or if the caller has too many open."""
        who, context, code = call.who, call.context, None
        with self._changed:
            if who.serial in self._ended.serials:
                code, reason = grpc.StatusCode.UNAUTHENTICATED, "its membership in the federation has ended"
            elif self._open_like(call) >= _MOST_WAITING.get(call.method, math.inf):
                code, reason = grpc.StatusCode.RESOURCE_EXHAUSTED, f"it waits in {call.method} too often at a time"
            else:
                self._number += 1
                number = self._number
                self._calls[number] = call
        if code is not None:
            _LOG.warning("refused %s: %s", who.name, reason)
            context.abort(code, f"node {who.name}: {reason}")
        if not context.add_callback(lambda: self._leave(number)):
            self._leave(number)  # the call has ended already

    def _open_like(self, call: _Call) -> int:
        return sum(o.who.serial == call.who.serial and o.method == call.method for o in self._calls.values())

    def _leave(self, number: int) -> None:
        with self._changed:
            self._calls.pop(number, None)

    def _follow(self) -> None:
        while True:
            with self._changed:
                if self._changed.wait_for(lambda: self._closed, timeout=self._every_s):
                    return
            try:
                ended = self._read()
            except sqlite3.Error as error:  # the book is locked; the hub goes on with what it knows
                _LOG.warning("the members' book cannot be read: %s", error)
                continue
            if ended != self._ended:
                self._change(ended)

    def _change(self, ended: EndedMembers) -> None:
        with self._changed:
            self._ended = ended
            barred = [call for call in self._calls.values() if call.who.serial in ended.serials]
            self._changed.notify_all()
        for call in barred:
            _LOG.warning("ended %s of %s: its membership in the federation has ended", call.method, call.who.name)
            call.context.cancel()

    def _tell(self, _: bytes, context: grpc.ServicerContext) -> Iterator[pb.EndedMembers]:
        """Sends all memberships that have ended, at once and after every change, and the same again now and then."""
        context.add_callback(self._wake)
        while context.is_active() and not self._closed:
            said = self._ended
            yield pb.EndedMembers(serials=sorted(said.serials), names=sorted(said.names))
            self._await_change(said, context)

    def _await_change(self, said: EndedMembers, context: grpc.ServicerContext) -> None:
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or self._ended is not said or not context.is_active(), _STILL_HERE_S
            )

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()
