"""The hub's part for nodes that cannot reach each other: it joins the two ends of a link, both of which dialled it.

A host with a part in a round keeps one call open here (Listen). Who wants a link to it calls Dial; the host is told a
number and answers it (Accept). From then on what one end sends goes to the other as it is, message by message: nothing is
kept or understood here, and an end that reads slowly slows the other, as on a wire. The handshake of a link, with the
route's secret in it, goes through like the rest.

Whoever listens or dials shows a token of the part in question, which only this server's runs can make.
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

from edgelam_fl.hub import STATE
from edgelam_fl.wire.relay import ACCEPT, DIAL, LISTEN, SERVICE, make_token, read_metadata, read_number

_KEY_FILE, _KEY_BYTES = "relay.key", 32
_MOST_LISTENERS, _MOST_LINKS = 128, 128  # a thread each, two of a link
_MOST_UNANSWERED = 64  # of one host
_ACCEPT_S = 10.0
_STILL_HERE_S = 10.0  # how often a host hears from here: an idle connection would be cut by the routers between


def relay_key(state: Path) -> bytes:
    """The server's secret in the hub's state folder; made by whoever needs it first."""
    file = state / _KEY_FILE
    try:
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as made:
            made.write(secrets.token_bytes(_KEY_BYTES))
    except FileExistsError:
        pass
    return file.read_bytes()


def handlers() -> list[grpc.GenericRpcHandler]:
    relay = HubRelay(relay_key(Path(os.environ[STATE])))
    methods = {
        LISTEN: grpc.unary_stream_rpc_method_handler(relay.listen),
        DIAL: grpc.stream_stream_rpc_method_handler(relay.dial),
        ACCEPT: grpc.stream_stream_rpc_method_handler(relay.accept),
    }
    return [grpc.method_handlers_generic_handler(SERVICE, methods)]


class _Call:
    """A link in the making: what the dialler sends, and then what the host answers with."""

    def __init__(self, messages: Iterator[bytes]) -> None:
        self.messages = messages
        self.answer: Iterator[bytes] | None = None
        self.settled = threading.Event()

    def accept(self, messages: Iterator[bytes]) -> None:
        self.answer = messages
        self.settled.set()


class HubRelay:
    def __init__(self, key: bytes) -> None:
        self._key = key
        self._lock = threading.Lock()
        self._listeners: dict[str, queue.Queue[bytes | None]] = {}  # by part: the numbers of its calls; None: the end
        self._calls: dict[bytes, _Call] = {}
        self._links = threading.BoundedSemaphore(_MOST_LINKS)

    def listen(self, _: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        """Numbers to accept, and now and then an empty message."""
        part = self._allowed(LISTEN, context)
        calls: queue.Queue[bytes | None] = queue.Queue(_MOST_UNANSWERED + 1)
        with self._lock:
            older = self._listeners.pop(part, None)  # the node came back before its loss was noticed
            full = len(self._listeners) >= _MOST_LISTENERS
            if not full:
                self._listeners[part] = calls
        if older is not None:
            _end(older)
        if full:
            _refuse(context, grpc.StatusCode.FAILED_PRECONDITION, f"the relay serves {_MOST_LISTENERS} hosts already")
        context.add_callback(lambda: self._forget(part, calls))
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
        part = self._allowed(DIAL, context)
        if not self._links.acquire(blocking=False):
            _refuse(context, grpc.StatusCode.FAILED_PRECONDITION, f"the relay carries {_MOST_LINKS} links already")
        try:
            yield from _passed(self._connect(part, messages, context), context)
        finally:
            self._links.release()

    def _connect(self, part: str, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """What the host sends. Aborts the call where it does not accept."""
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
        """Whoever knows a number was told it over a host's call."""
        with self._lock:
            call = self._calls.pop(read_number(context.invocation_metadata()), None)
        if call is None:
            _refuse(context, grpc.StatusCode.NOT_FOUND, "nobody waits for this answer any more")
        call.accept(messages)
        yield from _passed(call.messages, context)

    def _allowed(self, method: str, context: grpc.ServicerContext) -> str:
        part, token = read_metadata(context.invocation_metadata())
        if not hmac.compare_digest(token, make_token(self._key, method, part)):
            _refuse(context, grpc.StatusCode.PERMISSION_DENIED, "no token of this server for that")
        return part


def _passed(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    """One end's messages, for the other. An end that vanishes takes the other's call with it."""
    try:
        yield from messages
    except Exception:  # noqa: BLE001 - what grpc raises where the peer of a call has vanished
        _refuse(context, grpc.StatusCode.UNAVAILABLE, "the other end of the link vanished")


def _end(calls: queue.Queue[bytes | None]) -> None:
    """There is always room for it: of the numbers one place is kept free."""
    try:
        calls.put_nowait(None)
    except queue.Full:
        return  # it was ended before


def _refuse(context: grpc.ServicerContext, code: grpc.StatusCode, reason: str) -> NoReturn:
    context.abort(code, reason)
    raise AssertionError("abort raises")
