"""The hub's service for nodes that cannot reach each other: joins the two ends of a link, both of which dialled the hub.

A host with a part in a round keeps one call open here (Listen). A node that wants a link to the host calls Dial; the host
gets a number and answers with it (Accept). From then on each end's messages pass to the other as they are: nothing is kept
or understood here, and an end that reads slowly slows the other down, as on a wire. A link's handshake, with the route's
secret in it, passes like the rest.

Both sides show a token of the host's part, which only this server's runs can make.
"""

from __future__ import annotations

import hmac
import os
import queue
import secrets
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import grpc

from edgelam_fl.wire.grpc.services import service_handler
from edgelam_fl.wire.relay import ACCEPT, DIAL, LISTEN, RELAY_SERVICE, make_token, read_metadata, read_number

_KEY_FILE, _KEY_BYTES = "relay.key", 32
_MOST_LISTENERS, _MOST_LINKS = 128, 128  # a listener takes a thread, a link two
_MOST_UNANSWERED = 64  # diallers that wait for one host
_ACCEPT_S = 10.0
_STILL_HERE_S = 10.0  # how often a host hears from the hub: routers on the way cut idle connections


def relay_key(state: Path) -> bytes:
    """Returns the server's secret from the hub's state folder; the first caller makes it."""
    file = state / _KEY_FILE
    try:
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as made:
            made.write(secrets.token_bytes(_KEY_BYTES))
    except FileExistsError:
        pass
    return file.read_bytes()


def make_service(state: Path) -> grpc.GenericRpcHandler:
    """Returns the service, with the secret in the hub's state folder."""
    relay = HubRelay(relay_key(state))
    return service_handler(RELAY_SERVICE, {LISTEN: relay.listen, DIAL: relay.dial, ACCEPT: relay.accept})


class _Call:
    """A link in the making: the dialler's messages, and the host's once it has accepted."""

    def __init__(self, messages: Iterator[bytes]) -> None:
        self.messages = messages
        self.answer: Iterator[bytes] | None = None
        self.settled = threading.Event()

    def accept(self, messages: Iterator[bytes]) -> None:
        self.answer = messages
        self.settled.set()


class HubRelay:
    """The service's three methods, and who waits for whom. `key` is the server's secret."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._lock = threading.Lock()
        self._listeners: dict[str, queue.Queue[bytes | None]] = {}  # part -> its diallers' numbers; None: the end
        self._calls: dict[bytes, _Call] = {}
        self._links = threading.BoundedSemaphore(_MOST_LINKS)

    def listen(self, _: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        """Sends a host the numbers of its diallers, and now and then an empty message."""
        part = self._allowed(LISTEN, context)
        calls: queue.Queue[bytes | None] = queue.Queue(_MOST_UNANSWERED + 1)
        with self._lock:
            older = self._listeners.pop(part, None)  # the host came back before the hub noticed its loss
            full = len(self._listeners) >= _MOST_LISTENERS
            if not full:
                self._listeners[part] = calls
        if older is not None:
            _end(older)
        if full:
            _refuse(context, grpc.StatusCode.FAILED_PRECONDITION, f"the relay serves {_MOST_LISTENERS} hosts already")
        if not context.add_callback(lambda: self._forget(part, calls)):
            self._forget(part, calls)  # the call has ended already
        yield b""
        while context.is_active():
            try:
                number = calls.get(timeout=_STILL_HERE_S)
            except queue.Empty:
                number = b""
            if number is None:
                return
            yield number

    def _forget(self, part: str, calls: queue.Queue[bytes | None]) -> None:
        with self._lock:
            if self._listeners.get(part) is calls:
                del self._listeners[part]
        _end(calls)

    def dial(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """Joins a dialler to the host whose part its token names; returns the host's messages."""
        part = self._allowed(DIAL, context)
        if not self._links.acquire(blocking=False):
            _refuse(context, grpc.StatusCode.FAILED_PRECONDITION, f"the relay carries {_MOST_LINKS} links already")
        try:
            yield from _passed(self._connect(part, messages, context), context)
        finally:
            self._links.release()

    def _connect(self, part: str, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """Returns the host's messages. Aborts the call if the host does not accept."""
        number, call = secrets.token_bytes(16), _Call(messages)
        with self._lock:
            listener = self._listeners.get(part)
            if listener is None or listener.qsize() >= _MOST_UNANSWERED:
                _refuse(
                    context, grpc.StatusCode.NOT_FOUND, "that host has not dialled the relay yet, or answers nobody"
                )
            self._calls[number] = call
            listener.put_nowait(number)
        context.add_callback(call.settled.set)  # the dialler may hang up first
        call.settled.wait(_ACCEPT_S)
        with self._lock:
            self._calls.pop(number, None)
        if call.answer is None:
            _refuse(context, grpc.StatusCode.UNAVAILABLE, f"that host did not accept within {_ACCEPT_S:.0f} s")
        return call.answer

    def accept(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """Joins a host to the dialler whose number it knows from its own call; returns the dialler's messages."""
        with self._lock:
            call = self._calls.pop(read_number(context.invocation_metadata()), None)
        if call is None:
            _refuse(context, grpc.StatusCode.NOT_FOUND, "nobody waits for this answer any more")
        call.accept(messages)
        yield from _passed(call.messages, context)

    def _allowed(self, method: str, context: grpc.ServicerContext) -> str:
        """Returns the part that the caller's token allows `method` for. Aborts the call if it allows none."""
        part, token = read_metadata(context.invocation_metadata())
        if not hmac.compare_digest(token, make_token(self._key, method, part)):
            _refuse(context, grpc.StatusCode.PERMISSION_DENIED, "no token of this server for that")
        return part


def _passed(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    """Passes one end's messages to the other. An end that vanishes takes the other's call with it."""
    try:
        yield from messages
    except Exception:  # noqa: BLE001 - grpc raises it if the peer of a call has vanished
        _refuse(context, grpc.StatusCode.UNAVAILABLE, "the other end of the link vanished")


def _end(calls: queue.Queue[bytes | None]) -> None:
    """Ends a host's call. The queue has room for that: numbers never take its last place."""
    try:
        calls.put_nowait(None)
    except queue.Full:
        return  # the end is in it already


def _refuse(context: grpc.ServicerContext, code: grpc.StatusCode, reason: str) -> NoReturn:
    context.abort(code, reason)
    raise AssertionError("abort raises")
