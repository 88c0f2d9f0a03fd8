"""The Flower ServerApp: reads the run file, and does what the run config's `command` says: train, plan or chat."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.superlink.grid import InMemoryGrid

from edgelam_fl.bounds import Bounds, bounds_of
from edgelam_fl.config import overrides_of, parse_run_file, without_home
from edgelam_fl.errors import ConfigError, EdgelamError
from edgelam_fl.federation import QUEUE
from edgelam_fl.files import Hold, from_home, keep_private, say
from edgelam_fl.names import AGAIN
from edgelam_fl.plan.making import task_settings
from edgelam_fl.plan.pieces import settled
from edgelam_fl.plan.placement import first_proposal
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.telemetry.events import EVENTS_FILE, EventLog, RunDone, RunFailure, RunResumed, RunStarted
from edgelam_fl.telemetry.run_folder import kept
from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb
from server.chat import converse
from server.checks import check_config
from server.exchange import Exchange, ExchangeTiming
from server.hub import RunHub, run_hub
from server.membership import owners
from server.pulling import bound_pulls
from server.resuming import Resumption, check_can_resume, resumption
from server.roster import Roster
from server.rounds import Rounds
from server.run_folder import RunFolder, versions
from server.run_queue import Ticket, turn

_COMMANDS = ("run", "plan", "chat", "resume")
_BACK_S = 30.0  # for nodes that come back after the server did
_HOLD_S = 15.0  # for a process of the same run that is ending
_NO_SERVER_OF_OURS = (
    "this run was submitted to a simulation of Flower's own, which `flwr` starts if its settings name no server: no device of yours is "
    "there, so nothing was started. On the server's machine, type the line that `edgelam server` printed at its start, "
    "export FLWR_HOME=FOLDER (the operator's, by default $PWD/.edgelam/server/operator), and then `flwr run .` again. "
    "`edgelam run --local` plays a federation on this machine, `edgelam bench` simulates one"
)
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Does what `command` says. The other keys are described in pyproject.toml, [tool.flwr.app.config]."""
    given = {key: str(value) for key, value in context.run_config.items()}
    if isinstance(grid, InMemoryGrid) and not given.get("fabric"):
        raise ConfigError(_NO_SERVER_OF_OURS)
    given["set"] = f"{given['set']} {shlex.join(overrides_of(context.run_config))}".strip()
    command = given["command"]
    if command not in _COMMANDS:
        raise ConfigError(f"command = {command!r} in the run config must be one of {', '.join(_COMMANDS)}")
    keep_private()
    bound_pulls()
    bounds = bounds_of(os.environ)
    adapter = bounds.check_in_runs(Path(given["adapter"]), "adapter") if command == "chat" else Path()
    queue = "" if given.get("fabric") else os.environ.get(QUEUE, "")  # the nodes of a fabric are its run's own
    place = bounds.run_folder(given["out"], f"flwr-{context.run_id}")
    again = command == "run" and AGAIN in os.environ and (place / "config.toml").is_file()
    if command == "resume" or again:
        out = bounds.check_in_runs(place, "out")
        check_can_resume(out)  # raised without a word in the events, which are those of another process
        with _alone(out):
            return _go_on(grid, bounds, out, given["set"], queue, again=again)
    if AGAIN in os.environ and place.is_dir():  # the earlier process died before it had written anything
        out = bounds.check_in_runs(place, "out")
    else:
        out = bounds.make_run_folder(given["out"], f"flwr-{context.run_id}", of_chat=command == "chat")
    with _alone(out):
        _begin(grid, bounds, out, given, adapter, queue)


def _begin(grid: Grid, bounds: Bounds, out: Path, given: Mapping[str, str], adapter: Path, queue: str) -> None:
    """Begins what was submitted: a run, a proposal or a chat, with the folder `out`."""
    command = given["command"]
    try:
        config = without_home(parse_run_file(given["run-toml"], source="the run file", overrides=given["set"]))
        spec = check_config(config, bounds)
    except EdgelamError as error:
        _refuse(out, error)
        raise
    with run_hub(spec.source) as hub:
        if command == "chat":
            converse(grid, spec, hub, session=out, adapter=adapter, queue=queue)
        else:
            exchange = Exchange(grid, ExchangeTiming())
            _lead(exchange, RunFolder(out, spec), spec, hub, bounds, trains=command == "run", queue=queue)


def _go_on(grid: Grid, bounds: Bounds, out: Path, overrides: str, queue: str, *, again: bool) -> None:
    """Goes on with the run in the folder `out`. again: the server itself asks for it."""
    try:
        resumed = resumption(out, overrides, begins_again=again)
        spec = check_config(resumed.config, bounds)
        resumed.check_model(spec)
        saved = resumed.saved
        folder = RunFolder.begun_again(out, spec) if saved is None else RunFolder.reopened(out, spec, saved)
        for of_the_end in ("summary.json", "report.html"):  # whoever follows the run waits for the new ones
            (out / of_the_end).unlink(missing_ok=True)
    except EdgelamError as error:
        _refuse(out, error, kept(out))
        raise
    with run_hub(spec.source) as hub:
        _lead(Exchange(grid, ExchangeTiming()), folder, spec, hub, bounds, trains=True, queue=queue, resumed=resumed)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Holds a run's folder for this process until the block ends. Raises ConfigError if another process holds it."""
    try:
        hold = Hold(out, _HOLD_S)
    except BlockingIOError as error:
        raise ConfigError(f"the run in {out} is alive") from error
    with hold:
        yield


