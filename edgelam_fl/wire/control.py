"""Local control of a stage host: Profile, Submit and Wait over loopback, with a token that only this user can read.

The ClientApp imports this for every message, so it imports no torch.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from edgelam_fl.errors import EdgelamError, EnvironmentProblem
from edgelam_fl.files import write_private
from edgelam_fl.wire import edgelam_pb2 as pb

FABRIC_SEPARATOR = "::"  # between the parts of what names a node that a fabric plays: state folder, federation, number
_SERVICE = "edgelam.v1.Control"
_METHODS: dict[str, tuple[Any, Any]] = {
    "GetProfile": (pb.ProfileRequest, pb.Profile),
    "Submit": (pb.SubmitRequest, pb.SubmitReply),
    "Wait": (pb.WaitRequest, pb.JobReport),
}
_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_http_proxy", 0),
]


Handlers = Mapping[str, Callable[[Any], Any]]  # by method


class ControlServer:
    """Serves the three methods on a free loopback port, and writes port and token to `state/endpoint.json` (0600)."""

    def __init__(self, state: Path, node: Callable[[str], Handlers], threads: int = 8) -> None:
        """`node`: the handlers of the node that a call names; a process that is one node has them for any name.

        `threads`: calls that may wait at a time.
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

        methods = {
            name: grpc.unary_unary_rpc_method_handler(
                guarded(name),
                request_deserializer=request.FromString,
                response_serializer=reply.SerializeToString,
            )
            for name, (request, reply) in _METHODS.items()
        }
        self._server = grpc.server(ThreadPoolExecutor(threads, "control"), options=_OPTIONS)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, methods),))
        port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()
        write_private(state / "endpoint.json", json.dumps({"address": f"127.0.0.1:{port}", "token": token}))

    def stop(self) -> None:
        self._server.stop(grace=0.5)


class ControlClient:
    """Calls a stage host of this machine by its state folder; one that is just starting is waited for."""

    def __init__(self, state: Path, start_deadline_s: float, node: str = "") -> None:
        file, end = state / "endpoint.json", time.monotonic() + start_deadline_s
        while not file.exists() and time.monotonic() < end:
            time.sleep(0.1)
        try:
            endpoint = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise EnvironmentProblem(f"no stage host has written {file}; `edgelam client` starts one") from error
        self._metadata = (("token", endpoint["token"]), ("node", node))
        self._channel = grpc.insecure_channel(endpoint["address"], options=_OPTIONS)

    def call(self, method: str, request: Any, timeout_s: float) -> Any:
        reply = _METHODS[method][1]
        stub = self._channel.unary_unary(
            f"/{_SERVICE}/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=reply.FromString,
        )
        try:
            return stub(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise EnvironmentProblem(
                f"the stage host did not answer {method}: {error.code().name}: {error.details()}"
            ) from error

    def close(self) -> None:
        self._channel.close()


@contextlib.contextmanager
def control(state: Path, start_deadline_s: float = 60.0, node: str = "") -> Iterator[ControlClient]:
    """`node`: which one, where a process plays several (edgelam_fl.simulation.fabric)."""
    client = ControlClient(state, start_deadline_s, node)
    try:
        yield client
    finally:
        client.close()
