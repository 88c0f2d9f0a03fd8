"""Runs `edgelam server`: Flower's SuperLink and the hub, watched until Ctrl-C."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from edgelam_fl.addresses import check_plain_text, check_port_free, hub_address, split_address
from edgelam_fl.errors import RunFailed
from edgelam_fl.federation.child import Child, end_all, shorten
from edgelam_fl.federation.hub_process import Hub
from edgelam_fl.federation.runs import INTERRUPTED
from edgelam_fl.federation.superlink import start_superlink

# ---------------------------------------------------------------- a server, a node


def serve(console: Console, listen: str, data_plane: str, state: Path, insecure: bool) -> int:
    host, port = split_address(listen, "--listen")
    check_plain_text(host, "--listen", insecure)
    hub = Hub(*hub_address(host, port, data_plane), state / "hub")
    check_plain_text(hub.host, "--data-plane", insecure)
    superlink = None
    try:
        with console.status("starting Flower's SuperLink"):
            check_port_free(host, port, "--listen")
            hub.start()
            superlink = start_superlink(host, port, state, beside=hub)
        return _watch_server(console, listen, hub, superlink)
    finally:
        end_all([child for child in (superlink, hub.child) if child is not None])


def _watch_server(console: Console, listen: str, hub: Hub, superlink: Child) -> int:
    console.print(
        f"SuperLink listens on {listen}, the data plane's hub on port {hub.port}; logs in {superlink.log.parent}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(
        f"next, on each node:  edgelam client --server {listen} --data FILE   (an edge server: without --data)",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"then:                edgelam run RUN.toml --server {listen}", highlight=False, soft_wrap=True)
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
