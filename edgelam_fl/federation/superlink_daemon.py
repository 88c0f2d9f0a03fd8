"""Flower's SuperLink as this project runs it: behind a guard, and with the tasks of its runs started from inside.

`python -m edgelam_fl.federation.superlink_daemon` takes the place of Flower's command `flower-superlink`. That command lets
everybody who reaches its port submit runs, register nodes and take over the task of a run. Here the guard decides who may use
which route, and tasks are taken from the SuperLink's state inside this process, so that nobody has to be let in for that.

Knows the names inside Flower that this takes; knows neither nodes nor what a run does.
"""

from __future__ import annotations

import argparse
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import uvicorn
from flwr.cli.build import build_fab_from_disk
from flwr.proto.control_pb2 import StartRunRequest
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME
from flwr.supercore.servicer.runtime.runtime_handlers import acquire_task
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.main import create_app
from google.protobuf.message import DecodeError

from edgelam_fl.addresses import join_address
from edgelam_fl.federation.app_archive import app_alone, archive_digest
from edgelam_fl.federation.guard import Guard
from edgelam_fl.federation.operator import read_token

ABOUT = "about"
"""The route that says which versions run here, to anybody."""
_POLL_S = 0.25
_EVERY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def main() -> None:
    """Serves until SIGTERM or SIGINT."""
    options = _options()
    state: Path = options.state
    app = create_app(_configuration(options), SuperLinkLifespan)
    judge = partial(refusal_of_run, own="" if options.allow_foreign_apps else own_digest(state))
    guard = Guard(
        flower=app,
        token=read_token(options.operator),
        judge_run=judge,
        own={ABOUT: lambda asked: (200, {"edgelam-fl": version("edgelam-fl"), "flwr": version("flwr")})},
    )
    host = _EVERY_ADDRESS.get(options.host, options.host)
    starter = partial(start_task, runtime=["--insecure", "--runtime-api-address", join_address(host, options.port)])
    take = partial(take_task, app.state.linkstate_factory.state())
    threading.Thread(target=start_tasks, args=(take, starter), name="tasks", daemon=True).start()
    # No access log: it would grow with every message. What the guard refuses is logged.
    uvicorn.run(guard, host=options.host, port=options.port, ws="none", access_log=False, log_level="warning")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Runs Flower's SuperLink behind a guard.")
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--state", type=Path, required=True, help="folder for its own files")
    parser.add_argument("--operator", type=Path, required=True, help="the operator's folder, which holds the token")
    parser.add_argument("--database", default=FLWR_IN_MEMORY_DB_NAME, help="file that keeps nodes and runs")
    parser.add_argument("--simulation", action="store_true", help="Flower's simulation engine plays the nodes")
    parser.add_argument("--allow-foreign-apps", action="store_true", help="run any App that the operator submits")
    return parser.parse_args()


def _configuration(options: argparse.Namespace) -> SuperLinkLifespanConfig:
    return SuperLinkLifespanConfig(
        control_address="",  # of an API that Flower starts on request only, as are the other empty ones
        health_server_address=None,
        host=options.host,
        port=options.port,
        insecure=True,
        certificates=None,
        superexec_auth_secret=secrets.token_bytes(32),  # nobody knows it: tasks are taken inside this process
        authn_plugin=NoOpControlAuthnPlugin(),  # the guard has asked for the operator's token before
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=False,
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


# ---------------------------------------------------------------- which Apps run here


def own_digest(state: Path) -> str:
    """Returns the digest of the Flower App that is installed here. state: a folder for a copy of it."""
    return archive_digest(build_fab_from_disk(app_alone(state / "app")))


def refusal_of_run(body: bytes, own: str) -> str:
    """Returns why a request that starts a run is refused, empty if it is not.

    body: a StartRunRequest. own: the digest of the only App that may run; empty: every App that comes with the request may.
    """
    try:
        request = StartRunRequest.FromString(body)
        if not request.fab.content:
            return f"this server runs no App from elsewhere (got {request.app_spec[:80]!r}): submit the App itself"
        digest = archive_digest(request.fab.content)
    except (DecodeError, ValueError) as error:
        return f"this request starts no run: {error}"
    if not own or digest == own:
        return ""
    return (
        f"this server runs its own Flower App alone (digest {own[:12]}), and the submitted one differs (digest {digest[:12]}). "
        "Two ways out: install the same version of edgelam-fl here and there, or start the server with --allow-foreign-apps, "
        "which runs whatever code its operator submits"
    )


# ---------------------------------------------------------------- the tasks of runs


def take_task(state: Any) -> tuple[str, str]:
    """Takes the oldest waiting task from the SuperLink's state; returns its kind and its token, both empty if none waits."""
    request = AcquireTaskRequest(supported_task_types=["flwr-serverapp", "flwr-simulation"])
    taken = acquire_task(request, state)
    return taken.task.type, taken.token


def start_tasks(take: Callable[[], tuple[str, str]], start: Callable[[str, str], subprocess.Popen[bytes]]) -> None:
    """Starts each task that `take` returns, as a process; never ends."""
    running: list[subprocess.Popen[bytes]] = []
    while True:
        kind, token = take()
        if token:
            running.append(start(kind, token))
        else:
            time.sleep(_POLL_S)
        running = [process for process in running if process.poll() is None]


def start_task(kind: str, token: str, runtime: list[str]) -> subprocess.Popen[bytes]:
    """Starts the process of one task. The token goes through a pipe: whoever lists processes sees their arguments.

    kind: the name of Flower's command for the task. runtime: that command's options for reaching this SuperLink.
    """
    command = [
        sys.executable,
        "-m",
        "edgelam_fl.federation.task_process",
        kind,
        *runtime,
        "--parent-pid",
        str(os.getpid()),
    ]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    assert process.stdin is not None
    with process.stdin as pipe:
        pipe.write(token.encode())
    return process


if __name__ == "__main__":
    main()
