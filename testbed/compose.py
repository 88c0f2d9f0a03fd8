"""Makes the Compose file of a testbed, for docker-compose 1.27 and later and for `docker compose`. Starts nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from testbed.shapes import SERVER, MachineShape, Testbed, TestbedNode

SERVER_ADDRESS = f"{SERVER}:8000"
RUNS = "/runs"  # in the server's container, where the ServerApp writes
STATE = "/state"  # in every container
_DATA_PLANE = 9000
_DATA = "/data/examples.jsonl"
# The kernel keeps a CPU limit by pausing processes once per period. With 100 ms, the period behind Compose's `cpus`, a slow
# machine would be a fast one with long pauses, and a short task would meet none of them.
_TURN_US = 20_000
_THREADS = 1  # torch's threads: a second one gains nothing in a container that has a part of a core


def compose_file(
    testbed: Testbed,
    data: Mapping[str, Path],
    image: str,
    mounts: Mapping[str, str] = MappingProxyType({}),
    *,
    server_alone: bool = False,
) -> dict[str, Any]:
    """Returns the content of the Compose file.

    `data`: file of examples per device. `mounts`: path inside the containers per folder that they may read.
    `server_alone`: only the server's container gets the mounts.
    """
    shared = [f"{folder}:{inside}:ro" for folder, inside in mounts.items()]
    server = _service(SERVER, testbed.shapes[testbed.server], image, _serve())
    services = {SERVER: server | {"healthcheck": {"interval": "3s", "retries": 100}}}  # all others wait for it
    for node in testbed.nodes:
        service = _service(node.name, testbed.shape_of(node), image, _join(node))
        service["depends_on"] = {SERVER: {"condition": "service_healthy"}}
        if node.role == "device":
            service["volumes"] = [f"{data[node.name].absolute()}:{_DATA}:ro"]
        services[node.name] = service
    for name, service in services.items() if shared else ():
        if name == SERVER or not server_alone:
            service["volumes"] = [*service.get("volumes", []), *shared]
    return {"services": services, "networks": {"plane": {}}}


def write_compose_file(file: Path, content: Mapping[str, Any]) -> Path:
    """Writes the content as JSON, which is valid YAML, and returns the file."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return file


def join_variable(name: str) -> str:
    """Returns the environment variable from which Compose takes the text with which a node joins."""
    return f"JOIN_{name.upper().replace('-', '_')}"


def _serve() -> list[str]:
    return [
        "edgelam",
        "server",
        "--listen",
        "0.0.0.0:8000",
        "--address",
        SERVER,
        "--state",
        STATE,
        "--runs",
        RUNS,
        "--models",
        "/models",
    ]


def _join(node: TestbedNode) -> list[str]:
    # Empty until the server, which starts first, has made the invites.
    command = ["edgelam", "client", "--join", f"${{{join_variable(node.name)}:-}}", "--state", STATE]
    command += ["--threads", str(_THREADS)]
    if node.role == "device":
        return [*command, "--data", _DATA]
    return [*command, "--listen", f"0.0.0.0:{_DATA_PLANE}", "--advertise", f"{node.name}:{_DATA_PLANE}"]


def _service(name: str, shape: MachineShape, image: str, command: list[str]) -> dict[str, Any]:
    service = {
        "image": image,
        "hostname": name,
        "command": command,
        "init": True,
        "networks": ["plane"],
        "mem_limit": shape.memory_bytes,
        "memswap_limit": shape.memory_bytes,  # limit of memory plus swap: no swap
        "environment": {"OMP_NUM_THREADS": str(_THREADS), "COLUMNS": "100"},
    }
    service |= {f"cpu_{name}": microseconds for name, microseconds in cpu_limit(shape.cpus).items()}
    return service | (_shaped(shape, service["environment"]) if shape.up or shape.down or shape.delay_ms else {})


def cpu_limit(cpus: float) -> dict[str, int]:
    """Returns the period and the quota, in microseconds: a container computes for `quota` in each `period`."""
    return {"period": _TURN_US, "quota": round(cpus * _TURN_US)}


def _shaped(shape: MachineShape, environment: Any) -> dict[str, Any]:
    """Returns the settings of a container with a limited link: root sets the limits, then drops all rights (entry.sh)."""
    limits = {
        "EDGELAM_UP_KBIT": str(shape.up_kbit or ""),
        "EDGELAM_DOWN_KBIT": str(shape.down_kbit or ""),
        "EDGELAM_DELAY_MS": str(shape.delay_ms),
    }
    return {"user": "root", "cap_add": ["NET_ADMIN"], "environment": {**environment, **limits}}