def _refuse(out: Path, error: EdgelamError, what_is_kept: str = "nothing was started") -> None:
    """Says in the run's events why it does not start: whoever follows it reads them."""
    refusal = RunFailure(reason=from_home(str(error)), kept=what_is_kept, exit_code=error.exit_code)
    EventLog(out / EVENTS_FILE)(refusal)


def _lead(
    exchange: Exchange,
    folder: RunFolder,
    spec: RunSpec,
    hub: RunHub,
    bounds: Bounds,
    *,
    trains: bool,
    queue: str,
    resumed: Resumption | None = None,
) -> None:
    """Trains, once it is the run's turn, or proposes. An error is in the run's events before it is raised. resumed: how the run goes on; None: it begins."""
    try:
        patience_s = spec.config.federation.join_deadline_s
        roster = Roster(
            exchange, folder, _profile_request(spec, hub), patience_s, owners(os.environ), spec.source.leakage_key,
            spec.config.wire.lossy_codecs,
        )  # fmt: skip
        if trains:
            with turn(queue, folder.path.name, folder.emit) as ticket:
                hub.free(ticket.left_over if ticket is not None else ())
                _run(exchange, roster, spec, folder, hub, bounds, ticket, resumed)
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
    resumed: Resumption | None,
) -> None:
    saved, attempts = (resumed.saved, resumed.attempts) if resumed is not None else (None, 0)
    name = (resumed.name if resumed is not None else "") or f"{folder.path.name}-{time.time_ns():x}"
    make_rounds = partial(
        Rounds, exchange=exchange, roster=roster, folder=folder, run=name, hub=hub, bounds=bounds, saved=saved,
        attempts_before=attempts, ticket=ticket,
    )  # fmt: skip
    rounds = make_rounds(spec)
    if saved is None:
        config = spec.config.model_dump(mode="json")
        folder.emit(RunStarted(run=folder.path.name, config=config, versions=versions(), name_at_nodes=name))
    if resumed is not None:
        folder.emit(RunResumed(round=resumed.round, problem=resumed.problem))
        rounds.end_earlier_attempts()  # first of all: a node that plays answers nothing
        await_nodes(exchange, roster, resumed.nodes)
        rounds.look_for_snapshots()
    say(f"run folder: {folder.path}")
    if saved is None and spec.config.has_open_pieces:
        rounds = make_rounds(settle(roster, spec, folder))
    rounds.run()
    folder.finish()
    say(f"done: {folder.path / 'summary.json'}")


def await_nodes(exchange: Exchange, roster: Roster, names: Set[str], patience_s: float = _BACK_S) -> None:
    """Waits until all these nodes have answered, or `patience_s` have passed: a server's end makes them all come back one by one."""
    timing = exchange.timing
    end = timing.now() + patience_s
    while True:
        roster.refresh(ask_lost=True)
        if names <= set(roster.profiles) or timing.now() >= end:
            return
        timing.sleep(timing.poll_s)


def _profile_request(spec: RunSpec, hub: RunHub) -> pb.ProfileRequest:
    config = spec.config
    is_planned = config.split.cuts == "auto" or config.has_open_pieces
    return pb.ProfileRequest(
        protocol_version=PROTOCOL_VERSION,
        task=task_settings(config),
        measure_model=config.model.name if config.model.base == "auto" else "",
        measure_layers=config.model.name if is_planned else "",
        measure_link=is_planned,
        model=config.model.name,
        model_digest=spec.source.digest,
        hub_port=hub.port,
        slices_token=hub.slices_token,
    )


def propose(roster: Roster, spec: RunSpec, folder: RunFolder) -> None:
    """Waits for the nodes, emits who would hold which layers, and ends: nothing is trained."""
    roster.gather(spec.config, at_start=True)
    profiles = list(roster.profiles.values())
    spec, choice = settled(spec, profiles)
    if choice is not None:
        folder.emit(choice.event())
    folder.emit(first_proposal(spec, profiles).event())
    folder.emit(RunDone(summary=""))


def settle(roster: Roster, spec: RunSpec, folder: RunFolder) -> RunSpec:
    """Waits for the nodes, decides for the whole run what its file leaves open of a batch's pieces, and says so."""
    roster.gather(spec.config, at_start=True)
    spec, choice = settled(spec, list(roster.profiles.values()))
    assert choice is not None, "something is open"
    folder.settle(spec)
    folder.emit(choice.event())
    return spec
