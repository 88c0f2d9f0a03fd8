"""Flower's SuperLink as this project runs it: behind a guard, and with the tasks of its runs started from inside.

`python -m edgelam_fl.federation.superlink_daemon` takes the place of Flower's command `flower-superlink`. That command lets
everybody who reaches its port submit runs, register nodes and take over the task of a run. Here the guard decides who may use
which route, and tasks are taken from the SuperLink's state inside this process, so that nobody has to be let in for that.

With a federation's trust it speaks TLS and lets in members alone, who join here too; without, it speaks plain text.

Knows the names inside Flower that this takes; knows neither nodes nor what a run does.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import gc
import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import uvicorn
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key
from flwr.cli.build import build_fab_from_disk
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, TIMESTAMP_HEADER
from flwr.proto.control_pb2 import StartRunRequest
from flwr.server.superlink.linkstate import in_memory_linkstate, sql_linkstate
from flwr.supercore import sql_mixin
from flwr.supercore.constant import (
    FLEET_HTTP_PUBLIC_KEY_HEADER,
    FLEET_HTTP_SIGNATURE_HEADER,
    FLWR_IN_MEMORY_DB_NAME,
    NodeStatus,
)
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.main import create_app
from flwr.superlink.routers.fleet import node_auth
from google.protobuf.message import DecodeError
from sqlalchemy.exc import OperationalError, SQLAlchemyError
from sqlalchemy.pool import QueuePool
from starlette.requests import Request
from starlette.responses import Response
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from edgelam_fl.addresses import from_here, join_address
from edgelam_fl.bounds import bounds_of
from edgelam_fl.config import nearest_key
from edgelam_fl.federation.app_archive import app_alone, archive_digest, run_config_keys
from edgelam_fl.federation.guard import Guard, Handler
from edgelam_fl.federation.lost_messages import give_up_lost_messages, give_up_lost_replies
from edgelam_fl.federation.operator import read_token
from edgelam_fl.federation.run_service import RunService
from edgelam_fl.federation.run_tasks import RunTask, RunTasks, start_task, unpack_app
from edgelam_fl.files import say
from edgelam_fl.trust.identity import AUTHORITY_FILE, CERTIFICATE_FILE, KEY_FILE
from edgelam_fl.trust.join_service import JoinService
from edgelam_fl.trust.server import ServerTrust, open_trust

ABOUT = "about"
"""The route that says which versions run here, to anybody."""
_END_S = 1  # for answers that are being given when it ends
_FIRST_REQUEST_S = 5.0  # for the first request of a connection to begin, its headers included
_DRIFT_S = 86400
HEARTBEATS_MISSED = 4
"""A node counts as gone after so many of its heartbeat's intervals: longer than a short hole in its network lasts."""
_BUSY_MS = 60_000
_TICK_S, _STANDSTILL_S = 1.0, 3.0


def main() -> None:
    """Serves until SIGTERM or SIGINT."""
    options = _options()
    state: Path = options.state
    trust = open_trust(state) if options.members_only else None
    wait_longer_for_the_database()
    app = create_app(_configuration(options), SuperLinkLifespan)
    app.add_exception_handler(OperationalError, ask_again)
    links = app.state.linkstate_factory.state()
    bounds = bounds_of(os.environ)
    judge = partial(refusal_of_run, own="" if options.allow_foreign_apps else own_digest())
    judge_heartbeats()
    open_all_connections(links)
    look_for_dead_tasks_seldom(links)
    if not options.simulation:
        give_up_lost_messages(links)
        give_up_lost_replies(links)
    threading.Thread(target=keep_nodes_over_standstills, args=(links,), name="standstills", daemon=True).start()
    guard = Guard(
        flower=app,
        token=read_token(options.operator),
        judge_run=judge,
        judge_node=partial(refusal_of_node, links) if trust else lambda headers: "",
        own={ABOUT: about, **(_let_members_in(trust, links) if trust else {})},
        operators=RunService(links, bounds).handlers,
    )
    runtime = ["--runtime-api-address", join_address(from_here(options.host), options.port)]
    runtime += ["--root-certificates", str(trust.identity / AUTHORITY_FILE)] if trust else ["--insecure"]
    gc.freeze()  # what is here by now stays: collections need not look at it

    def start(task: RunTask) -> subprocess.Popen[bytes]:
        unpack_app(links, task.run)
        return start_task(task, runtime)

    tasks = RunTasks(links, start, bounds)
    end_stopped_runs(links, tasks.end)
    threading.Thread(target=tasks.serve, name="tasks", daemon=True).start()
    uvicorn.run(
        guard,
        host=options.host,
        port=options.port,
        ssl_certfile=trust.identity / CERTIFICATE_FILE if trust else None,
        ssl_keyfile=str(trust.identity / KEY_FILE) if trust else None,
        http=ImpatientProtocol,
        ws="none",
        access_log=False,  # it would grow with every message; what the guard refuses is logged
        log_level="warning",
        timeout_graceful_shutdown=_END_S,  # else it would wait for its ServerApps, which have no reason to end
    )


