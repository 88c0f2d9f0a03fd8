"""The guard before the SuperLink: lets each request through only to those routes that its caller may use.

Flower serves its Control, Fleet and Runtime API on one port, and its open version lets everybody use all of them. This module
knows routes, tokens and addresses as an ASGI application sees them; it knows no message of Flower's and imports nothing of it.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import sys
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from edgelam_fl.addresses import is_loopback
from edgelam_fl.files import say
from edgelam_fl.names import printable

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[Mapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
Handler = Callable[[dict[str, Any]], tuple[int, dict[str, Any]]]
"""Answers a JSON object with an HTTP status and a JSON object. It may block: it runs in a thread."""


class Audience(Enum):
    """Who may use a route."""

    ANYBODY = "anybody"
    NODE = "a member, by its key; with --insecure, a node with any key"
    OPERATOR = "the operator, by the token in the operator's folder"
    MACHINE = "a task of this machine, which Flower checks by the task's token"


def _routes(prefix: str, names: str, caller: Audience) -> dict[str, Audience]:
    return {f"{prefix}{name}": caller for name in names.split()}


ROUTES: Mapping[str, Audience] = {
    "/health": Audience.ANYBODY,
    **_routes(
        "/v1/control/",
        "start-run stop-run list-runs stream-logs stream-run-events list-nodes list-federations show-federation",
        Audience.OPERATOR,
    ),
    **_routes(
        "/v1/fleet/",
        "register-node activate-node deactivate-node unregister-node send-node-heartbeat pull-messages push-messages "
        "get-run get-fab push-object pull-object confirm-message-received",
        Audience.NODE,
    ),
    **_routes(
        "/v1/runtime/",
        "send-task-heartbeat pull-task-input push-task-output push-object pull-object confirm-message-received "
        "push-messages pull-messages get-nodes push-logs",
        Audience.MACHINE,
    ),
}
"""Flower's routes that are open, and for whom. Every other route of Flower's is closed to all."""

START_RUN = "/v1/control/start-run"
OWN_ROUTES = "/v1/edgelam/"
"""The prefix of the routes that are answered here and not by Flower."""
_MAX_RUN_BYTES = 16 << 20
_MAX_OWN_BYTES = 64 << 10
_OWN_THREADS = 4
_UNKNOWN_CALLER = (401, 403)


class Denied(Exception):
    """A request that is not answered. The text says why, in words that the caller may read."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class Guard:
    """An ASGI application that passes on to `flower` what a caller may ask."""

    flower: Application
    token: str
    """The operator's."""
    judge_run: Callable[[bytes], str]
    """Judges the body of a request that starts a run: returns why it is refused, empty if it is not. It may block."""
    judge_node: Callable[[Mapping[str, str]], str] = lambda headers: ""
    """Judges the headers of a node's request, before its body is read: returns why it is refused, empty if it is not."""
    own: Mapping[str, Handler] = field(default_factory=dict)
    """The handlers of this project's own routes that anybody may use, by the route's name after OWN_ROUTES."""
    operators: Mapping[str, Handler] = field(default_factory=dict)
    """The handlers of those that the operator alone may use."""
    _threads: Executor = field(default_factory=lambda: ThreadPoolExecutor(_OWN_THREADS, "own routes"))
    """Those of `own` and `operators`. Anybody may ask there; nodes' requests to Flower are judged on other threads and wait for none."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.flower(scope, receive, send)
        if scope["type"] != "http":
            return None  # Flower has no other kind
        try:
            if scope["path"].startswith(OWN_ROUTES):
                return await _answer(send, *await self._own(scope, receive))
            await self._check_caller(scope)
            if scope["path"] == START_RUN:
                receive = await self._judged(receive)
        except Denied as refusal:
            _note(scope, str(refusal))
            return await _answer(send, refusal.status, {"detail": str(refusal)})
        return await self.flower(scope, receive, _noting_refusals(scope, send))

    async def _check_caller(self, scope: Scope) -> None:
        caller = ROUTES.get(scope["path"])
        if caller is None:
            raise Denied(404, "this server does not offer that")
        if caller is Audience.OPERATOR:
            self._check_token(scope)
        if caller is Audience.NODE:
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            if problem := await asyncio.to_thread(self.judge_node, headers):
                raise Denied(401, problem)
        if caller is Audience.MACHINE and not _is_of_this_machine(scope):
            raise Denied(403, "only tasks that run on the server's machine may do that")

    def _check_token(self, scope: Scope) -> None:
        if not self._has_token(scope):
            raise Denied(
                403,
                "only the operator of this server may do that: on the server's machine, export FLWR_HOME as `edgelam server` "
                "prints it at its start; with edgelam, name that folder with --operator",
            )

    def _has_token(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        expected = f"Bearer {self.token}".encode()
        return len(given) == 1 and hmac.compare_digest(given[0], expected)

    async def _judged(self, receive: Receive) -> Receive:
        """Returns a `receive` that gives the whole body again, once the body has been judged."""
        body = await _body(receive, _MAX_RUN_BYTES)
        problem = await asyncio.to_thread(self.judge_run, body)
        if problem:
            raise Denied(403, problem)
        whole = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Mapping[str, Any]:
            return whole.pop() if whole else await receive()

        return again

    async def _own(self, scope: Scope, receive: Receive) -> tuple[int, dict[str, Any]]:
        name = scope["path"].removeprefix(OWN_ROUTES)
        if name in self.operators:
            self._check_token(scope)
        handler = self.operators.get(name) or self.own.get(name)
        if handler is None:
            raise Denied(404, "this server does not offer that")
        body = await _body(receive, _MAX_OWN_BYTES)
        try:
            asked = json.loads(body or b"{}")
        except (ValueError, RecursionError) as error:
            raise Denied(400, "the request is no JSON") from error
        if not isinstance(asked, dict):
            raise Denied(400, "the request is no JSON object")
        status, answer = await asyncio.get_running_loop().run_in_executor(self._threads, handler, asked)
        if name in self.own and "detail" in answer:
            _note(scope, str(answer["detail"]))
        return status, answer


def _is_of_this_machine(scope: Scope) -> bool:
    """Returns whether the request came over loopback, or from the very address that it was sent to."""
    client, server = scope["client"], scope["server"]
    return client is not None and (is_loopback(client[0]) or (server is not None and client[0] == server[0]))


async def _body(receive: Receive, most_bytes: int) -> bytes:
    body = bytearray()
    while True:
        part = await receive()
        if part["type"] != "http.request":
            raise Denied(400, "the request broke off")
        body += part.get("body", b"")
        if len(body) > most_bytes:
            raise Denied(413, f"the request is longer than {most_bytes} bytes")
        if not part.get("more_body"):
            return bytes(body)


async def _answer(send: Send, status: int, content: dict[str, Any]) -> None:
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(content).encode()})


def _noting_refusals(scope: Scope, send: Send) -> Send:
    """Returns a `send` that also notes what Flower refuses: a guard lets tasks of this machine through, and Flower checks their tokens."""

    async def noting(message: Mapping[str, Any]) -> None:
        if message["type"] == "http.response.start" and message["status"] in _UNKNOWN_CALLER:
            _note(scope, f"Flower does not know the caller by its token or key (HTTP {message['status']})")
        await send(message)

    return noting


def _note(scope: Scope, refusal: str) -> None:
    """Writes who was refused what to the log."""
    address = scope["client"][0] if scope["client"] else "unknown"
    say(f"refused {address}, {scope['path'][:80]!r}: {printable(refusal)}", sys.stderr)
