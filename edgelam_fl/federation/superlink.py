"""Starts Flower's SuperLink on this machine. Knows its command line and its environment; knows no run and no node."""

from __future__ import annotations

from pathlib import Path

from edgelam_fl.addresses import check_port_free
from edgelam_fl.federation.child import Child, await_answer
from edgelam_fl.federation.hub_process import HubProcess


def start_superlink(
    host: str, port: int, state: Path, simulation: dict[str, str] | None = None, beside: HubProcess | None = None
) -> Child:
    """Starts a SuperLink and waits until it answers. It starts the ServerApp of each run as a process of its own.

    state: the folder for its log and Flower's files. simulation: what to add to the environment of Flower's simulation
    engine, which then plays the nodes; None: nodes join from outside. beside: the hub that its ServerApps use.

    Raises EnvironmentProblem if the port is taken or the process ends.
    """
    check_port_free(host, port, "--listen")
    # The last flag keeps it from running `uv sync`, which would fetch torch before each run.
    command = ["flower-superlink", "--insecure", "--host", host, "--port", str(port)]
    command += ["--disable-runtime-dependency-installation"]
    command += ["--simulation"] if simulation is not None else []
    environment = {"FLWR_HOME": str(state / "flwr"), "FLWR_TELEMETRY_ENABLED": "0", **(simulation or {})}
    environment |= beside.environment if beside else {}
    child = Child("SuperLink", command, state / "superlink.log", environment)
    await_answer(child, host, port)
    return child