def about(asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Answers which versions run here."""
    return 200, {package: version(package) for package in ("edgelam-fl", "flwr")}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Runs Flower's SuperLink behind a guard.")
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--state", type=Path, required=True, help="folder for its own files")
    parser.add_argument("--operator", type=Path, required=True, help="the operator's folder, which holds the token")
    parser.add_argument("--database", default=FLWR_IN_MEMORY_DB_NAME, help="file that keeps nodes and runs")
    parser.add_argument(
        "--members-only", action="store_true", help="TLS and members' keys, from the trust in the state folder"
    )
    parser.add_argument("--simulation", action="store_true", help="Flower's simulation engine plays the nodes")
    parser.add_argument("--allow-foreign-apps", action="store_true", help="run any App that the operator submits")
    return parser.parse_args()


def _configuration(options: argparse.Namespace) -> SuperLinkLifespanConfig:
    return SuperLinkLifespanConfig(
        control_address="",  # of an API that Flower starts on request only, as are the other empty ones
        health_server_address=None,
        host=options.host,
        port=options.port,
        insecure=not options.members_only,
        certificates=None,  # of gRPC ports, of which none is opened
        superexec_auth_secret=secrets.token_bytes(32),  # nobody knows it: tasks are taken inside this process
        authn_plugin=NoOpControlAuthnPlugin(),  # the guard has asked for the operator's token before
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=options.members_only,
        fleet_api_type="grpc-rere",
        fleet_api_address=None,
        simulation=options.simulation,
        ssl_ca_certfile=None,
        ssl_certfile=None,
        ssl_keyfile=None,
        database=options.database,
        isolation="process",  # it starts no SuperExec
        runtime_dependency_install=False,
    )


# ---------------------------------------------------------------- who is let in


class ImpatientProtocol(HttpToolsProtocol):
    """HTTP of one connection, which is closed if no request begins in time: whoever only connects keeps no place."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.loop.call_later(_FIRST_REQUEST_S, self._close_if_silent)

    def _close_if_silent(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()


def _let_members_in(trust: ServerTrust, links: Any) -> Mapping[str, Handler]:
    """Registers the federation's members at Flower; returns what answers nodes that join, renew or were revoked."""
    service = JoinService(
        trust.authority, trust.members, partial(register_supernode, links), partial(unregister_supernode, links)
    )
    service.start()
    _admit_killed_nodes(links)
    tolerate_drifting_clocks()
    return service.handlers


def _admit_killed_nodes(links: Any) -> None:
    """Lets a member go online again at once if its process was killed; Flower would refuse its key for another minute."""
    activate = links.activate_node

    def activate_again(number: int, heartbeat_interval: float) -> bool:
        links.deactivate_node(number)
        return bool(activate(number, heartbeat_interval))

    links.activate_node = activate_again


def end_stopped_runs(links: Any, end: Callable[[int], None]) -> None:
    """Has `end` called with each run that is stopped, by whomever and over whichever route."""
    stop = links.stop_run

    def stop_and_end(run: int) -> bool:
        was_stopped = bool(stop(run))
        if was_stopped:
            end(run)
        return was_stopped

    links.stop_run = stop_and_end


def judge_heartbeats() -> None:
    """Has Flower take a node for gone after `HEARTBEATS_MISSED` intervals, in the place of two.

    Our nodes' intervals are a third of Flower's (`federation.supernode`), so a dead node is missed earlier all the same.
    """
    for module in (in_memory_linkstate, sql_linkstate):
        module.HEARTBEAT_PATIENCE = HEARTBEATS_MISSED


def wait_longer_for_the_database() -> None:
    """Has Flower's requests wait for each other as long as a busy machine may need: after its 5 s it answers that it has failed."""
    sql_mixin.SQLITE_PRAGMAS = tuple({**dict(sql_mixin.SQLITE_PRAGMAS), "busy_timeout": str(_BUSY_MS)}.items())


def open_all_connections(links: Any) -> None:
    """Opens all connections to the database that stay open. Flower would open each one when so many requests meet, over days, and the
    growth of the SuperLink's open files could not be told from a leak.
    """
    for state in (links, links.object_store):
        if not isinstance(state, sql_mixin.SqlMixin):
            continue
        with state.session() as session:
            engine = session.get_bind().engine
        if isinstance(engine.pool, QueuePool):
            with contextlib.ExitStack() as held:
                for _ in range(engine.pool.size()):
                    held.enter_context(engine.connect())


async def ask_again(_: Request, error: Exception) -> Response:
    """Answers a request that the database could not take, locked or on a full disk, so that its sender asks again; with 500 it would end."""
    say(f"the database: {error!s:.200}", sys.stderr)
    return Response(status_code=503)


def look_for_dead_tasks_seldom(links: Any, now: Callable[[], float] = time.monotonic) -> None:
    """Has Flower look once per `_TICK_S` for tasks that have fallen silent, in the place of at every request.

    Each look changes the database, so requests wait for each other; it takes six times as long as what it is done for. Only a SuperLink
    with a database looks like this.
    """
    if not isinstance(links, sql_linkstate.SqlLinkState):
        return
    look, last = links._cleanup_expired_task_tokens, -_TICK_S

    def look_seldom() -> None:
        nonlocal last
        if now() - last >= _TICK_S:
            last = now()
            look()

    links._cleanup_expired_task_tokens = look_seldom


def keep_nodes_over_standstills(
    links: Any, pause: Callable[[float], object] = time.sleep, now: Callable[[], float] = time.monotonic
) -> None:
    """Takes all nodes that were here for heard from whenever this process has stood still: none could be heard; never ends."""
    while True:
        began = now()
        pause(_TICK_S)
        if now() - began >= _STANDSTILL_S:
            with contextlib.suppress(
                SQLAlchemyError
            ):  # the database is locked or full: the nodes' own heartbeats may do
                for node in links.get_node_info(statuses=[NodeStatus.ONLINE]):
                    links.acknowledge_node_heartbeat(node.node_id, node.heartbeat_interval)


def refusal_of_node(links: Any, headers: Mapping[str, str]) -> str:
    """Returns why a node's request is refused, empty if it is not: it is a member's whose key signed the request's time.

    Flower checks the same once more, but after it has read the whole request of whoever sends one.
    """
    try:
        key = base64.b64decode(headers[FLEET_HTTP_PUBLIC_KEY_HEADER], validate=True)
        signature = base64.b64decode(headers[FLEET_HTTP_SIGNATURE_HEADER], validate=True)
        known = links.get_node_id_by_public_key(key) is not None
        if known and verify_signature(bytes_to_public_key(key), headers[TIMESTAMP_HEADER].encode(), signature):
            return ""
    except (KeyError, ValueError) as error:
        return f"this request is not signed by a node ({type(error).__name__})"
    return "this node is no member of the federation: `edgelam invite NAME` on the server prints what lets it in"


def tolerate_drifting_clocks() -> None:
    """Accepts the signatures of nodes whose clocks drift, as boards' do.

    A node signs the time with its key, and Flower refuses a time that is 5 s in the future. That is to keep a recorded signature from
    being used again; TLS lets nobody record one.
    """
    node_auth.SYSTEM_TIME_TOLERANCE = _DRIFT_S


def register_supernode(links: Any, public_key: str, name: str) -> int:
    """Registers a node's public key (OpenSSH) at Flower; returns the node's number, also if the key is known already."""
    key = load_ssh_public_key(public_key.encode()).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    known = links.get_node_id_by_public_key(key)
    if known is not None:
        return int(known)
    return int(links.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, HEARTBEAT_DEFAULT_INTERVAL, name=name))


def unregister_supernode(links: Any, number: int) -> None:
    """Makes Flower forget a node, if it knows one of this number."""
    # A TypeError comes of a node that was never online, after it has been forgotten.
    with contextlib.suppress(ValueError, TypeError):
        links.delete_node(NOOP_FLWR_AID, number)


# ---------------------------------------------------------------- which Apps run here


def own_digest() -> str:
    """Returns the digest of the Flower App that is installed here."""
    with tempfile.TemporaryDirectory() as folder:
        return archive_digest(build_fab_from_disk(app_alone(Path(folder) / "app")))


def refusal_of_run(body: bytes, own: str) -> str:
    """Returns why a request that starts a run is refused, empty if it is not.

    body: a StartRunRequest. own: the digest of the only App that may run; empty: every App that comes with the request may. Of the
    own App it is known which keys its run config has, where Flower would refuse an unknown one without naming those that are meant.
    """
    try:
        request = StartRunRequest.FromString(body)
        if not request.fab.content:
            return f"this server runs no App from elsewhere (got {request.app_spec[:80]!r}): submit the App itself"
        digest = archive_digest(request.fab.content)
    except (DecodeError, ValueError) as error:
        return f"this request starts no run: {error}"
    if not own:
        return ""
    if digest == own:
        known = run_config_keys()
        unknown = [key for key in request.override_config if key not in known]
        return "; ".join(
            f"the run config has no key {key[:80]!r}: {nearest_key(key[:80].replace('-', '_'))}" for key in unknown[:3]
        )
    return (
        f"this server runs its own Flower App alone (digest {own[:12]}), and the submitted one differs (digest {digest[:12]}). "
        "Two ways out: install the same version of edgelam-fl here and there, or start the server with --allow-foreign-apps, "
        "which runs whatever code its operator submits"
    )


if __name__ == "__main__":
    main()
