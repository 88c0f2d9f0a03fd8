"""A node's ClientApps, forked from a process that has imported them already (`python -m edgelam_fl.federation.clientapps`).

Flower's SuperExec starts the command `flwr-clientapp` anew for every message. Its imports can take a small board most of the half
minute after which Flower holds the start for lost, and every node of a round waits for them. SuperExec finds the command on
PATH: `prepare` makes one that hands its arguments over to this process, which forks for each. The fork is Flower's own code.
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
_BETWEEN = "\x1f"  # arguments of one line


def folder(state: Path) -> Path:
    """Where a node's command is, which its PATH must begin with."""
    return state / "clientapps"


def prepare(state: Path) -> Path:
    """Makes the command in the node's state folder, and the FIFO that it writes to; returns that."""
    place = folder(state)
    place.mkdir(parents=True, exist_ok=True)
    requests = place / "requests"
    if not requests.is_fifo():  # else one of these commands may be waiting for it
        os.mkfifo(requests, 0o600)
    command = place / COMMAND
    # One write of less than PIPE_BUF bytes: lines of several do not mix. It waits for a reader, as when that one starts again.
    command.write_text(
        f"#!/bin/sh\nIFS=$(printf '\\037')\nprintf '%s\\n' \"$*\" > {shlex.quote(str(requests))}\n",
        encoding="utf-8",
    )
    command.chmod(0o700)
    return requests


def main() -> None:
    """Forks a ClientApp for each line of arguments. Its own are the FIFO, and the folder of the Flower App."""
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
    """Forks for each line; returns its arguments there, and never here."""
    # Open for writing too, or it would end with the first who has written.
    with os.fdopen(os.open(fifo, os.O_RDWR), encoding="utf-8") as requests:
        while True:
            line = requests.readline().rstrip("\n")
            if os.fork() == 0:
                return line.split(_BETWEEN)


if __name__ == "__main__":
    main()
