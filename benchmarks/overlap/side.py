"""One side of benchmarks.overlap: stage hosts in processes of their own, or transformers and peft alone. Runs with this code or an
earlier checkout's, so it uses what both have.

`python side.py SETTINGS` with a JSON object: folder, model, overrides, files, host_threads, workers (0: as the code decides),
plain (1: whole batches; 2: in the devices' pieces; absent: stage hosts). Each line on stdin is a number of steps; each line on stdout
the JSON object of what they took.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TICK = os.sysconf("SC_CLK_TCK")
ONE_WORKER = "import edgelam_fl.split.workers as w; w.workers_of = lambda *_: {workers}; "
START_S = 300.0


def main() -> None:
    settings = json.loads(sys.argv[1])
    run, close = plain(settings) if settings.get("plain") else stage_hosts(settings)
    try:
        for line in sys.stdin:
            print(json.dumps(run(int(line))), flush=True)
    finally:
        close()


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def peak_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def configured(settings: dict[str, Any]) -> Any:
    from edgelam_fl.config import parse_run_file

    overrides = [f"model.name={settings['model']}", *settings["overrides"]]
    return parse_run_file("", source="overlap", overrides=overrides)


# ---------------------------------------------------------------- stage hosts


def stage_hosts(settings: dict[str, Any]) -> tuple[Callable[[int], dict[str, Any]], Callable[[], None]]:
    """Starts an edge server and a device per file; returns what trains a number of steps over them, and what ends them."""
    from edgelam_fl.model.adapter import initial_adapter
    from edgelam_fl.model.source import find_model

    try:
        from tests.fleet import Fleet, check_done

        daemon = "edgelam_fl.node.daemon"
    except ImportError:
        from tests.support import Fleet, check_done  # type: ignore[attr-defined, no-redef]

        daemon = "edgelam_fl.split.daemon"
    config, source = configured(settings), find_model(settings["model"])
    nodes = {"edge-1": Node(settings, daemon, "edge-1", settings["host_threads"])}
    for number, file in enumerate(settings["files"], 1):
        nodes[f"device-{number}"] = Node(settings, daemon, f"device-{number}", 1, file)
    devices = {name: node for name, node in nodes.items() if node.file}
    fleet = Fleet(source, config, dict(devices), {"edge-1": (nodes["edge-1"], nodes["edge-1"].address())}, "overlap")
    start, done = initial_adapter(source, config.lora.targets, config.lora.rank, config.run.seed), [0]

    def run(steps: int) -> dict[str, Any]:
        before = {name: cpu_s(node.child.pid) for name, node in nodes.items()}
        reports = fleet.run(start, steps, step_offset=done[0])
        check_done(reports)
        done[0] += steps
        own = [reports[name] for name in devices]
        return {
            "tokens": sum(report.tokens_trained for report in own),
            "seconds": max(report.train_seconds for report in own),
            "cpu_s": {name: round(cpu_s(node.child.pid) - before[name], 2) for name, node in nodes.items()},
            "host_compute_s": reports["edge-1"].host.compute_seconds,
            "host_peak_bytes": peak_bytes(nodes["edge-1"].child.pid),
        }

    def close() -> None:
        for node in nodes.values():
            node.child.terminate()
        for node in nodes.values():
            node.child.wait(60)

    return run, close


class Node:
    """A stage host in a process of its own; takes plans as a `StageHost` does."""

    def __init__(self, settings: dict[str, Any], daemon: str, name: str, threads: int, file: str = "") -> None:
        self.file, self._state, self._client = file, Path(settings["folder"]) / name, None
        self._state.mkdir(parents=True)
        code = f"import sys; from {daemon} import main; sys.exit(main())"
        if settings["workers"] and not file:
            code = ONE_WORKER.format(workers=settings["workers"]) + code
        options = ["--name", name, "--state", str(self._state), "--threads", str(threads)]
        command = [sys.executable, "-c", code, *options, *(["--data", file] if file else [])]
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "MALLOC_ARENA_MAX": "1"}  # as `edgelam client` does
        with (self._state / "log").open("w", encoding="utf-8") as log:
            self.child = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def _call(self, method: str, request: Any, timeout_s: float) -> Any:
        from edgelam_fl.wire.control import ControlClient

        if self._client is None:
            self._client = ControlClient(self._state, START_S)  # type: ignore[assignment]
        return self._client.call(method, request, timeout_s)  # type: ignore[attr-defined]

    def submit(self, request: Any) -> Any:
        return self._call("Submit", request, 60.0)

    def wait(self, request: Any) -> Any:
        return self._call("Wait", request, request.timeout_s + 10)

    def address(self) -> str:
        from edgelam_fl.wire import PROTOCOL_VERSION
        from edgelam_fl.wire import edgelam_pb2 as pb

        return self._call("GetProfile", pb.ProfileRequest(protocol_version=PROTOCOL_VERSION), 60.0).address


# ---------------------------------------------------------------- transformers and peft alone


def plain(settings: dict[str, Any]) -> tuple[Callable[[int], dict[str, Any]], Callable[[], None]]:
    """Returns what trains a number of steps on the union of the devices' batches, in this process on all of its threads."""
    from edgelam_fl.model.adapter import initial_adapter
    from edgelam_fl.model.source import find_model
    from tests.fleet import device_batches, plain_model, plain_training, union_batches

    config, source = configured(settings), find_model(settings["model"])
    model = plain_model(source, config, initial_adapter(source, config.lora.targets, config.lora.rank, 1))
    done = 0

    def run(steps: int) -> dict[str, Any]:
        nonlocal done
        drawn = [
            device_batches(source, config, Path(file), f"device-{number}", done + steps)[done:]
            for number, file in enumerate(settings["files"], 1)
        ]
        done += steps
        batches: Sequence[Any] = union_batches(drawn) if settings["plain"] == 1 else list(zip(*drawn, strict=True))
        began, cpu = time.monotonic(), time.process_time()
        plain_training(model, config, batches)
        return {
            "tokens": sum(length for step in drawn for units in step for unit in units for length in unit.row_lengths),
            "seconds": time.monotonic() - began,
            "cpu_s": {"plain": round(time.process_time() - cpu, 2)},
        }

    return run, lambda: None


if __name__ == "__main__":
    main()
