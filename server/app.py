"""The Flower ServerApp: reads the run file, waits for the nodes, runs the rounds, leaves the run's folder."""

from __future__ import annotations

import time
from importlib.metadata import version
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from edgelam_fl.config import RunConfig, parse_run_file
from edgelam_fl.errors import EdgelamError
from edgelam_fl.flower import to_record
from edgelam_fl.model.source import ModelSource
from edgelam_fl.plan.making import task_settings
from edgelam_fl.plan.placement import foresee
from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb
from server import hub
from server.chat import converse
from server.checks import check_config
from server.exchange import Nodes
from server.rounds import SplitLora
from server.run_folder import RunFolder

_VERSIONED = ("edgelam-fl", "flwr", "torch", "transformers", "peft", "grpcio")

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = parse_run_file(
        str(context.run_config["run-toml"]), source="the run file", overrides=str(context.run_config["set"])
    )
    out = str(context.run_config["out"]) or f"runs/flwr-{context.run_id}"
    source = check_config(config)
    hub.offer(source)
    if str(context.run_config["chat"]):
        converse(grid, config, source, session=Path(out).absolute(), adapter=Path(str(context.run_config["chat"])))
        return
    folder = RunFolder(Path(out).absolute(), config, source)
    try:
        if str(context.run_config["plan"]):
            propose(_nodes(grid, folder, config, source), config, source, folder)
            return
        _run(grid, config, folder, source, f"{Path(out).name}-{time.time_ns():x}")
    except EdgelamError as error:
        folder.fail(str(error))
        raise
    except Exception as error:
        folder.fail(f"{type(error).__name__}: {error}")
        raise


def _run(grid: Grid, config: RunConfig, folder: RunFolder, source: ModelSource, run: str) -> None:
    folder.emit(
        "run_started", run=folder.path.name, config=config.model_dump(mode="json"),
        versions={package: version(package) for package in _VERSIONED},
    )  # fmt: skip
    nodes = _nodes(grid, folder, config, source)
    strategy = SplitLora(config, source, nodes, folder, run)
    print(f"run folder: {folder.path}", flush=True)
    # The first plan adds each module's start: only then is known who holds it, and in which rank.
    strategy.start(grid, to_record({}), num_rounds=config.federation.rounds, timeout=config.federation.round_deadline_s)
    folder.finish()
    print(f"done: {folder.path / 'summary.json'}", flush=True)


def _nodes(grid: Grid, folder: RunFolder, config: RunConfig, source: ModelSource) -> Nodes:
    request = pb.ProfileRequest(
        protocol_version=PROTOCOL_VERSION,
        task=task_settings(config),
        measure_model=config.model.name if config.model.base == "auto" else "",
        measure_layers=config.model.name if config.split.cuts == "auto" else "",
        measure_link=config.split.cuts == "auto",
        model_digest=source.digest,
        hub_port=hub.port(),
    )
    return Nodes(grid, folder, request, config.federation.join_deadline_s)


def propose(nodes: Nodes, config: RunConfig, source: ModelSource, folder: RunFolder) -> None:
    """Asks the nodes that are here, says who would hold what, and ends."""
    nodes.gather(config, at_start=True)
    folder.emit("placement", round=0, **foresee(config, source, list(nodes.profiles.values())).event(), measured=[])
    folder.emit("run_done", summary="")
