"""Starts and watches the processes of one node: its stage host, its SuperNode and its ClientApps."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgelam_fl.addresses import free_port
from edgelam_fl.errors import EnvironmentProblem
from edgelam_fl.federation import clientapps
from edgelam_fl.federation.child import Child, _note_restart, shorten, tool_environment
from edgelam_fl.federation.flower_app import app_folder


@dataclass
class Node:
    """A node of the federation: its stage host, its SuperNode, and what this one's ClientApps are forked from."""

    name: str
    server: str  # host:port of the SuperLink
    state: Path
    data: Path | None = None
    listen: str = ""  # host:port of the data plane; 'relay': only through the hub; '': an edge server takes a free one, a device only dials
    advertise: str = ""
    threads: int = 0
    tags: Sequence[str] = ()  # words by which runs may choose it
    children: dict[str, Child] = field(default_factory=dict)
    _restarts: list[float] = field(default_factory=list)

    def start(self) -> None:
        """Starts all three. `ready` tells when the stage host serves."""
        self.state.mkdir(parents=True, exist_ok=True)
        for start in self._starters().values():
            start()

    def _starters(self) -> dict[str, Callable[[], None]]:
        """By the child's kind."""
        return {
            "stage host": self._start_stage_host,
            "ClientApps": self._start_clientapps,
            "SuperNode": self._start_supernode,
        }

    def _start_stage_host(self) -> None:
        (self.state / "endpoint.json").unlink(missing_ok=True)  # an older one's: whoever calls now waits for the new
        command = [sys.executable, "-m", "edgelam_fl.node.daemon", "--name", self.name, "--state", str(self.state)]
        command += ["--listen", self.listen, "--advertise", self.advertise, "--threads", str(self.threads)]
        command += ["--server", self.server]
        command += ["--data", str(self.data.absolute())] if self.data else []
        command += [f"--tag={tag}" for tag in self.tags]
        # Nodes may share this machine's cores: a thread that spins while it waits takes them from the others.
        # One arena for all threads: what one frees, another can use (the links' threads bring in what compute frees).
        environment = {"OMP_WAIT_POLICY": "PASSIVE", "MALLOC_ARENA_MAX": "1"}
        self.children["stage host"] = Child(
            f"{self.name}'s stage host", command, self.state / "stage-host.log", environment
        )

    def _start_clientapps(self) -> None:
        fifo = clientapps.prepare(self.state.absolute())
        command = [sys.executable, "-m", clientapps.__name__, str(fifo), str(app_folder())]
        self.children["ClientApps"] = Child(
            f"{self.name}'s ClientApps", command, self.state / "clientapps.log", self._for_flower()
        )

    def _start_supernode(self) -> None:
        command = ["flower-supernode", "--insecure", "--superlink", self.server, "--port", str(free_port())]
        command += ["--node-config", f'state="{self.state.absolute()}" name="{self.name}"']
        self.children["SuperNode"] = Child(
            f"{self.name}'s SuperNode", command, self.state / "supernode.log", self._for_flower()
        )

    def _for_flower(self) -> dict[str, str]:
        path = f"{clientapps.folder(self.state.absolute())}{os.pathsep}{tool_environment()['PATH']}"
        return {"FLWR_HOME": str(self.state / "flwr"), "FLWR_TELEMETRY_ENABLED": "0", "PATH": path}

    def ready(self) -> bool:
        """Whether the stage host serves. Raises EnvironmentProblem when it ended instead."""
        problem = self.children["stage host"].ended()
        if problem:
            raise EnvironmentProblem(problem)
        return (self.state / "endpoint.json").exists()

    def watch(self) -> str:
        """Starts again what has ended; returns what happened, if anything. Raises RunFailed when it keeps ending."""
        for kind, child in self.children.items():
            shorten(child.log)
            problem = child.ended()
            if not problem:
                continue
            _note_restart(self._restarts, problem)
            self._starters()[kind]()
            return f"{problem}; it was started again"
        return ""
