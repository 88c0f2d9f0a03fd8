"""Starts the hub, the server's end of the data plane, as a process and restarts it if it ends.

Knows its command line and its environment; what it does is in edgelam_fl.hub.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from edgelam_fl import hub
from edgelam_fl.addresses import check_port_free, join_address
from edgelam_fl.federation.child import Child, Restarts, await_answer, shorten
from edgelam_fl.federation.template import GRPC_LOG
from edgelam_fl.hub import OFFERS


@dataclass
class HubProcess:
    """The hub of one server: a process beside the SuperLink."""

    host: str
    port: int
    state: Path
    identity: Path | None = None
    """Folder with the server's keys; None: plain text."""
    members: Path | None = None
    """Folder with the server's book of members, for which of them have left; None: none leaves."""
    insecure: bool = False
    """Whether plain text may leave this machine."""
    child: Child | None = None
    _restarts: Restarts = field(default_factory=Restarts)

    @property
    def environment(self) -> dict[str, str]:
        """Returns the environment by which a ServerApp finds the hub; its SuperLink passes it on."""
        return {hub.PORT: str(self.port), hub.STATE: str(self.state.absolute())}

    def start(self) -> None:
        """Starts the hub and waits until it answers. Raises EnvironmentProblem if its port is taken or it ends."""
        self.begin()
        self.await_start()

    def begin(self) -> None:
        """Starts the hub, which needs seconds until it answers. Raises EnvironmentProblem if its port is taken."""
        check_port_free(self.host, self.port, "--data-plane")
        # What runs of an earlier server offered. The key of its tokens stays: nodes that still play for a run are to hear that the
        # run goes on without their part.
        shutil.rmtree(self.state / OFFERS, ignore_errors=True)
        self._start()

    def await_start(self) -> None:
        """Waits until the hub answers. Raises EnvironmentProblem if it has ended instead."""
        assert self.child is not None
        await_answer(self.child, self.host, self.port)

    def _start(self) -> Child:
        command = [sys.executable, "-m", "edgelam_fl.hub.daemon", "--listen", join_address(self.host, self.port)]
        command += ["--state", str(self.state)]
        command += ["--identity", str(self.identity)] if self.identity else []
        command += ["--members", str(self.members)] if self.members else []
        command += ["--insecure"] if self.insecure else []
        self.child = Child("hub", command, self.state.parent / "hub.log", GRPC_LOG)
        return self.child

    def watch(self) -> str:
        """Restarts the hub if it has ended; returns what happened, empty if nothing. Raises RunFailed if it keeps ending.

        Keeps its log short: everybody who knocks at the port makes it longer.
        """
        if self.child is not None:
            shorten(self.child.log)
        problem = self.child.ended() if self.child else ""
        if not problem:
            return ""
        self._restarts.note(problem)
        self._start()
        return f"{problem}; it was started again"
