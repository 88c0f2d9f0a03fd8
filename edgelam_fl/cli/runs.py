"""Commands for runs: init, demo, plan, run. They parse and print; the work is done by the modules that they import."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from edgelam_fl.cli.options import (
    OPERATOR_FOLDER,
    EvalDataOption,
    InsecureOption,
    JsonOption,
    OfflineOption,
    OperatorOption,
    RunFileArgument,
    RunFilesArgument,
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
        list[Path],
        typer.Option(
            "--data", metavar="FILE", help="The devices' data, to find the task, fields and classes; may be repeated."
        ),
    ] = [],  # noqa: B006 - typer reads the default
    model: Annotated[
        str, typer.Option("--model", metavar="NAME", help="Built-in name, folder, .gguf file or hub name.")
    ] = "",
    task: Annotated[
        str,
        typer.Option(
            "--task", metavar="KIND", help="What is learned, as task.kind of a run file; by default the data decide."
        ),
    ] = "",
) -> None:
    """Writes a commented run file for your data and model; overwrites nothing.

    The file has every key of every section, with its range, its default and what it does.
    """
    from edgelam_fl.cli.run_file import write_run_file

    for choice in write_run_file(file, data, model, task):
        say(choice)
    files = "".join(f" --data {shlex.quote(str(each))}" for each in data)
    trains = f", `edgelam run {file}{files}` trains here" if data else ""
    say(f"wrote {file}; `edgelam run {file} --explain` shows what it says{trains}")


def demo(
    devices: Annotated[int, typer.Option("--devices", min=1, max=16, help="How many devices to play.")] = 3,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="The run's folder; by default runs/demo-<time>.")
    ] = None,
    overrides: SetOption = [],  # noqa: B006 - typer reads the default
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Download the model's package without a question, if it is not here.")
    ] = False,
    task: Annotated[
        str, typer.Option("--task", metavar="TASK", help="What is learned: text, channel or beamforming.")
    ] = "text",
) -> None:
    """Runs a complete federation on this machine, in minutes.

    Starts a Flower SuperLink, one edge server and some devices as separate processes, and fine-tunes SmolLM2-135M on
    questions about Python's standard library. Each device owns the docstrings of other modules. With --task beamforming, radio
    cells learn one network for beams instead.
    """
    from edgelam_fl.federation.demo import run_demo
    from edgelam_fl.federation.demos import demo_named
    from edgelam_fl.files import keep_private

    keep_private()
    raise typer.Exit(run_demo(console, demo_named(task), devices, out, overrides, fetch=yes))


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
    from edgelam_fl.telemetry.waiting import waiting

    config = read_run_file(file, overrides)
    if (profiles is None) == (not server):
        raise ConfigError("edgelam plan needs either --profiles FILE or --server HOST:PORT, to know the nodes")
    if profiles is not None:
        with waiting(messages, "planning"):
            plan = plan_of_profiles(config, profiles)
    else:
        from edgelam_fl.federation.operator import Operator
        from edgelam_fl.federation.server_probe import check_server_answers
        from edgelam_fl.plan.spec import model_of

        asking = Operator(server, operator)
        check_server_answers(asking, insecure)
        plan = plan_on_server(messages, config, model_of(config), asking)
    if as_json:
        say(json.dumps(plan.to_json(), indent=2))
    else:
        console.print(plan_view(plan), highlight=False, soft_wrap=True)


def run(
    context: typer.Context,
    files: RunFilesArgument = None,
    server: ServerOption = "127.0.0.1:8000",
    local: Annotated[
        int, typer.Option("--local", metavar="N", min=0, max=16, help="Play the server and N devices here.")
    ] = 0,
    data: Annotated[
        list[Path],
        typer.Option(
            "--data",
            metavar="FILE",
            help="Train here, with a device per file (.jsonl, .csv, .txt ...); repeat it, or give a pattern. Needs no run file.",
        ),
    ] = [],  # noqa: B006
    split: Annotated[
        str,
        typer.Option(
            "--split",
            metavar="N[:KIND]",
            help="Deal one --data file to N devices: 5 (at random), 5:dirichlet=0.3 (other answers), 5:size=1.0 (other numbers).",
        ),
    ] = "",
    eval_data: EvalDataOption = [],  # noqa: B006
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="The run's folder; by default run.out of the file.")
    ] = None,
    overrides: SetOption = [],  # noqa: B006
    detach: Annotated[
        bool, typer.Option("--detach", help="Submit the run to the server and return; it goes on there.")
    ] = False,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain", help="Check all and print what would be used, every key with its range; start nothing."
        ),
    ] = False,
    operator: OperatorOption = OPERATOR_FOLDER,
    insecure: InsecureOption = False,
    offline: OfflineOption = False,
    resume: Annotated[
        Path | None,
        typer.Option("--resume", metavar="RUN", help="Go on with a run that ended early, in its folder; no FILE then."),
    ] = None,
) -> None:
    """Fine-tunes a model: on the nodes that have joined a server, or with --data on this machine.

    With --data, this machine plays all parts: the server, an edge server and a device per file, named after its file. A run file is
    then not needed: the data decide. With --resume, a run that ended early goes on from its last finished round, where it ran;
    --set may change rounds, waits and deadlines.
    """
    from edgelam_fl.cli.own_run import Asked, explain_run, run_with_data, sorted_out
    from edgelam_fl.federation.operator import Operator
    from edgelam_fl.federation.runs import check_run, leave_on_server, run_on_server
    from edgelam_fl.files import keep_private
    from edgelam_fl.telemetry.waiting import waiting

    if resume is not None:
        others = detach or explain or local or data or eval_data or out or split
        raise typer.Exit(_resume(resume, files, server, overrides, operator, insecure, others))
    asked = sorted_out(Asked(files or [], data, split, local, overrides, out, eval_data))
    if explain:
        with waiting(messages, "checking the run file, the model and the data"):
            text = explain_run(asked)
        say(text)
        raise typer.Exit()
    if asked.is_here:
        _check_here(context, detach)
        keep_private()
        raise typer.Exit(run_with_data(console, asked))
    config = asked.read()
    keep_private()
    asking = Operator(server, operator)
    with waiting(messages, "checking the run file and the model"):
        folder = check_run(config, asked.name, out, asking)
    on_server = leave_on_server if detach else run_on_server
    raise typer.Exit(on_server(console, config, folder, asking, insecure))


def _check_here(context: typer.Context, detach: bool) -> None:
    """Raises ConfigError for options that do not go with a run on this machine."""
    from click.core import ParameterSource

    if detach:
        raise ConfigError(
            "--detach needs a server that stays: with --local or --data the federation lives in this command and would end with it. "
            "Start `edgelam server` and `edgelam client` first, then run without --local and --data"
        )
    given = [
        f"--{name}"
        for name in ("server", "operator")
        if context.get_parameter_source(name) == ParameterSource.COMMANDLINE
    ]
    if given:
        raise ConfigError(
            f"{given[0]} names a server, and --data or --local trains on this machine: leave one of them out. A device that joins a server "
            f"brings its own data: edgelam client --data FILE"
        )


def _resume(
    run: Path,
    files: list[Path] | None,
    server: str,
    overrides: list[str],
    operator: Path,
    insecure: bool,
    others: object,
) -> int:
    """Goes on with a run; returns the exit code. others: options that have no place beside --resume, as given."""
    from edgelam_fl.federation.operator import Operator
    from edgelam_fl.federation.runs import ran_here, resume_here, resume_on_server
    from edgelam_fl.files import keep_private

    if files:
        raise ConfigError(
            f"--resume takes the run file from the run's folder: leave {files[0]} out, and change rounds, waits or deadlines with --set"
        )
    if others:
        raise ConfigError("--resume goes with --set, --server, --operator and --insecure, and with no other option")
    keep_private()
    if ran_here(run):
        return resume_here(console, run.absolute(), overrides)
    return resume_on_server(console, run, overrides, Operator(server, operator), insecure)
