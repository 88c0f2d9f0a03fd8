"""The commands. They parse, check and print; the work is done by the modules that they name.

Imports at the top stay light, so that `--help` answers at once; what needs torch or Flower is imported where it is used.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from edgelam_fl import __version__
from edgelam_fl.errors import ConfigError, EdgelamError

app = typer.Typer(
    name="edgelam",
    help="Fine-tune a language model that no single device can train, on devices that keep their data.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
console = Console()
errors = Console(stderr=True)

ServerOption = Annotated[str, typer.Option("--server", metavar="HOST:PORT", help="Where `edgelam server` listens.")]
InsecureOption = Annotated[
    bool, typer.Option("--insecure", help="Allow plain text beyond this machine, on a network that you trust.")
]


def _go_offline(value: bool) -> bool:
    """Before anything asks: the libraries read it when they are imported, and every process started here inherits it."""
    if value:
        os.environ["HF_HUB_OFFLINE"] = "1"
    return value


OfflineOption = Annotated[
    bool,
    typer.Option(
        "--offline",
        callback=_go_offline,
        help="Download from no model hub of the internet; slices of the model still come from the federation's server.",
    ),
]
SetOption = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override any key of the run file; may be repeated.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")]


def main() -> None:
    run_commands(app, "edgelam")


def run_commands(app: typer.Typer, name: str) -> None:
    """Runs a command of `app`; every foreseen error ends in one message and its exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # systemd's way to say Ctrl-C
    try:
        status = app(standalone_mode=False)
    except EdgelamError as error:
        errors.print(f"[bold red]{name}:[/bold red] {_plain(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        errors.print(f"{name}: interrupted")
        sys.exit(130)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except typer.Abort:
        sys.exit(130)
    except Exception as error:
        show = getattr(error, "show", None)  # click's own usage errors
        if show is None:
            raise
        show()
        sys.exit(2)
    sys.exit(status or 0)


def _plain(text: str) -> str:
    return text.replace("[", "\\[")


def _say(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _version(value: bool) -> None:
    if value:
        console.print(f"edgelam-fl {__version__}", highlight=False)
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
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

    Every key of every section is in it, with its range, its default and what it does.
    """
    from edgelam_fl.cli.run_file import write_run_file

    for choice in write_run_file(file, data, model):
        _say(choice)
    _say(f"wrote {file}; `edgelam run {file} --explain` shows what it says")


@app.command()
def demo(
    devices: Annotated[int, typer.Option("--devices", min=1, max=16, help="How many devices to play.")] = 3,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="The run's folder; by default runs/demo-<time>.")
    ] = None,
    overrides: SetOption = [],  # noqa: B006 - typer reads the default
) -> None:
    """A complete federation on this machine, in minutes.

    Starts a Flower SuperLink, one edge server and some devices as separate processes, and fine-tunes SmolLM2-135M on
    questions about Python's standard library. Each device owns the docstrings of other modules, and keeps them.
    """
    from edgelam_fl.federation.demo import run_demo

    raise typer.Exit(run_demo(console, devices, out, overrides))


@app.command()
def doctor(
    server: Annotated[str, typer.Option("--server", metavar="HOST:PORT", help="Also check the way to a server.")] = "",
    model: Annotated[str, typer.Option("--model", metavar="NAME", help="Also check that a model is here.")] = "",
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Also measure: memory, disk, a layer of --model, the link to --server's hub."),
    ] = False,
    data_plane: Annotated[
        str,
        typer.Option("--data-plane", metavar="HOST:PORT", help="The hub's address, if it is not --server's port + 1."),
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """What is wrong on this machine, and what mends it; changes nothing. Exit code 3 if something is wrong.

    Python, packages, Flower's tools, names, ports, memory and disk, and a kernel of each base, really run.
    """
    from dataclasses import asdict

    from edgelam_fl.addresses import hub_address, split_address
    from edgelam_fl.doctor.checks import examine, findings_table

    address = split_address(server, "--server") if server else None
    alone = split_address(data_plane, "--data-plane") if data_plane else None
    hub = hub_address(*address, data_plane) if address else alone
    with errors.status("looking"):
        findings = list(examine(address, hub, model))
    profile = None
    if measure:
        from edgelam_fl.doctor.measured import measured

        with errors.status("measuring") as status:
            shut = any(finding.check == "hub" and finding.state == "problem" for finding in findings)
            more, profile = measured(model, None if shut else hub, status.update)
        findings += more
    problems = sum(finding.state == "problem" for finding in findings)
    if as_json and measure:
        found = {"findings": list(map(asdict, findings)), "profile": profile and profile.model_dump(mode="json")}
        _say(json.dumps(found, indent=2))
    elif as_json:
        _say(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        console.print(findings_table(findings))
        if profile is not None:
            from edgelam_fl.doctor.show import profile_table

            console.print(profile_table(profile))
        _say(f"{problems} of {len(findings)} checks found something to mend" if problems else "nothing to mend")
    raise typer.Exit(3 if problems else 0)


@app.command()
def top(
    folder: Annotated[
        Path | None, typer.Argument(metavar="RUN", help="A run's folder; by default the newest under runs/.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Print one table and end.")] = False,
    as_json: JsonOption = False,
) -> None:
    """A run's nodes: what each holds, busy and waiting time, bytes, and why any left; live, until the run ends.

    Busy and waiting are of the latest round's training. With --json, one object as things are now.
    """
    from edgelam_fl.telemetry.top import follow, newest_run

    follow(console, folder or newest_run(), once, as_json)


@app.command()
def plan(
    file: Annotated[Path, typer.Argument(metavar="RUN.toml", help="The run file: model, split, training.")],
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
    insecure: InsecureOption = False,
) -> None:
    """Who would hold what, with predicted memory, time and bytes, and what limits it; changes nothing.

    With split.cuts = "auto" it is what the planner would choose; --set tries another run file on the same nodes.
    """
    from edgelam_fl.config import read_run_file
    from edgelam_fl.federation.plan_view import plan_of_profiles, plan_on_server, plan_view

    config = read_run_file(file, overrides)
    if (profiles is None) == (not server):
        raise ConfigError("edgelam plan needs either --profiles FILE or --server HOST:PORT, to know the nodes")
    if profiles is not None:
        placement = plan_of_profiles(config, profiles)
    else:
        from edgelam_fl.addresses import check_server_answers
        from edgelam_fl.model.source import find_model

        check_server_answers(server, insecure)
        placement = plan_on_server(errors, config, find_model(config.model.name), server)
    if as_json:
        _say(json.dumps(placement, indent=2))
    else:
        console.print(plan_view(placement), highlight=False, soft_wrap=True)


@app.command()
def run(
    file: Annotated[Path, typer.Argument(metavar="RUN.toml", help="The run file: model, split, training.")],
    server: ServerOption = "127.0.0.1:8000",
    local: Annotated[
        int, typer.Option("--local", metavar="N", min=0, max=16, help="Play the server and N devices here.")
    ] = 0,
    data: Annotated[
        list[Path],
        typer.Option(
            "--data", metavar="FILE", help="With --local: one file a device (.jsonl, .csv, .txt ...); repeat it."
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
    insecure: InsecureOption = False,
    offline: OfflineOption = False,
) -> None:
    """Fine-tunes as a run file says, on the nodes that have joined a server.

    With --local N, this machine plays all parts instead: the server, an edge server and N devices.
    """
    from edgelam_fl.config import read_run_file
    from edgelam_fl.federation.runs import check_run, leave_on_server, run_here, run_on_server

    config = read_run_file(file, overrides)
    if explain:
        from edgelam_fl.cli.run_file import described

        _say(described(config, mark_changed=True))
        raise typer.Exit()
    if local and len(data) != local:
        raise ConfigError(f"--local {local} needs --data once a device ({local} times), got it {len(data)} times")
    if data and not local:
        raise ConfigError(
            "--data belongs to --local; a device that joins a server brings its own: edgelam client --data FILE"
        )
    if local and detach:
        raise ConfigError(
            "--detach needs a server that stays: with --local the federation lives in this command and would end with it. "
            "Start `edgelam server` and `edgelam client` first, then run without --local"
        )
    folder = check_run(config, file.stem, out)
    if detach:
        raise typer.Exit(leave_on_server(console, config, folder, server, insecure))
    if local:
        raise typer.Exit(run_here(console, config, folder, data))
    raise typer.Exit(run_on_server(console, config, folder, server, insecure))


@app.command()
def server(
    listen: Annotated[
        str, typer.Option("--listen", metavar="HOST:PORT", help="Where nodes and runs reach this server.")
    ] = "127.0.0.1:8000",
    data_plane: Annotated[
        str,
        typer.Option(
            "--data-plane",
            metavar="HOST:PORT",
            help="Where nodes reach its hub, which serves slices of the model; by default --listen's host, its port + 1.",
        ),
    ] = "",
    state: Annotated[Path, typer.Option("--state", metavar="DIR", help="Folder for logs and Flower's state.")] = Path(
        ".edgelam/server"
    ),
    insecure: InsecureOption = False,
    offline: OfflineOption = False,
) -> None:
    """The federation's server: Flower's SuperLink, and the data plane's hub. Ctrl-C ends it."""
    from edgelam_fl.federation.server import serve

    raise typer.Exit(serve(console, listen, data_plane, state, insecure))


@app.command()
def client(
    server: ServerOption,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", metavar="FILE", help="This device's examples (.jsonl, .csv, .txt ...). Without: an edge server."
        ),
    ] = None,
    name: Annotated[str, typer.Option("--name", help="Unique in the federation; by default the host's name.")] = "",
    listen: Annotated[
        str,
        typer.Option(
            "--listen",
            metavar="HOST:PORT",
            help="Where other nodes reach it; 'relay': nowhere (behind a router), so they come through the server. An edge server without it takes a free port of this machine; a device with it may host layers for others (split.host_on = 'any').",
        ),
    ] = "",
    advertise: Annotated[
        str,
        typer.Option("--advertise", metavar="HOST:PORT", help="Edge server: its address as others see it, if another."),
    ] = "",
    threads: Annotated[int, typer.Option("--threads", min=0, help="CPU threads; 0: all.")] = 0,
    state: Annotated[
        Path | None, typer.Option("--state", metavar="DIR", help="Folder for logs and the node's state.")
    ] = None,
    tag: Annotated[
        list[str],
        typer.Option(
            "--tag", metavar="NAME", help="A word by which a run may choose it (strategy.require_tags); repeat it."
        ),
    ] = [],  # noqa: B006
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait for a server that does not answer yet, as a service at boot must.")
    ] = False,
    insecure: InsecureOption = False,
    offline: OfflineOption = False,
) -> None:
    """This machine joins a federation: as a device with --data, else as an edge server that lends compute.

    The data never leave the machine: what travels is hidden states, gradients and adapters. Ctrl-C ends it.
    """
    from edgelam_fl.federation.join import join

    raise typer.Exit(
        join(
            console, server=server, data=data, name=name, listen=listen, advertise=advertise, threads=threads, state=state,
            tags=tag, insecure=insecure, wait=wait,
        )
    )  # fmt: skip


