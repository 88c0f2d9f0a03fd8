"""Commands for runs: init, demo, plan, run, top. They parse and print; the work is done by the modules that they import."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from edgelam_fl.cli.options import (
    OPERATOR_FOLDER,
    InsecureOption,
    JsonOption,
    OfflineOption,
    OperatorOption,
    OptionalRunFileArgument,
    RunFileArgument,
    ServerOption,
    SetOption,
    console,
    messages,
    say,
)
from edgelam_fl.errors import ConfigError


def init(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The run file to write.")] = Path("run.toml"),
    data: Annotated[
        Path | None, typer.Option("--data", metavar="FILE", help="A device's data, to find the names of its fields.")
    ] = None,
    model: Annotated[
        str, typer.Option("--model", metavar="NAME", help="Built-in name, folder, .gguf file or hub name.")
    ] = "",
) -> None:
    """Writes a commented run file for your data and model; overwrites nothing.

    The file has every key of every section, with its range, its default and what it does.
    """
    from edgelam_fl.cli.run_file import write_run_file

    for choice in write_run_file(file, data, model):
        say(choice)
    say(f"wrote {file}; `edgelam run {file} --explain` shows what it says")


def demo(
    devices: Annotated[int, typer.Option("--devices", min=1, max=16, help="How many devices to play.")] = 3,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="The run's folder; by default runs/demo-<time>.")
    ] = None,
    overrides: SetOption = [],  # noqa: B006 - typer reads the default
) -> None:
    """Runs a complete federation on this machine, in minutes.

    Starts a Flower SuperLink, one edge server and some devices as separate processes, and fine-tunes SmolLM2-135M on
    questions about Python's standard library. Each device owns the docstrings of other modules.
    """
    from edgelam_fl.federation.demo import run_demo
    from edgelam_fl.files import keep_private

    keep_private()
    raise typer.Exit(run_demo(console, devices, out, overrides))


def top(
    folder: Annotated[
        Path | None, typer.Argument(metavar="RUN", help="A run's folder; by default the newest under runs/.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Print one table and end.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Shows a run's nodes live: what each holds, busy and waiting time, bytes, and why any left.

    Ends with the run. Busy and waiting time are those of the latest round's training. With --json, prints one object with
    the present state.
    """
    from edgelam_fl.telemetry.top import follow, newest_run

    follow(console, folder or newest_run(), once, as_json)


def plan(
    file: RunFileArgument,
    profiles: Annotated[
        Path | None,
        typer.Option(
            "--profiles",
            metavar="FILE",
            help="What the nodes can do: a JSON list of what `edgelam doctor --measure --json` prints on each, or a run's events.jsonl.",
        ),
    ] = None,
    server: Annotated[
        str, typer.Option("--server", metavar="HOST:PORT", help="Ask the nodes that have joined this server.")
    ] = "",
    overrides: SetOption = [],  # noqa: B006
    as_json: JsonOption = False,
    operator: OperatorOption = OPERATOR_FOLDER,
    insecure: InsecureOption = False,
) -> None:
    """Shows which node would hold which layers, with predicted memory, time and bytes, and what limits it; changes nothing.

    With split.cuts = "auto" it is the planner's choice; --set tries another run file on the same nodes.
    """
    from edgelam_fl.config import read_run_file
    from edgelam_fl.federation.plan_view import plan_of_profiles, plan_on_server, plan_view

    config = read_run_file(file, overrides)
    if (profiles is None) == (not server):
        raise ConfigError("edgelam plan needs either --profiles FILE or --server HOST:PORT, to know the nodes")
    if profiles is not None:
        plan = plan_of_profiles(config, profiles)
    else:
        from edgelam_fl.addresses import check_server_answers
        from edgelam_fl.federation.operator import Operator
        from edgelam_fl.model.source import find_model

        asking = Operator(server, operator)
        check_server_answers(server, insecure or asking.identity is not None)
        plan = plan_on_server(messages, config, find_model(config.model.name), asking)
    if as_json:
        say(json.dumps(plan.to_json(), indent=2))
    else:
        console.print(plan_view(plan), highlight=False, soft_wrap=True)


