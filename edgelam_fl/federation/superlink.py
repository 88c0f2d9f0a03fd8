"""Starts Flower's SuperLink on this machine."""

from __future__ import annotations

from pathlib import Path

from edgelam_fl.addresses import check_port_free
from edgelam_fl.federation.child import Child, _await_answer
from edgelam_fl.federation.hub_process import Hub

# ---------------------------------------------------------------- Flower's and ours


def start_superlink(
    host: str, port: int, state: Path, simulation: dict[str, str] | None = None, beside: Hub | None = None
) -> Child:
    """The SuperLink, answering. It starts the ServerApp of each run as a process of its own.

    simulation: and Flower's simulation engine with it, which plays the nodes, in this environment. beside: the hub.
    """
    check_port_free(host, port, "--listen")
    child = Child(
        "SuperLink",
        # The flag keeps it from running `uv sync`, which would fetch torch before each run.
        [
            "flower-superlink",
            "--insecure",
            "--host",
            host,
            "--port",
            str(port),
            "--disable-runtime-dependency-installation",
            *(["--simulation"] if simulation is not None else []),
        ],
        state / "superlink.log",
        {
            "FLWR_HOME": str(state / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            **(simulation or {}),
            **(beside.environment if beside else {}),
        },
    )
    _await_answer(child, host, port)
    return child
