"""Commands that look after runs: top, runs, log, stop. They parse and print; the work is done by the modules that they import."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgelam_fl.cli.options import OPERATOR_FOLDER, InsecureOption, JsonOption, OperatorOption, console, messages, say
from edgelam_fl.errors import ConfigError

if TYPE_CHECKING:
    from edgelam_fl.federation.server_runs import ServerRuns
    from edgelam_fl.telemetry.run_folder import RunLine, RunSource

_ServerOption = Annotated[
    str,
    typer.Option(
        "--server", metavar="HOST:PORT", help="Ask the server there, from any machine; else this machine's folders."
    ),
]
_RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="A run's name, as `edgelam runs` lists it, or its folder.")
]
_NOTE_WIDTH = 60
_STOP_S = 90.0  # Flower tells a ServerApp with its next heartbeat


def top(
    run: _RunArgument = "",
    once: Annotated[bool, typer.Option("--once", help="Print one table and end.")] = False,
    server: _ServerOption = "",
    operator: OperatorOption = OPERATOR_FOLDER,
    insecure: InsecureOption = False,
    as_json: JsonOption = False,
) -> None:
    """Shows a run's nodes live: what each holds, busy and waiting time, bytes, and why any left; by default the newest run's.

    Ends with the run; without a terminal it prints one table. Busy and waiting time are those of the latest round's training.
    With --json, prints one object with the present state.
    """
    from edgelam_fl.telemetry.top import follow

    follow(console, _source(run, server, operator, insecure), once, as_json)


def runs(
    root: Annotated[Path, typer.Option("--in", metavar="DIR", help="The folder that holds the runs' folders.")] = Path(
        "runs"
    ),
    server: _ServerOption = "",
    operator: OperatorOption = OPERATOR_FOLDER,
    insecure: InsecureOption = False,
    as_json: JsonOption = False,
) -> None:
    """Lists runs, the newest first: how each stands, how far it is, and for which run it waits or why it ended early.

    Without --server, those in the folder runs/ of this machine.
    """
    from edgelam_fl.telemetry.run_folder import run_folders, run_line
    from edgelam_fl.telemetry.waiting import waiting

    if server:
        with waiting(messages, "asking the server"):
            lines, left_out = _runs_of(server, operator, insecure).lines()
    else:
        lines, left_out = [run_line(folder) for folder in run_folders(root)], 0
    if as_json:
        say(json.dumps([asdict(line) for line in lines], indent=2))
        return
    if not lines:
        say(f"no run at {server}" if server else f"no run in {root.absolute()}; --server HOST:PORT asks a server")
        return
    _print_runs(lines)
    if left_out:
        say(f"and {left_out} older, which are in the server's folder for runs")


def _print_runs(lines: list[RunLine]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    from edgelam_fl.telemetry.human import human_moment, human_seconds

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("run", overflow="fold")
    for heading in ("state", "rounds", "began", "took"):
        table.add_column(heading, no_wrap=True)
    table.add_column("", overflow="fold", max_width=_NOTE_WIDTH)
    for line in lines:
        rounds = f"{line.round} of {line.rounds}" if line.rounds else ""
        began = human_moment(line.began) if line.began is not None else ""
        took = human_seconds(line.seconds) if line.seconds is not None else ""
        table.add_row(escape(line.run), line.state, rounds, began, took, escape(line.note))
    console.print(table)


def log(
    run: _RunArgument = "",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")] = False,
    server: _ServerOption = "",
    operator: OperatorOption = OPERATOR_FOLDER,
    insecure: InsecureOption = False,
    as_json: JsonOption = False,
) -> None:
    """Prints what a run has said, with the seconds since its first word; by default the newest run's.

    With --json, its events, one object per line.
    """
    from edgelam_fl.telemetry.run_log import show_log

    show_log(console, _source(run, server, operator, insecure), follow=follow, as_json=as_json)


def stop(
    run: _RunArgument,
    server: _ServerOption = "",
    operator: OperatorOption = OPERATOR_FOLDER,
    insecure: InsecureOption = False,
) -> None:
    """Stops a run, and waits until it has ended. The adapter after its last finished round is kept.

    A run of `edgelam run --local` is stopped on its machine; a run of a server from any machine that has the operator's folder.
    """
    from edgelam_fl.federation.server_runs import ServerRuns, ServerSource, operator_of_run
    from edgelam_fl.telemetry.run_folder import FolderSource, await_end, find_run
    from edgelam_fl.telemetry.waiting import waiting

    if server:
        asked, name = _runs_of(server, operator, insecure), run
        source: RunSource = ServerSource(asked, name)
    else:
        folder = find_run(Path(run)).absolute()
        asked, name = ServerRuns(operator_of_run(folder, operator)), str(folder)
        source = FolderSource(folder)
    with waiting(messages, f"stopping {run}"):
        asked.stop(name)
        state = await_end(source, _STOP_S)
    say(f"{run}: {state}" if state == "stopped" else f"{run} was told to stop and is {state}")


def _source(run: str, server: str, operator: Path, insecure: bool) -> RunSource:
    """Returns where the events of the run that a user names come from; "": the newest of this machine."""
    if server:
        from edgelam_fl.federation.server_runs import ServerSource

        if not run:
            raise ConfigError("--server needs the run's name: `edgelam runs --server HOST:PORT` lists them")
        return ServerSource(_runs_of(server, operator, insecure), run)
    from edgelam_fl.telemetry.run_folder import FolderSource, find_run, newest_run

    return FolderSource(find_run(Path(run)) if run else newest_run())


def _runs_of(server: str, operator: Path, insecure: bool) -> ServerRuns:
    """Returns the runs of a server. Raises a message for an address where no server is, or that may not be used."""
    from edgelam_fl.federation.operator import Operator
    from edgelam_fl.federation.server_probe import check_server_answers
    from edgelam_fl.federation.server_runs import ServerRuns

    asking = Operator(server, operator)
    check_server_answers(asking, insecure)
    return ServerRuns(asking)
