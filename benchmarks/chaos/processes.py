"""Finds a federation's processes by a mark in their environment, and says which one each is. Knows command lines alone."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MARK = "EDGELAM_CHAOS"
_MODULES = {
    "edgelam_fl.node.daemon": "stage",
    "edgelam_fl.federation.supernode": "supernode",
    "edgelam_fl.hub.daemon": "hub",
    "edgelam_fl.federation.superlink_daemon": "superlink",
    "edgelam_fl.federation.task_process": "serverapp",
}


@dataclass(frozen=True)
class Process:
    """One process. `kind`: stage, supernode, client, hub, superlink, serverapp, server, run, or the command; `node`: its name, if any."""

    pid: int
    kind: str
    node: str = ""

    def __str__(self) -> str:
        return f"{self.node}'s {self.kind}" if self.node else self.kind

    def signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)


def processes(mark: str) -> list[Process]:
    """Lists the living processes that carry the mark."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        folder = Path("/proc", entry)
        with suppress(OSError, IndexError):
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                state = (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
                words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
                if state != "Z":
                    found.append(_named(int(entry), words))
    return found


def _named(pid: int, words: list[str]) -> Process:
    for module, kind in _MODULES.items():
        if module in words:
            return Process(pid, kind, words[words.index("--name") + 1] if "--name" in words else "")
    command = " ".join(words)
    if asked := re.search(r"/edgelam (client|server|run) ", command):
        state = re.search(r"--state \S*/nodes/([\w-]+)", command)
        return Process(pid, asked[1], state[1] if state else "")
    return Process(pid, command[:80])


def listening(pids: Iterable[int]) -> list[str]:
    """Returns the addresses at which these processes listen."""
    done = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=False)
    known = set(pids)
    lines = ((line.split(), re.search(r"pid=(\d+)", line)) for line in done.stdout.splitlines())
    return sorted(fields[3] for fields, pid in lines if pid and int(pid[1]) in known)
