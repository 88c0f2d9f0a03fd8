"""The hub's service for nodes that cannot reach each other: joins the two ends of a link, both of which dialled the hub.

A host with a part in a round keeps one call open here (Listen). A node that wants a link to the host calls Dial; the host
gets a number and answers with it (Accept). From then on each end's messages pass to the other as they are: nothing is kept
or understood here, and an end that reads slowly slows the other down, as on a wire. A link's handshake, with the route's
secret in it, passes like the rest.

Both sides show a token of the host's part, which only this server's runs can make. It names the one node that may use it,
and how many links that node may have. The host hears from the hub who dialled.
"""

from __future__ import annotations

import logging
import queue
import secrets
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc

from edgelam_fl.hub.passes import read_pass, refuse, relay_key
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.grpc.secure import peer
from edgelam_fl.wire.grpc.services import service_handler
from edgelam_fl.wire.relay import ACCEPT, DIAL, LISTEN, RELAY_SERVICE, read_number

_MOST_LISTENERS, _MOST_LINKS = 128, 128  # a listener takes a thread, a link two
_SPARE_LINKS = 2  # per token: links that broke and were dialled again before the hub noticed
_MOST_UNANSWERED = 64  # diallers that wait for one host
_ACCEPT_S = 10.0
_STILL_HERE_S = 10.0  # how often a host hears from the hub: routers on the way cut idle connections
_LOG = logging.getLogger(__name__)


def make_service(state: Path) -> grpc.GenericRpcHandler:
    """Returns the service, with the secret in the hub's state folder."""
    relay = HubRelay(relay_key(state))
    return service_handler(RELAY_SERVICE, {LISTEN: relay.listen, DIAL: relay.dial, ACCEPT: relay.accept})


class _Call:
    """A link in the making: the dialler's messages, and the host's once it has accepted."""

    def __init__(self, messages: Iterator[bytes], host: str) -> None:
        self.messages, self.host = messages, host
        self.answer: Iterator[bytes] | None = None
        self.settled = threading.Event()

    def accept(self, messages: Iterator[bytes]) -> None:
        self.answer = messages
        self.settled.set()


class _Listener:
    """A host that waits for diallers. In the queue, None is the end."""

    def __init__(self, node: str) -> None:
        self.node = node
        self.calls: queue.Queue[pb.Dialler | None] = queue.Queue(_MOST_UNANSWERED + 1)

    def end(self) -> None:
        """Ends the host's call. The queue has room for that: diallers never take its last place."""
        with suppress(queue.Full):  # the end is in it already
            self.calls.put_nowait(None)


class HubRelay:
    """The service's three methods, and who waits for whom. `key` is the server's secret."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._lock = threading.Lock()
        self._listeners: dict[str, _Listener] = {}  # by part
        self._calls: dict[bytes, _Call] = {}
        self._open: Counter[tuple[str, str]] = Counter()  # links by part and dialling node

    def listen(self, request: bytes, context: grpc.ServicerContext) -> Iterator[pb.Dialler]:
        """Tells a host who dials it, and now and then that the hub is there."""
        allowed, _ = read_pass(self._key, LISTEN, context)
        part, listener = allowed.part, _Listener(allowed.node)
        with self._lock:
            older = self._listeners.pop(part, None)  # the host came back before the hub noticed its loss
            full = len(self._listeners) >= _MOST_LISTENERS
            if not full:
                self._listeners[part] = listener
        if older is not None:
            older.end()
        if full:
            refuse(context, grpc.StatusCode.FAILED_PRECONDITION, f"the relay serves {_MOST_LISTENERS} hosts already")
        if not context.add_callback(lambda: self._forget(part, listener)):
            self._forget(part, listener)  # the call has ended already
        yield pb.Dialler()
        while context.is_active():
            try:
                dialler = listener.calls.get(timeout=_STILL_HERE_S)
            except queue.Empty:
                dialler = pb.Dialler()
            if dialler is None:
                return
            yield dialler

    def _forget(self, part: str, listener: _Listener) -> None:
        with self._lock:
            if self._listeners.get(part) is listener:
                del self._listeners[part]
        listener.end()

    def dial(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """Joins a dialler to the host whose part its token names; returns the host's messages."""
        allowed, who = read_pass(self._key, DIAL, context)
        dialler = pb.Dialler(node=allowed.node, serial=who.serial if who is not None else "")
        with self._place(allowed, context):
            yield from _passed(self._connect(allowed.part, dialler, messages, context), context)

    @contextmanager
    def _place(self, allowed: pb.RelayPass, context: grpc.ServicerContext) -> Iterator[None]:
        """Takes a place for a link, as many as the token allows. Aborts the call if there is none."""
        holder = (allowed.part, allowed.node)
        with self._lock:
            most = allowed.links + _SPARE_LINKS
            if self._open[holder] >= most:
                refuse(context, grpc.StatusCode.FAILED_PRECONDITION, f"{most} links of {allowed.node} to it are open")
            if self._open.total() >= _MOST_LINKS:
                refuse(context, grpc.StatusCode.FAILED_PRECONDITION, f"the relay carries {_MOST_LINKS} links already")
            self._open[holder] += 1
        try:
            yield
        finally:
            with self._lock:
                self._open[holder] -= 1
                self._open += Counter()  # drops what is at zero

    def _connect(
        self, part: str, dialler: pb.Dialler, messages: Iterator[bytes], context: grpc.ServicerContext
    ) -> Iterator[bytes]:
        """Returns the host's messages. Aborts the call if the host does not accept."""
        dialler.number = number = secrets.token_bytes(16)
        with self._lock:
            listener = self._listeners.get(part)
            if listener is None or listener.calls.qsize() >= _MOST_UNANSWERED:
                refuse(context, grpc.StatusCode.NOT_FOUND, "that host has not dialled the relay yet, or answers nobody")
            self._calls[number] = call = _Call(messages, listener.node)
            listener.calls.put_nowait(dialler)
        context.add_callback(call.settled.set)  # the dialler may hang up first
        call.settled.wait(_ACCEPT_S)
        with self._lock:
            self._calls.pop(number, None)
        if call.answer is None:
            refuse(context, grpc.StatusCode.UNAVAILABLE, f"that host did not accept within {_ACCEPT_S:.0f} s")
        return call.answer

    def accept(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """Joins a host to the dialler whose number it knows from its own call; returns the dialler's messages."""
        who, number = peer(context), read_number(context.invocation_metadata())
        with self._lock:
            call = self._calls.get(number)
            if call is None or (who is not None and who.name != call.host):
                refuse(context, grpc.StatusCode.NOT_FOUND, "nobody waits for this answer any more")
            del self._calls[number]
        call.accept(messages)
        yield from _passed(call.messages, context)


def _passed(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    """Passes one end's messages to the other. An end that vanishes takes the other's call with it."""
    try:
        yield from messages
    except Exception:  # noqa: BLE001 - grpc raises it if the peer of a call has vanished
        refuse(context, grpc.StatusCode.UNAVAILABLE, "the other end of the link vanished")
