"""Runs `edgelam client`: this machine as a node, watched until Ctrl-C."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from edgelam_fl.addresses import answers, check_plain_text, split_address
from edgelam_fl.errors import ConfigError
from edgelam_fl.federation.child import end_all
from edgelam_fl.federation.local import POLL_S
from edgelam_fl.federation.node_process import Node
from edgelam_fl.federation.runs import _NAME, INTERRUPTED, _check_answers
from edgelam_fl.tasks.files import read_records
from edgelam_fl.wire.relay import RELAY

_LONGEST_PAUSE_S = 30.0  # between two looks for a server


def join(
    console: Console,
    server: str,
    data: Path | None,
    name: str,
    listen: str,
    advertise: str,
    threads: int,
    state: Path | None,
    tags: Sequence[str],
    insecure: bool,
    wait: bool = False,
) -> int:
    """`wait`: until the server answers, instead of refusing. Once it has answered, the node rejoins whenever it comes back."""
    host, port = split_address(server, "--server")
    check_plain_text(host, "--server", insecure)
    if listen and listen != RELAY:
        check_plain_text(split_address(listen, "--listen")[0], "--listen", insecure)
    if advertise and listen == RELAY:
        raise ConfigError(
            f"--listen {RELAY} means that nobody can dial this node, so it has no --advertise {advertise}"
        )
    if advertise:
        check_plain_text(split_address(advertise, "--advertise")[0], "--advertise", insecure)
    name = name or socket.gethostname()
    if not re.fullmatch(_NAME, name):
        raise ConfigError(f"--name {name!r} may hold letters, digits, '.', '_' and '-', 63 at most")
    for tag in tags:
        if not re.fullmatch(_NAME, tag):
            raise ConfigError(f"--tag {tag!r} may hold letters, digits, '.', '_' and '-', 63 at most")
    if data is not None:
        read_records(data)
    if wait:
        _await_answer(console, host, port)
    else:
        _check_answers(host, port, "edgelam client")
    node = Node(name, server, state or Path(".edgelam") / name, data, listen, advertise, threads, tags)
    return _watch(console, node)


def _watch(console: Console, node: Node) -> int:
    try:
        node.start()
        with console.status(f"{node.name}: loading PyTorch"):
            while not node.ready():
                time.sleep(POLL_S)
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
        end_all(list(node.children.values()))


def _await_answer(console: Console, host: str, port: int) -> None:
    if answers(host, port):
        return
    console.print(f"no server answers at {host}:{port} yet; waiting for it", highlight=False, soft_wrap=True)
    pause_s = 1.0
    while not answers(host, port):
        time.sleep(pause_s)
        pause_s = min(_LONGEST_PAUSE_S, 1.5 * pause_s)
