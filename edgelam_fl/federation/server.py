"""Runs `edgelam server`: Flower's SuperLink and the hub, watched until Ctrl-C. Knows neither runs nor nodes."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

from rich.console import Console

from edgelam_fl.addresses import check_plain_text, check_port_free, hub_address, split_address
from edgelam_fl.bounds import STRICTEST, Bounds
from edgelam_fl.errors import INTERRUPTED, RunFailed
from edgelam_fl.federation.child import Child, end_all, shorten
from edgelam_fl.federation.hub_process import HubProcess
from edgelam_fl.federation.operator import operator_folder
from edgelam_fl.federation.superlink import start_superlink


def serve(
    console: Console,
    listen: str,
    data_plane: str,
    state: Path,
    insecure: bool,
    bounds: Bounds = STRICTEST,
    allow_foreign_apps: bool = False,
) -> int:
    """Starts SuperLink and hub and watches them until Ctrl-C; returns the exit code.

    bounds: what run files may name on this machine. allow_foreign_apps: runs may bring any Flower App, which then runs here.

    Raises UsageError for an address that may not be used, EnvironmentProblem for a port that is taken, RunFailed if a
    process ends.
    """
    host, port = split_address(listen, "--listen")
    check_plain_text(host, "--listen", insecure)
    hub = HubProcess(*hub_address(host, port, data_plane), state / "hub")
    check_plain_text(hub.host, "--data-plane", insecure)
    superlink = None
    try:
        with console.status("starting Flower's SuperLink"):
            check_port_free(host, port, "--listen")
            hub.start()
            superlink = start_superlink(
                host, port, state, beside=hub, bounds=bounds, keep=True, allow_foreign_apps=allow_foreign_apps
            )
        return _watch(console, listen, hub, superlink, state)
    finally:
        end_all([child for child in (superlink, hub.child) if child is not None])


def _watch(console: Console, listen: str, hub: HubProcess, superlink: Child, state: Path) -> int:
    operator = shlex.quote(str(operator_folder(state).absolute()))
    for line in (
        f"SuperLink listens on {listen}, the data plane's hub on port {hub.port}; logs in {superlink.log.parent}",
        f"next, on each node:  edgelam client --server {listen} --data FILE   (an edge server: without --data)",
        f"then:                edgelam run RUN.toml --server {listen} --operator {operator}",
        f"for Flower's `flwr`:  export FLWR_HOME={operator}",
    ):
        console.print(line, highlight=False, soft_wrap=True)
    try:
        while not superlink.ended():
            shorten(superlink.log)
            time.sleep(0.5)
            if news := hub.watch():
                console.print(news, highlight=False, soft_wrap=True)
        raise RunFailed(superlink.ended())
    except KeyboardInterrupt:
        console.print("server ended; runs in progress end with it, their last checkpoints stay in their folders")
        return INTERRUPTED