def run(
    file: OptionalRunFileArgument = None,
    server: ServerOption = "127.0.0.1:8000",
    local: Annotated[
        int, typer.Option("--local", metavar="N", min=0, max=16, help="Play the server and N devices here.")
    ] = 0,
    data: Annotated[
        list[Path],
        typer.Option(
            "--data",
            metavar="FILE",
            help="With --local: one file per device (.jsonl, .csv, .txt ...); repeat it. With --explain: says what is read of it.",
        ),
    ] = [],  # noqa: B006
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="The run's folder; by default run.out of the file.")
    ] = None,
    overrides: SetOption = [],  # noqa: B006
    detach: Annotated[
        bool, typer.Option("--detach", help="Submit the run to the server and return; it goes on there.")
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print what would be used, every key with its range; start nothing.")
    ] = False,
    operator: OperatorOption = OPERATOR_FOLDER,
    insecure: InsecureOption = False,
    offline: OfflineOption = False,
    resume: Annotated[
        Path | None,
        typer.Option("--resume", metavar="RUN", help="Go on with a run that ended early, in its folder; no FILE then."),
    ] = None,
) -> None:
    """Fine-tunes a model by a run file, on the nodes that have joined a server.

    With --local N, this machine plays all parts instead: the server, an edge server and N devices. With --resume, a run that
    ended early goes on from its last finished round, where it ran; --set may change rounds, waits and deadlines.
    """
    if resume is not None:
        raise typer.Exit(
            _resume(resume, file, server, overrides, operator, insecure, detach or explain or local or data or out)
        )
    if file is None:
        raise ConfigError("edgelam run needs a run file, or --resume RUN: `edgelam init run.toml` writes a run file")
    from edgelam_fl.config import read_run_file
    from edgelam_fl.federation.operator import Operator
    from edgelam_fl.federation.runs import check_run, leave_on_server, run_here, run_on_server
    from edgelam_fl.files import keep_private

    config = read_run_file(file, overrides)
    if explain:
        from edgelam_fl.cli.run_file import described_data, explained

        say(explained(config))
        for file_of_device in data:
            say(described_data(config, file_of_device))
        raise typer.Exit()
    if local and len(data) != local:
        raise ConfigError(f"--local {local} needs --data once per device ({local} times), got it {len(data)} times")
    if data and not local:
        raise ConfigError(
            "--data belongs to --local; a device that joins a server brings its own: edgelam client --data FILE"
        )
    if local and detach:
        raise ConfigError(
            "--detach needs a server that stays: with --local the federation lives in this command and would end with it. "
            "Start `edgelam server` and `edgelam client` first, then run without --local"
        )
    keep_private()
    if local:
        raise typer.Exit(run_here(console, config, check_run(config, file.stem, out), data))
    asking = Operator(server, operator)
    folder = check_run(config, file.stem, out, asking)
    on_server = leave_on_server if detach else run_on_server
    raise typer.Exit(on_server(console, config, folder, asking, insecure))


def _resume(
    run: Path, file: Path | None, server: str, overrides: list[str], operator: Path, insecure: bool, others: object
) -> int:
    """Goes on with a run; returns the exit code. others: options that have no place beside --resume, as given."""
    from edgelam_fl.federation.operator import Operator
    from edgelam_fl.federation.runs import ran_here, resume_here, resume_on_server
    from edgelam_fl.files import keep_private

    if file is not None:
        raise ConfigError(
            f"--resume takes the run file from the run's folder: leave {file} out, and change rounds, waits or deadlines with --set"
        )
    if others:
        raise ConfigError("--resume goes with --set, --server, --operator and --insecure, and with no other option")
    keep_private()
    if ran_here(run):
        return resume_here(console, run.absolute(), overrides)
    return resume_on_server(console, run, overrides, Operator(server, operator), insecure)
