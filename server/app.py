"""The Flower ServerApp: reads the run file, and does what the run config's `command` says: train, plan or chat."""

from __future__ import annotations

import time
from importlib.metadata import version
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from edgelam_fl.config import parse_run_file
from edgelam_fl.errors import ConfigError, EdgelamError
from edgelam_fl.flower import to_record
from edgelam_fl.plan.making import task_settings
from edgelam_fl.plan.placement import first_proposal
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb
from server import hub
from server.chat import converse
from server.checks import check_config
from server.exchange import Nodes
from server.rounds import SplitLora
from server.run_folder import RunFolder

_COMMANDS = ("run", "plan", "chat")
_VERSIONED = ("edgelam-fl", "flwr", "torch", "transformers", "peft", "grpcio")

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Does what `command` says. The other keys are described in pyproject.toml, [tool.flwr.app.config]."""
    given = {key: str(value) for key, value in context.run_config.items()}
    command = given["command"]
    if command not in _COMMANDS:
        raise ConfigError(f"command = {command!r} in the run config must be one of {', '.join(_COMMANDS)}")
    config = parse_run_file(given["run-toml"], source="the run file", overrides=given["set"])
    out = Path(given["out"] or f"runs/flwr-{context.run_id}").absolute()
    spec = check_config(config)
    hub.offer(spec.source)
    if command == "chat":
        converse(grid, spec, session=out, adapter=Path(given["adapter"]))
        return
    folder = RunFolder(out, spec)
    try:
        if command == "plan":
            propose(_nodes(grid, folder, spec), spec, folder)
        else:
            _run(grid, spec, folder)
    except EdgelamError as error:
        folder.fail(str(error))
        raise
    except Exception as error:
        folder.fail(f"{type(error).__name__}: {error}")
        raise


def _run(grid: Grid, spec: RunSpec, folder: RunFolder) -> None:
    federation = spec.config.federation
    folder.emit(
        "run_started", run=folder.path.name, config=spec.config.model_dump(mode="json"),
        versions={package: version(package) for package in _VERSIONED},
    )  # fmt: skip
    nodes = _nodes(grid, folder, spec)
    strategy = SplitLora(spec, nodes, folder, f"{folder.path.name}-{time.time_ns():x}")
    print(f"run folder: {folder.path}", flush=True)
    # The first plan adds each module's start: only then is known who holds it, and in which rank.
    strategy.start(grid, to_record({}), num_rounds=federation.rounds, timeout=federation.round_deadline_s)
    folder.finish()
    print(f"done: {folder.path / 'summary.json'}", flush=True)


def _nodes(grid: Grid, folder: RunFolder, spec: RunSpec) -> Nodes:
    config = spec.config
    request = pb.ProfileRequest(
        protocol_version=PROTOCOL_VERSION,
        task=task_settings(config),
        measure_model=config.model.name if config.model.base == "auto" else "",
        measure_layers=config.model.name if config.split.cuts == "auto" else "",
        measure_link=config.split.cuts == "auto",
        model_digest=spec.source.digest,
        hub_port=hub.port(),
    )
    return Nodes(grid, folder, request, config.federation.join_deadline_s)


def propose(nodes: Nodes, spec: RunSpec, folder: RunFolder) -> None:
    """Asks the nodes that are here, says who would hold what, and ends."""
    nodes.gather(spec.config, at_start=True)
    proposal = first_proposal(spec, list(nodes.profiles.values()))
    folder.emit("placement", round=0, **proposal.event(), measured=[])
    folder.emit("run_done", summary="")
