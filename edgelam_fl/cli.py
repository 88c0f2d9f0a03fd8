"""The commands. They parse, check and print; the work is done by the modules that they name.

Imports at the top stay light, so that `--help` answers at once; what needs torch or Flower is imported where it is used.
"""

from __future__ import annotations

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
SetOption = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override any key of the run file; may be repeated.")
]


def main() -> None:
    """Runs a command; every foreseen error ends in one message and its exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # systemd's way to say Ctrl-C
    try:
        status = app(standalone_mode=False)
    except EdgelamError as error:
        errors.print(f"[bold red]edgelam:[/bold red] {_plain(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        errors.print("edgelam: interrupted")
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
    from edgelam_fl.demo import run_demo

    raise typer.Exit(run_demo(console, devices, out, overrides))


@app.command()
def run(
    file: Annotated[Path, typer.Argument(metavar="RUN.toml", help="The run file: model, split, training.")],
    server: ServerOption = "127.0.0.1:8000",
    local: Annotated[
        int, typer.Option("--local", metavar="N", min=0, max=16, help="Play the server and N devices here.")
    ] = 0,
    data: Annotated[
        list[Path],
        typer.Option("--data", metavar="FILE", help="With --local: one JSON-lines file a device; repeat it."),
    ] = [],  # noqa: B006
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="The run's folder; by default run.out of the file.")
    ] = None,
    overrides: SetOption = [],  # noqa: B006
    insecure: InsecureOption = False,
) -> None:
    """Fine-tunes as a run file says, on the nodes that have joined a server.

    With --local N, this machine plays all parts instead: the server, an edge server and N devices.
    """
    from edgelam_fl.config import read_run_file
    from edgelam_fl.running import check_run, run_here, run_on_server

    config = read_run_file(file, overrides)
    if local and len(data) != local:
        raise ConfigError(f"--local {local} needs --data once a device ({local} times), got it {len(data)} times")
    if data and not local:
        raise ConfigError(
            "--data belongs to --local; a device that joins a server brings its own: edgelam client --data FILE"
        )
    folder = check_run(config, file.stem, out)
    if local:
        raise typer.Exit(run_here(console, config, folder, data))
    raise typer.Exit(run_on_server(console, config, folder, server, insecure))


@app.command()
def server(
    listen: Annotated[
        str, typer.Option("--listen", metavar="HOST:PORT", help="Where nodes and runs reach this server.")
    ] = "127.0.0.1:8000",
    state: Annotated[Path, typer.Option("--state", metavar="DIR", help="Folder for logs and Flower's state.")] = Path(
        ".edgelam/server"
    ),
    insecure: InsecureOption = False,
) -> None:
    """The federation's server: Flower's SuperLink. Ctrl-C ends it."""
    from edgelam_fl.running import serve

    raise typer.Exit(serve(console, listen, state, insecure))


@app.command()
def client(
    server: ServerOption,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="FILE", help="This device's examples (JSON lines). Without: an edge server."),
    ] = None,
    name: Annotated[str, typer.Option("--name", help="Unique in the federation; by default the host's name.")] = "",
    listen: Annotated[
        str, typer.Option("--listen", metavar="HOST:PORT", help="Edge server: where devices reach it.")
    ] = "127.0.0.1:0",
    advertise: Annotated[
        str,
        typer.Option("--advertise", metavar="HOST:PORT", help="Edge server: its address as others see it, if another."),
    ] = "",
    threads: Annotated[int, typer.Option("--threads", min=0, help="CPU threads; 0: all.")] = 0,
    state: Annotated[
        Path | None, typer.Option("--state", metavar="DIR", help="Folder for logs and the node's state.")
    ] = None,
    insecure: InsecureOption = False,
) -> None:
    """This machine joins a federation: as a device with --data, else as an edge server that lends compute.

    The data never leave the machine: what travels is hidden states, gradients and adapters. Ctrl-C ends it.
    """
    from edgelam_fl.running import join

    raise typer.Exit(join(console, server, data, name, listen, advertise, threads, state, insecure))


@app.command()
def report(folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")]) -> None:
    """Draws a run's page and table again, also of a run that failed or goes on."""
    from edgelam_fl.telemetry.events import read_events
    from edgelam_fl.telemetry.incidents import failure
    from edgelam_fl.telemetry.report import write_report
    from edgelam_fl.telemetry.summary import build_summary, summary_table

    if not (folder / "events.jsonl").is_file():
        raise ConfigError(f"{folder} is no run's folder: it has no events.jsonl")
    events = list(read_events(folder / "events.jsonl"))
    console.print(summary_table(build_summary(events)))
    for heading, text in failure(events):
        console.print(f"{heading.lower()}: {text}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"page: {write_report(folder)}", highlight=False, soft_wrap=True)
