"""Starts and watches the hub's process, the server's end of the data plane."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from edgelam_fl import hub
from edgelam_fl.addresses import check_port_free, join_address
from edgelam_fl.federation.child import Child, _await_answer, _note_restart


@dataclass
class Hub:
    """The server's end of the data plane (edgelam_fl.hub): a process beside the SuperLink."""

    host: str
    port: int
    state: Path
    child: Child | None = None
    _restarts: list[float] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """What a SuperLink hands on to its ServerApps, so that they find the hub."""
        return {hub.PORT: str(self.port), hub.STATE: str(self.state.absolute())}

    def start(self) -> None:
        """Starts it, answering."""
        check_port_free(self.host, self.port, "--data-plane")
        shutil.rmtree(self.state, ignore_errors=True)  # what runs of an earlier server let it do
        self._start()
        assert self.child is not None
        _await_answer(self.child, self.host, self.port)

    def _start(self) -> None:
        command = [sys.executable, "-m", "edgelam_fl.hub.daemon", "--listen", join_address(self.host, self.port)]
        command += ["--state", str(self.state)]
        self.child = Child("hub", command, self.state.parent / "hub.log")

    def watch(self) -> str:
        """Starts it again where it has ended; returns what happened, if anything. Raises RunFailed when it keeps ending."""
        problem = self.child.ended() if self.child else ""
        if not problem:
            return ""
        _note_restart(self._restarts, problem)
        self._start()
        return f"{problem}; it was started again"
