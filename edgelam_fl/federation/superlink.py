"""Starts Flower's SuperLink on this machine. Knows its command line and its environment; knows no run and no node."""

from __future__ import annotations

import sys
from pathlib import Path

from edgelam_fl.addresses import check_port_free, from_here, join_address
from edgelam_fl.bounds import DEFAULT_BOUNDS, Bounds
from edgelam_fl.federation import QUEUE
from edgelam_fl.federation.child import Child, await_answer
from edgelam_fl.federation.hub_process import HubProcess
from edgelam_fl.federation.operator import operator_folder, prepare_operator
from edgelam_fl.names import CALLER
from edgelam_fl.trust.authority import issue
from edgelam_fl.trust.identity import DEVICE
from edgelam_fl.trust.members import MEMBERS
from edgelam_fl.trust.server import ServerTrust, trust_folder


def start_superlink(
    host: str,
    port: int,
    state: Path,
    simulation: dict[str, str] | None = None,
    beside: HubProcess | None = None,
    *,
    trust: ServerTrust | None = None,
    bounds: Bounds = DEFAULT_BOUNDS,
    keep: bool = False,
    allow_foreign_apps: bool = False,
) -> Child:
    """Starts a SuperLink and waits until it answers. It starts the ServerApp of each run as a process of its own.

    state: the folder for its log and Flower's files; the operator's folder is made in it. simulation: what to add to the
    environment of Flower's simulation engine, which then plays the nodes; None: nodes join from outside. beside: the hub that
    its ServerApps use. trust: of this state folder, for TLS and members alone; None: plain text, for everybody. bounds: what
    run files may name on this machine. keep: nodes and runs are kept in a file for the next start. allow_foreign_apps: runs may
    bring any App.

    Raises EnvironmentProblem if the port is taken or the process ends.
    """
    check_port_free(host, port, "--listen")
    operator = operator_folder(state)
    caller = issue(trust.authority, CALLER, DEVICE) if trust else None
    prepare_operator(operator, join_address(from_here(host), port), caller, bounds.runs)
    command = [sys.executable, "-m", "edgelam_fl.federation.superlink_daemon", "--host", host, "--port", str(port)]
    command += ["--state", str(state), "--operator", str(operator)]
    command += ["--database", str(state / "superlink.db")] if keep else []
    command += ["--members-only"] if trust else []
    command += ["--simulation"] if simulation is not None else []
    command += ["--allow-foreign-apps"] if allow_foreign_apps else []
    environment = {"FLWR_HOME": str(state / "flwr"), QUEUE: str((state / "queue").absolute()), **(simulation or {})}
    environment |= bounds.environment() | (beside.environment if beside else {})
    environment |= {MEMBERS: str(trust_folder(state).absolute())} if trust else {}
    child = Child("SuperLink", command, state / "superlink.log", environment)
    await_answer(child, host, port)
    return child
