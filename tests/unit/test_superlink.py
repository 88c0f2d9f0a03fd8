"""Which nodes and tasks Flower's SuperLink takes for gone, as this project runs it."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack, suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import Mock

import httpx
import pytest
from flwr.server.superlink.linkstate import in_memory_linkstate, sql_linkstate
from flwr.supercore import sql_mixin
from flwr.supercore.error.http import http_error_translator
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.retry.http_retry import _RETRYABLE_STATUS_CODES
from sqlalchemy.exc import OperationalError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edgelam_fl.federation.superlink_daemon import (
    HEARTBEATS_MISSED,
    ask_again,
    judge_heartbeats,
    keep_nodes_over_standstills,
    look_for_dead_tasks_seldom,
    open_all_connections,
    wait_longer_for_the_database,
)


@pytest.mark.parametrize("module", [in_memory_linkstate, sql_linkstate])
def test_flower_has_the_name_that_is_replaced_there(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_PATIENCE", module.HEARTBEAT_PATIENCE)  # to be put back
    judge_heartbeats()
    assert module.HEARTBEAT_PATIENCE == HEARTBEATS_MISSED


class Nodes:
    """One node that is here, and one that is not."""

    def __init__(self) -> None:
        self.heard: list[tuple[int, float]] = []

    def get_node_info(self, *, statuses: list[str]) -> list[Node]:
        return [node for node in (Node(1, 10.0, "online"), Node(2, 10.0, "offline")) if node.status in statuses]

    def acknowledge_node_heartbeat(self, number: int, interval_s: float) -> None:
        self.heard.append((number, interval_s))


class Node:
    def __init__(self, number: int, interval_s: float, status: str) -> None:
        self.node_id, self.heartbeat_interval, self.status = number, interval_s, status


class Stopped(Exception):
    """The end of a test's clock."""


def test_a_standstill_of_the_superlink_is_no_silence_of_its_nodes() -> None:
    nodes, pauses, at_s = Nodes(), iter([1.0, 1.2, 25.0, 1.0]), [100.0]

    def pause(_: float) -> None:
        assert nodes.heard == [] or len(waited) >= 3, "ordinary pauses are no standstill"
        waited.append(next(pauses, 0.0))
        if not waited[-1]:
            raise Stopped
        at_s[0] += waited[-1]

    waited: list[float] = []
    with pytest.raises(Stopped):
        keep_nodes_over_standstills(nodes, pause, lambda: at_s[0])
    assert nodes.heard == [(1, 10.0)]


def test_requests_wait_for_a_busy_database(monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(sql_mixin.SQLITE_PRAGMAS)
    monkeypatch.setattr(sql_mixin, "SQLITE_PRAGMAS", sql_mixin.SQLITE_PRAGMAS)  # to be put back
    wait_longer_for_the_database()
    after = dict(sql_mixin.SQLITE_PRAGMAS)
    assert int(after.pop("busy_timeout")) > int(before.pop("busy_timeout"))
    assert after == before


def test_a_request_that_the_database_cannot_take_is_to_be_sent_again() -> None:
    def locked(_: Request) -> Response:
        raise OperationalError("UPDATE task", None, Exception("database is locked"))

    app = Starlette(
        routes=[Route("/", locked)],
        middleware=[Middleware(BaseHTTPMiddleware, dispatch=http_error_translator)],  # Flower's, which answers 500
    )
    app.add_exception_handler(OperationalError, ask_again)

    async def answered() -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://superlink") as client:
            return (await client.get("/")).status_code

    assert asyncio.run(answered()) in _RETRYABLE_STATUS_CODES


def test_requests_do_not_make_the_superlink_look_for_dead_tasks_each_time() -> None:
    at_s, links = [100.0], Mock(spec=sql_linkstate.SqlLinkState)  # so that Flower has the name that is replaced
    looks = links._cleanup_expired_task_tokens
    look_for_dead_tasks_seldom(links, lambda: at_s[0])
    found = []
    for at_s[0] in (100.0, 100.5, 100.6, 110.0):
        links._cleanup_expired_task_tokens()  # as for each request
        found.append(looks.call_count)
    assert found == [1, 1, 1, 2]


@pytest.mark.filterwarnings("ignore:No path_separator:DeprecationWarning")  # of Flower's database
def test_the_database_has_all_its_files_open_from_the_start(tmp_path: Path) -> None:
    """One that is opened later, when requests meet, looks like a leak."""
    store: Any = ObjectStoreFactory(str(tmp_path / "superlink.db")).store()
    open_all_connections(SimpleNamespace(object_store=store))
    before = open_files(tmp_path)
    with ExitStack() as requests:
        with store.session() as session:
            engine = session.get_bind().engine
        for _ in range(4):
            requests.enter_context(engine.connect())
        assert open_files(tmp_path) == before
    assert before.count("superlink.db") >= 4


def open_files(folder: Path) -> list[str]:
    """Returns the names of the folder's files that this process has open, once per descriptor."""
    found = []
    for file in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the listing itself
            found.append(file.readlink())
    return sorted(target.name for target in found if target.parent == folder)
