"""The Flower ServerApp: reads the run file, and does what the run config's `command` says: train, plan or chat."""

from __future__ import annotations

import os
import time
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from edgelam_fl.bounds import Bounds, bounds_of
from edgelam_fl.config import parse_run_file, without_home
from edgelam_fl.errors import ConfigError, EdgelamError
from edgelam_fl.federation import QUEUE
from edgelam_fl.files import from_home, keep_private, say
from edgelam_fl.plan.making import task_settings
from edgelam_fl.plan.placement import first_proposal
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.telemetry.events import EventLog, RunDone, RunFailure, RunStarted
from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb
from server.chat import converse
from server.checks import check_config
from server.exchange import Exchange, ExchangeTiming
from server.hub import RunHub, run_hub
from server.membership import owners
from server.roster import Roster
from server.rounds import Rounds
from server.run_folder import RunFolder, versions
from server.run_queue import Ticket, turn

_COMMANDS = ("run", "plan", "chat")
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Does what `command` says. The other keys are described in pyproject.toml, [tool.flwr.app.config]."""
    given = {key: str(value) for key, value in context.run_config.items()}
    command = given["command"]
    if command not in _COMMANDS:
        raise ConfigError(f"command = {command!r} in the run config must be one of {', '.join(_COMMANDS)}")
    keep_private()
    bounds = bounds_of(os.environ)
    adapter = bounds.check_in_runs(Path(given["adapter"]), "adapter") if command == "chat" else Path()
    out = bounds.make_run_folder(given["out"], f"flwr-{context.run_id}", of_chat=command == "chat")
    try:
        config = without_home(parse_run_file(given["run-toml"], source="the run file", overrides=given["set"]))
        spec = check_config(config, bounds)
    except EdgelamError as error:  # whoever follows the run reads its events
        refusal = RunFailure(reason=from_home(str(error)), kept="nothing was started", exit_code=error.exit_code)
        EventLog(out / "events.jsonl")(refusal)
        raise
    queue = "" if given.get("fabric") else os.environ.get(QUEUE, "")  # the nodes of a fabric are its run's own
    with run_hub(spec.source) as hub:
        if command == "chat":
            converse(grid, spec, hub, session=out, adapter=adapter, queue=queue)
        else:
            _lead(
                Exchange(grid, ExchangeTiming()), RunFolder(out, spec), spec, hub, bounds,
                trains=command == "run", queue=queue,
            )  # fmt: skip


def _lead(
    exchange: Exchange, folder: RunFolder, spec: RunSpec, hub: RunHub, bounds: Bounds, *, trains: bool, queue: str
) -> None:
    """Trains, once it is the run's turn, or proposes. An error is in the run's events before it is raised."""
    try:
        patience_s = spec.config.federation.join_deadline_s
        roster = Roster(
            exchange, folder, _profile_request(spec, hub), patience_s, owners(os.environ), spec.source.leakage_key
        )
        if trains:
            with turn(queue, folder.path.name, folder.emit) as ticket:
                _run(exchange, roster, spec, folder, hub, bounds, ticket)
        else:
            propose(roster, spec, folder)
    except EdgelamError as error:
        folder.fail(str(error), error.exit_code)
        raise
    except Exception as error:
        folder.fail(f"{type(error).__name__}: {error}")
        raise


def _run(
    exchange: Exchange,
    roster: Roster,
    spec: RunSpec,
    folder: RunFolder,
    hub: RunHub,
    bounds: Bounds,
    ticket: Ticket | None,
) -> None:
    folder.emit(RunStarted(run=folder.path.name, config=spec.config.model_dump(mode="json"), versions=versions()))
    say(f"run folder: {folder.path}")
    name = f"{folder.path.name}-{time.time_ns():x}"
    Rounds(spec, exchange, roster, folder, name, hub=hub, bounds=bounds, ticket=ticket).run()
    folder.finish()
    say(f"done: {folder.path / 'summary.json'}")


def _profile_request(spec: RunSpec, hub: RunHub) -> pb.ProfileRequest:
    config = spec.config
    return pb.ProfileRequest(
        protocol_version=PROTOCOL_VERSION,
        task=task_settings(config),
        measure_model=config.model.name if config.model.base == "auto" else "",
        measure_layers=config.model.name if config.split.cuts == "auto" else "",
        measure_link=config.split.cuts == "auto",
        model=config.model.name,
        model_digest=spec.source.digest,
        hub_port=hub.port,
        slices_token=hub.slices_token,
    )


def propose(roster: Roster, spec: RunSpec, folder: RunFolder) -> None:
    """Waits for the nodes, emits who would hold which layers, and ends: nothing is trained."""
    roster.gather(spec.config, at_start=True)
    proposal = first_proposal(spec, list(roster.profiles.values()))
    folder.emit(proposal.event())
    folder.emit(RunDone(summary=""))