@app.command()
def bench(
    file: Annotated[Path, typer.Argument(metavar="MATRIX.toml", help="The matrix: data, axes, what all cells share.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Where results are, or go on; by default runs/bench-<name>."),
    ] = None,
    jobs: Annotated[
        int, typer.Option("--jobs", min=1, max=16, help="Cells at a time, each with a process for its nodes.")
    ] = 2,
) -> None:
    """Ranks strategies: every combination of a matrix, each a federation on Flower's simulation engine.

    Finished cells are kept in cells.jsonl and never run again, so an interrupted matrix goes on where it was. Leaves tables
    (results.md) and a page of plots (results.html). Needs the extra: pip install 'edgelam-fl\\[bench]'.
    """
    from edgelam_fl.bench.command import bench as work

    raise typer.Exit(work(console, file, out, jobs))


@app.command()
def report(folder: RunArgument) -> None:
    """Draws a run's page and table again, also of a run that failed or goes on."""
    from edgelam_fl.telemetry.events import read_events
    from edgelam_fl.telemetry.report.incidents import failure
    from edgelam_fl.telemetry.report.page import write_report
    from edgelam_fl.telemetry.summary import build_summary, summary_table

    if not (folder / "events.jsonl").is_file():
        raise ConfigError(f"{folder} is no run's folder: it has no events.jsonl")
    events = list(read_events(folder / "events.jsonl"))
    console.print(summary_table(build_summary(events)))
    for heading, text in failure(events):
        console.print(f"{heading.lower()}: {text}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"page: {write_report(folder)}", highlight=False, soft_wrap=True)


@app.command()
def export(
    folder: RunArgument,
    to: Annotated[str, typer.Option("--to", metavar="peft|merged", help="The adapter alone, or merged into its base.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="A new folder; by default RUN/peft or RUN/merged.")
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="fp32|bf16", help="merged: of the weights; by default fp32.")
    ] = "",
) -> None:
    """Writes a run's result in a form that other tools load, EdgeLAM-FL not needed.

    peft: the adapter, a few MB, checked against its base. merged: a Hugging Face model folder; this takes the whole model
    in memory, 4 bytes a weight, and is made of the base as it was before any quantization.
    """
    from edgelam_fl.serving.export import export as write
    from edgelam_fl.serving.results import open_result

    result = open_result(folder)
    with console.status("exporting"):
        made, how = write(result, to, out, dtype)
    _say(f"wrote {made}; elsewhere:\n{how}")


@app.command()
def chat(
    folder: RunArgument,
    prompt: Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="Ask this alone.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="The longest answer.")] = 128,
    base: Annotated[bool, typer.Option("--base", help="The model as it came, to compare.")] = False,
    server: Annotated[
        str,
        typer.Option("--server", metavar="HOST:PORT", help="Answer over the hosts of the federation at this server."),
    ] = "",
    insecure: InsecureOption = False,
) -> None:
    """Talks to a run's result: the whole model on this machine, with the run's adapter.

    With --server the hosts of a federation compute the layers between, as in training; the text stays here. It is for the
    server's machine. Answers are greedy: the same question gives the same words. With --prompt, only the answer is printed.
    """
    from edgelam_fl.serving.chat import check_can_talk, converse
    from edgelam_fl.serving.results import open_result

    result = open_result(folder)
    check_can_talk(result.config, prompt)
    if server and base:
        raise ConfigError(
            "--base and --server do not go together: the hosts hold the run's adapter; leave out --server"
        )
    if server:
        from edgelam_fl.addresses import check_server_answers

        check_server_answers(server, insecure)
        with errors.status("loading PyTorch"):
            from edgelam_fl.federation.remote import route_speaker
        with route_speaker(result, server, errors) as speaker:
            converse(speaker, errors, prompt, max_tokens, tuned=True)
        return
    with errors.status("loading the model"):
        from edgelam_fl.serving.generate import LocalSpeaker

        local = LocalSpeaker(result.config.model, result.config.task)
        if not base:
            local.put_on(result.adapter)
    converse(local, errors, prompt, max_tokens, tuned=not base)
