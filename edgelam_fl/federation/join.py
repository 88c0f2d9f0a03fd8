"""Runs `edgelam client`: this machine as a node, watched until Ctrl-C. Knows the node's processes, but no run."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from edgelam_fl.addresses import answers, check_plain_text, check_server_answers, split_address
from edgelam_fl.errors import INTERRUPTED, ConfigError
from edgelam_fl.federation.node_process import NodeProcesses
from edgelam_fl.names import why_no_name, why_no_tag
from edgelam_fl.tasks.files import read_records
from edgelam_fl.wire.relay import RELAY

_POLL_S = 0.25
_LONGEST_PAUSE_S = 30.0  # between two looks for a server


def join(
    console: Console,
    *,
    server: str,
    data: Path | None,
    name: str,
    listen: str,
    advertise: str,
    threads: int,
    state: Path | None,
    tags: Sequence[str],
    insecure: bool,
    wait: bool,
) -> int:
    """Checks the options, starts the node and watches it until Ctrl-C; returns the exit code.

    wait: wait for a server that does not answer yet, instead of refusing. Once it has answered, the node rejoins
    whenever the server comes back. Raises UsageError for what cannot be used, EnvironmentProblem if nobody answers.
    """
    host, port = split_address(server, "--server")
    check_plain_text(host, "--server", insecure)
    _check_data_plane(listen, advertise, insecure)
    name = name or socket.gethostname()
    if reason := why_no_name(name):
        raise ConfigError(f"--name {name!r} {reason}")
    for tag in tags:
        if reason := why_no_tag(tag):
            raise ConfigError(f"--tag {tag!r} {reason}")
    if data is not None:
        read_records(data)
    if wait:
        _await_server(console, host, port)
    else:
        check_server_answers(server, insecure)
    node = NodeProcesses(name, server, state or Path(".edgelam") / name, data, listen, advertise, threads, tags)
    return _watch(console, node)


def _check_data_plane(listen: str, advertise: str, insecure: bool) -> None:
    if listen and listen != RELAY:
        check_plain_text(split_address(listen, "--listen")[0], "--listen", insecure)
    if advertise and listen == RELAY:
        raise ConfigError(
            f"--listen {RELAY} means that nobody can dial this node, so it has no --advertise {advertise}"
        )
    if advertise:
        check_plain_text(split_address(advertise, "--advertise")[0], "--advertise", insecure)


def _await_server(console: Console, host: str, port: int) -> None:
    if answers(host, port):
        return
    console.print(f"no server answers at {host}:{port} yet; waiting for it", highlight=False, soft_wrap=True)
    pause_s = 1.0
    while not answers(host, port):
        time.sleep(pause_s)
        pause_s = min(_LONGEST_PAUSE_S, 1.5 * pause_s)


def _watch(console: Console, node: NodeProcesses) -> int:
    try:
        node.start()
        with console.status(f"{node.name}: loading PyTorch"):
            while not node.ready():
                time.sleep(_POLL_S)
        role = "device" if node.data else "edge server"
        console.print(
            f"{node.name} is here as {role}; logs in {node.state}. Ctrl-C ends it.", highlight=False, soft_wrap=True
        )
        while True:
            time.sleep(1.0)
            news = node.watch()
            if news:
                console.print(news, highlight=False, soft_wrap=True)
    except KeyboardInterrupt:
        console.print(f"{node.name} has left; a run in progress goes on without it")
        return INTERRUPTED
    finally:
        node.end()
