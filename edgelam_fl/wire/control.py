"""Local control of a process, a stage host's or the hub's: calls over a socket that only this user can open.

The socket is a file of the state folder (0700). Where its path would be too long for a socket, or the system has no such
sockets, it is a loopback port. A token in `endpoint.json` (0600) guards either.

The ClientApp imports this into a process without a model, so it imports no torch. Knows nothing about what a plan says.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import grpc

from edgelam_fl.errors import EdgelamError, EnvironmentProblem
from edgelam_fl.files import write_private
from edgelam_fl.wire.grpc.services import declared_methods, service_handler, stub

FABRIC_SEPARATOR = "::"  # joins state folder, federation and number into the name of a node that a fabric plays
_SERVICE = "Control"
_POLL_S = 0.1
_LONGEST_PATH_BYTES = 100  # of a socket, on every system
# A stage host that was started again has another token.
_NOBODY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAUTHENTICATED)
_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_http_proxy", 0),
]


class NoStageHost(EnvironmentProblem):
    """Nobody answers at this machine's control now; a stage host that has ended may be started again."""


Handlers = Mapping[str, Callable[[Any], Any]]  # method -> what answers a request


class ControlServer:
    """The control of one process; its address and token are in `state/endpoint.json` (0600)."""

    def __init__(self, state: Path, node: Callable[[str], Handlers], threads: int = 8, service: str = _SERVICE) -> None:
        """Starts to serve `service`. `node` returns the handlers of the node that a call names; a process that is a single
        node, or none, returns the same for any name. `threads` is the number of calls that may wait at a time.
        """
        token = secrets.token_hex(32)

        def guarded(method: str) -> Callable[[Any, grpc.ServicerContext], Any]:
            def call(request: Any, context: grpc.ServicerContext) -> Any:
                given = dict(context.invocation_metadata())
                if not hmac.compare_digest(given.get("token", ""), token):
                    context.abort(grpc.StatusCode.UNAUTHENTICATED, "wrong token")
                try:
                    return node(given.get("node", ""))[method](request)
                except EdgelamError as error:
                    context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))

            return call

        self._server = grpc.server(ThreadPoolExecutor(threads, "control"), options=_OPTIONS)
        methods = {name: guarded(name) for name in declared_methods(service)}
        self._server.add_generic_rpc_handlers((service_handler(service, methods),))
        address = _listen(self._server, state)
        self._server.start()
        self._endpoint = state / "endpoint.json"
        write_private(self._endpoint, json.dumps({"address": address, "token": token}))

    def stop(self) -> None:
        """Ends the calls that still run, and waits until the socket is gone: gRPC would remove a successor's file, too.

        So is `endpoint.json`: whoever calls now waits for a successor.
        """
        self._server.stop(grace=0.5).wait()
        self._endpoint.unlink(missing_ok=True)


def _listen(server: grpc.Server, state: Path) -> str:
    """Opens the socket, or a free loopback port in its place; returns the address."""
    file = state.absolute() / "control.sock"
    if not hasattr(socket, "AF_UNIX") or len(os.fsencode(file)) > _LONGEST_PATH_BYTES:
        return f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    state.mkdir(parents=True, exist_ok=True)
    address = f"unix:{quote(os.fsencode(file))}"  # gRPC takes it as a URI: %, # and ? mean something there
    others = os.umask(0o077)  # gRPC makes the file
    try:
        server.add_insecure_port(address)
    finally:
        os.umask(others)
    return address


class ControlClient:
    """A caller of a stage host on this machine, found by its state folder. Waits for a stage host that is starting."""

    def __init__(self, state: Path, start_deadline_s: float, node: str = "", service: str = _SERVICE) -> None:
        file, end = state / "endpoint.json", time.monotonic() + start_deadline_s
        while not file.exists() and time.monotonic() < end:
            time.sleep(_POLL_S)
        try:
            endpoint = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise NoStageHost(
                f"no stage host has written {file}; `edgelam client` starts one", outward="no stage host has started"
            ) from error
        self._metadata, self._service = (("token", endpoint["token"]), ("node", node)), service
        self._channel = grpc.insecure_channel(endpoint["address"], options=_OPTIONS)

    def call(self, method: str, request: Any, timeout_s: float) -> Any:
        """Returns the method's answer. Raises EnvironmentProblem if the stage host fails or does not answer in time; its subclass
        NoStageHost if there is none, or another one by now.
        """
        try:
            return stub(self._channel, self._service, method)(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            what = f"the stage host did not answer {method}: {error.code().name}"
            kind = NoStageHost if error.code() in _NOBODY else EnvironmentProblem
            raise kind(f"{what}: {error.details()}", outward=what) from error

    def close(self) -> None:
        self._channel.close()


@contextlib.contextmanager
def control(state: Path, start_deadline_s: float = 60.0, node: str = "") -> Iterator[ControlClient]:
    """Opens a client for the block. `node` names the node in a process that plays several (simulation.fabric)."""
    client = ControlClient(state, start_deadline_s, node)
    try:
        yield client
    finally:
        client.close()
