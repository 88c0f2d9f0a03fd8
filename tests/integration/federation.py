"""A whole federation on this machine for tests: SuperLink, one edge server, three devices, and taps before both planes.

All of it speaks TLS. Each plane has two taps in a row: what passes on the wire, and what is in it.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar
from unittest.mock import patch

from edgelam_fl.addresses import free_port
from edgelam_fl.bounds import Bounds
from edgelam_fl.config import RunConfig, parse_run_file
from edgelam_fl.errors import EnvironmentProblem, RunFailed
from edgelam_fl.federation.child import Child, end_all, log_tail
from edgelam_fl.federation.environment import child_environment
from edgelam_fl.federation.hub_process import HubProcess
from edgelam_fl.federation.local import let_in
from edgelam_fl.federation.node_process import NodeProcesses
from edgelam_fl.federation.operator import Operator, operator_folder
from edgelam_fl.federation.submission import Submission, run_events
from edgelam_fl.federation.superlink import start_superlink
from edgelam_fl.federation.template import warm_template
from edgelam_fl.telemetry.events import Event, RunDone, of_kind
from edgelam_fl.telemetry.summary import DeviceSummary, Summary, read_summary
from edgelam_fl.trust.server import ServerTrust, prepare_trust, trust_folder
from tests.flower_api import state_of_run
from tests.integration.proxy import Connection, CountingProxy, DecryptingProxy
from tests.support import WAIT_S

# Far beyond what any of it takes: a slow machine is no failure, and what hangs ends.
START_DEADLINE_S = 300.0
_POLL_S = 0.2
DEAD_PROXY = {"http_proxy": "http://127.0.0.1:9"}  # what the processes say to each other must go around it
_Kind = TypeVar("_Kind", bound=Event)


@dataclass
class Run:
    """What a run left."""

    path: Path
    events: list[Event]
    links: dict[str, list[Connection]]  # of each device, its connections to the edge server's data plane

    @property
    def summary(self) -> Summary:
        return read_summary(self.path / "summary.json")

    def device(self, name: str) -> DeviceSummary:
        return next(device for device in self.summary.devices if device.name == name)

    def of_kind(self, kind: type[_Kind]) -> list[_Kind]:
        return list(of_kind(self.events, kind))


@dataclass
class Federation:
    folder: Path
    data: dict[str, Path]
    nodes: dict[str, NodeProcesses] = field(default_factory=dict)
    children: list[Child] = field(default_factory=list)
    server: str = ""
    data_plane: DecryptingProxy | None = None
    trust: ServerTrust | None = None
    hub: HubProcess | None = None
    control_plane: DecryptingProxy | None = None  # between the devices and the SuperLink
    wires: list[CountingProxy] = field(default_factory=list)
    """What is on the wire of both planes."""

    @property
    def server_models(self) -> Path:
        """A hub's cache that the server has and no node."""
        return self.folder / "server-models"

    @property
    def operator(self) -> Operator:
        return Operator(self.server, operator_folder(self.folder / "server"))

    # ---------------------------------------------------------------- its life

    def start(self) -> None:
        warm_template()
        port = free_port()
        self.server = f"127.0.0.1:{port}"
        trust = self.trust = prepare_trust(self.folder / "server", "127.0.0.1", port)
        listen = f"127.0.0.1:{free_port()}"
        for name, file in [("edge-1", None), *self.data.items()]:
            node = NodeProcesses(name, self.server, self.folder / "nodes" / name, data=file, threads=1, forked=True)
            self.nodes[name] = node
            let_in(trust, node)
        identities = {"server": trust.identity, **{name: node.identity for name, node in self.nodes.items()}}
        self.data_plane = DecryptingProxy(listen, "edge-1", identities)
        self.control_plane = DecryptingProxy(self.server, "server", identities)
        self.wires = [CountingProxy(self.data_plane.address), CountingProxy(self.control_plane.address)]
        self.nodes["edge-1"].listen, self.nodes["edge-1"].advertise = listen, self.wires[0].address
        for name in self.data:
            self.nodes[name].server = self.wires[1].address
        hub = HubProcess(
            "127.0.0.1",
            free_port(),
            self.folder / "hub",
            identity=trust.identity,
            members=trust_folder(self.folder / "server"),
        )
        hub.start()
        self.hub = hub
        assert hub.child is not None
        self.children.append(hub.child)
        with patch.dict(os.environ, {"HF_HUB_CACHE": str(self.server_models), **DEAD_PROXY}):
            bounds = Bounds(packages=("examples",), runs=self.folder / "runs")
            self.children.append(
                start_superlink(
                    "127.0.0.1", port, self.folder / "server", beside=hub, trust=trust, bounds=bounds, keep=True
                )
            )
        with patch.dict(os.environ, DEAD_PROXY):
            for node in self.nodes.values():
                node.start()
        self.wait_for(lambda: all(node.ready() for node in self.nodes.values()), START_DEADLINE_S, "the nodes")

    @property
    def superlink(self) -> Child:
        return self.children[-1]

    def restart_superlink(self) -> None:
        """As `edgelam server` does."""
        self.wait_for(lambda: bool(self.superlink.ended()), START_DEADLINE_S, "the SuperLink's end")
        self.children[-1] = self.superlink.again()

    def stop(self) -> None:
        end_all([*self.children, *(child for node in self.nodes.values() for child in node.children.values())])
        for wire in self.wires:
            wire.close()
        for tap in (self.data_plane, self.control_plane):
            if tap is not None:
                tap.close()

    def wait_for(self, done: Callable[[], bool], deadline_s: float, what: str) -> None:
        """Raises with the end of every log when `done` stays false."""
        end = time.monotonic() + deadline_s
        try:
            while not done():
                if time.monotonic() > end:
                    raise TimeoutError(f"waited {deadline_s:.0f} s for {what}")
                time.sleep(_POLL_S)
        except (TimeoutError, EnvironmentProblem, RunFailed) as error:
            error.add_note(self.logs())
            raise

    def logs(self) -> str:
        every = sorted(self.folder.rglob("*.log")) + sorted(self.folder.rglob("*/events.jsonl"))
        return "\n".join(f"{file.relative_to(self.folder)}: {log_tail(file, 6)}" for file in every)

    # ---------------------------------------------------------------- its runs

    def run(self, name: str, config: RunConfig, meanwhile: Callable[[], object] = lambda: None) -> Run:
        """One run, from submission to the end of its ServerApp. `meanwhile` is called every `_POLL_S` seconds."""
        submission = Submission(self.operator)

        def submit(out: Path) -> int:
            with patch.dict(os.environ, DEAD_PROXY):
                return submission.submit(config, out)

        try:
            return self.follow(name, submit, meanwhile)
        except RunFailed as error:
            error.add_note(f"Flower's log: {submission.log()}")
            raise

    def follow(self, name: str, submit: Callable[[Path], int], meanwhile: Callable[[], object] = lambda: None) -> Run:
        """Follows a run that `submit` starts in the folder that it is given; it returns Flower's id of the run."""
        assert self.data_plane is not None
        out, known = self.folder / "runs" / name, len(self.data_plane.connections)
        status = partial(state_of_run, self.operator, submit(out))
        try:
            events = list(run_events(out / "events.jsonl", status, WAIT_S, meanwhile=meanwhile))
        except (EnvironmentProblem, RunFailed) as error:
            error.add_note(self.logs())
            raise
        assert isinstance(events[-1], RunDone), f"{events[-1]}\n{self.logs()}"
        self.wait_for(lambda: (out / "report.html").exists(), WAIT_S, "the report")
        self.wait_for(lambda: status() == "finished:completed", WAIT_S, f"Flower to close run {name}")
        return Run(out, events, by_device(self.data_plane.connections[known:], list(self.data)))

    def flwr(self, *arguments: str, expect: int = 0) -> str:
        """Flower's own command, as the operator types it in the repository."""
        home = {"FLWR_HOME": str(self.operator.folder)}
        environment = {**child_environment(), **home, "COLUMNS": "200"}
        repository = Path(__file__).parents[2]
        done = subprocess.run(
            ["flwr", *arguments], cwd=repository, env=environment, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=WAIT_S, check=False,
        )  # fmt: skip
        assert done.returncode == expect, f"flwr {' '.join(arguments)}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr


def by_device(connections: Sequence[Connection], names: Sequence[str]) -> dict[str, list[Connection]]:
    """Who dialled, by the certificate that was shown."""
    return {name: [connection for connection in connections if connection.peer == name] for name in names}


def config_of(model: str, *overrides: str) -> RunConfig:
    return parse_run_file("", source="test", overrides=[*small_settings(model), *overrides])


def small_settings(model: str) -> list[str]:
    """Two rounds of three steps, small enough for a test; two rows a piece, so that there is padding."""
    return [
        f"model.name={model}", "federation.rounds=2", "federation.local_steps=3", "federation.batch_size=4",
        "federation.min_nodes=3", "task.max_tokens=96", "data.held_out=0.25", "optimizer.lr=0.01",
    ]  # fmt: skip


def kill(child: Child) -> None:
    """kill -9 of one process that this federation started."""
    with suppress(ProcessLookupError):
        os.kill(child.pid, 9)
