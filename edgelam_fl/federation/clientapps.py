"""Forks a node's ClientApps from a process with their imports already done (`python -m edgelam_fl.federation.clientapps`).

Flower's SuperExec starts the command `flwr-clientapp` for every message. Its imports can take a small board most of the half
minute after which Flower gives the start up, and every node of a round waits for them. SuperExec finds the command on PATH:
`prepare` makes one that passes its arguments to this process, which forks for each. The fork runs Flower's own code. Knows
neither the messages nor what a ClientApp does with them.
"""

from __future__ import annotations

import gc
import os
import shlex
import signal
import sys
from pathlib import Path

from edgelam_fl.federation.flower_app import preload_clientapp
from edgelam_fl.flower import flower_clientapp

COMMAND = "flwr-clientapp"
_BETWEEN = "\x1f"  # separates the arguments of one line


def folder(state: Path) -> Path:
    """Returns the folder of a node's own `flwr-clientapp`, with which the node's PATH must begin."""
    return state / "clientapps"


def prepare(state: Path) -> Path:
    """Makes the command in the node's state folder; returns the FIFO that the command writes its arguments to."""
    place = folder(state)
    place.mkdir(parents=True, exist_ok=True)
    requests = place / "requests"
    if not requests.is_fifo():  # else one of these commands may be waiting for it
        os.mkfifo(requests, 0o600)
    command = place / COMMAND
    # One write of less than PIPE_BUF bytes: lines of several commands do not mix. It waits for a reader, also for a restarted one.
    command.write_text(
        f"#!/bin/sh\nIFS=$(printf '\\037')\nprintf '%s\\n' \"$*\" > {shlex.quote(str(requests))}\n",
        encoding="utf-8",
    )
    command.chmod(0o700)
    return requests


def main() -> None:
    """Forks a ClientApp for each line of arguments. Its own two are the FIFO and the folder of the Flower App."""
    fifo, app = sys.argv[1:]
    run = flower_clientapp()
    preload_clientapp(app)
    gc.collect()
    gc.freeze()  # its pages stay shared
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    sys.argv = [COMMAND, *_forked(fifo)]
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    run()


def _forked(fifo: str) -> list[str]:
    """Forks for each line; returns its arguments in the child, and never in the parent."""
    # Open for writing too: else the first writer that closes it would end the loop.
    with os.fdopen(os.open(fifo, os.O_RDWR), encoding="utf-8") as requests:
        while True:
            line = requests.readline().rstrip("\n")
            if os.fork() == 0:
                return line.split(_BETWEEN)


if __name__ == "__main__":
    main()
