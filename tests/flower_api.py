"""Flower's Control API as the operator's own command speaks it, without a process per question."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import httpx
from flwr.proto.control_pb2 import ListRunsRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors.http import RuntimeVersionHttpInterceptor

from edgelam_fl.federation.operator import Operator, read_token
from edgelam_fl.trust.identity import load_identity


class Token:
    """Sends a token as Flower's command does."""

    def __init__(self, token: str) -> None:
        self._token = token

    def intercept(self, context: Any, call_next: Any) -> httpx.Response:
        context.request.headers["Authorization"] = f"Bearer {self._token}"
        answer: httpx.Response = call_next(context)
        return answer


def new_client(kind: Any, server: str, authority: bytes, *interceptors: Any) -> Any:
    """Makes one of Flower's clients of a server that speaks TLS; the caller closes it."""
    version = RuntimeVersionHttpInterceptor(component_name="a test")
    return kind.from_server_address(server, False, authority, [version, *interceptors])


def state_of_run(operator: Operator, run_id: int) -> str:
    """Asks Flower for a run's state, in the words of `flwr list`; "unknown" if the server does not answer."""
    assert operator.identity is not None
    authority, token = load_identity(operator.identity).authority, Token(read_token(operator.folder))
    with closing(new_client(ControlHttpClient, operator.server, authority, token)) as client:
        try:
            run = client.ListRuns(ListRunsRequest(run_id=run_id)).run_dict[run_id]
        except httpx.HTTPError:
            return "unknown"
    return f"{run.status.status}:{run.status.sub_status}".rstrip(":")
