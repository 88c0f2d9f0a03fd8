"""Starts the processes of one node (stage host and SuperNode) and restarts those that end.

Knows their command lines and environments; knows neither runs nor what the processes compute.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgelam_fl.addresses import split_address
from edgelam_fl.errors import EnvironmentProblem
from edgelam_fl.federation.child import Child, Restarts, end_all, shorten
from edgelam_fl.federation.template import NODE_ENVIRONMENT


@dataclass
class NodeProcesses:
    """A node of the federation as processes: its stage host, and its SuperNode with the node's own ClientApp."""

    name: str
    server: str
    """HOST:PORT of the SuperLink."""
    state: Path
    """Folder for logs and for what the node keeps between runs."""
    data: Path | None = None
    """A device's examples; None: an edge server."""
    listen: str = ""
    """HOST:PORT of the data plane; "relay": reachable through the hub only; "": an edge server takes a free port, a
    device only dials."""
    advertise: str = ""
    """HOST:PORT of the data plane as other nodes see it; "": as `listen`."""
    threads: int = 0
    """CPU threads; 0: all."""
    tags: Sequence[str] = ()
    """Words by which a run may choose the node."""
    trust: str = ""
    """What a device's owner lets hosts read of its text, as split.trust; "": all."""
    forked: bool = False
    """Whether its processes are forked from a template: for several nodes of one machine."""
    identity: Path | None = None
    """Folder with the node's key and certificates; None: plain text."""
    insecure: bool = False
    """Whether plain text may leave this machine."""
    device: str = "cpu"
    """What its stage host computes on, as --device."""
    clock_offset_s: float | None = None
    """The server's time less the time since boot, for a machine whose clock is wrong; None: the clock is right."""
    eval_data: Path | None = None
    """The examples that a device measures with; None: a share of its data."""
    metrics: Sequence[str] = ()
    """Modules that a run may take metrics of its own from, and perhaps an absolute folder of such modules."""
    children: dict[str, Child] = field(default_factory=dict)
    """The processes by their kind, once started."""
    _restarts: defaultdict[str, Restarts] = field(
        default_factory=lambda: defaultdict(Restarts)
    )  # by the process's kind

    def start(self) -> None:
        """Starts all processes; the stage host serves once `ready` is true."""
        self.state.mkdir(parents=True, exist_ok=True)
        for start in self._starters().values():
            start()

    def _starters(self) -> dict[str, Callable[[], None]]:
        """Returns the function that starts each process, by the process's kind."""
        return {
            "stage host": self._start_stage_host,
            "SuperNode": self._start_supernode,
        }

    def _start_stage_host(self) -> None:
        (self.state / "endpoint.json").unlink(missing_ok=True)  # an older one's: whoever calls now waits for the new
        command = [sys.executable, "-m", "edgelam_fl.node.daemon", "--name", self.name, "--state", str(self.state)]
        command += ["--listen", self.listen, "--advertise", self.advertise, "--threads", str(self.threads)]
        command += ["--server", self.server, "--device", self.device]
        command += ["--data", str(self.data.absolute())] if self.data else []
        command += ["--eval-data", str(self.eval_data.absolute())] if self.eval_data else []
        command += [f"--metrics={module}" for module in self.metrics]
        command += [f"--tag={tag}" for tag in self.tags]
        command += ["--trust", self.trust] if self.trust else []
        command += ["--identity", str(self.identity)] if self.identity else []
        command += ["--insecure"] if self.insecure else []
        self._start_child("stage host", command, "stage-host.log")

    def _start_supernode(self) -> None:
        command = [sys.executable, "-m", "edgelam_fl.federation.supernode", "--server", self.server]
        command += ["--name", self.name, "--state", str(self.state)]
        command += ["--identity", str(self.identity)] if self.identity else []
        command += ["--clock-offset", str(self.clock_offset_s)] if self.clock_offset_s is not None else []
        self._start_child("SuperNode", command, "supernode.log")

    def _start_child(self, kind: str, command: Sequence[str], log: str) -> None:
        host, _ = split_address(self.server, "--server")
        self.children[kind] = Child(
            f"{self.name}'s {kind}", command, self.state / log, NODE_ENVIRONMENT, self.forked, [host]
        )

    def ready(self) -> bool:
        """Returns whether the stage host serves. Raises EnvironmentProblem if it has ended instead."""
        problem = self.children["stage host"].ended()
        if problem:
            raise EnvironmentProblem(problem)
        return (self.state / "endpoint.json").exists()

    def restart_stage_host(self) -> None:
        """Ends the stage host and starts it again, as after its certificate was renewed."""
        end_all([self.children["stage host"]])
        self._start_stage_host()

    def watch(self) -> str:
        """Restarts a process that has ended; returns what happened, empty if nothing. Raises RunFailed if one of them keeps ending."""
        for kind, child in self.children.items():
            shorten(child.log)
            problem = child.ended()
            if not problem:
                continue
            self._restarts[kind].note(problem)
            self._starters()[kind]()
            return f"{problem}; it was started again"
        return ""

    def end(self) -> None:
        """Ends all processes."""
        end_all(list(self.children.values()))
