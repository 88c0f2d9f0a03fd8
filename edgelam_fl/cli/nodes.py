"""Commands for machines: doctor, server, client. They parse and print; the work is done by the modules that they import."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from edgelam_fl.cli.options import (
    DeviceOption,
    InsecureOption,
    JsonOption,
    OfflineOption,
    console,
    messages,
    say,
)
from edgelam_fl.errors import EnvironmentProblem


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
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Checks this machine and suggests fixes; changes nothing. Exit code 3 if something is wrong.

    Python, packages, Flower's tools, names, ports, memory and disk, and a kernel of each base, really run on each chip.
    """
    from dataclasses import asdict

    from edgelam_fl.addresses import hub_address, split_address
    from edgelam_fl.doctor.checks import examine, finding_row
    from edgelam_fl.telemetry.waiting import waiting

    address = split_address(server, "--server") if server else None
    alone = split_address(data_plane, "--data-plane") if data_plane else None
    hub = hub_address(*address, data_plane) if address else alone
    findings = []
    with waiting(messages if as_json else console, "checking") as wait:
        for finding in examine(address, hub, model, wait.update):
            findings.append(finding)
            if not as_json:
                console.print(finding_row(finding))
    profile = None
    if measure:
        from edgelam_fl.doctor.measured import measured

        with waiting(messages, "measuring") as wait:
            shut = any(finding.check == "hub" and finding.state == "problem" for finding in findings)
            more, profile = measured(model, None if shut else hub, wait.update, device)
        findings += more
    problems = sum(finding.state == "problem" for finding in findings)
    if as_json and measure:
        found = {"findings": list(map(asdict, findings)), "profile": profile and profile.model_dump(mode="json")}
        say(json.dumps(found, indent=2))
    elif as_json:
        say(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        for finding in more if measure else ():
            console.print(finding_row(finding))
        if profile is not None:
            from edgelam_fl.doctor.show import profile_table

            console.print(profile_table(profile))
        say(f"{problems} of {len(findings)} checks found a problem" if problems else "all checks passed")
    raise typer.Exit(EnvironmentProblem.exit_code if problems else 0)


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
    strategies: Annotated[
        list[str],
        typer.Option(
            "--strategies",
            metavar="PACKAGE",
            help="A package or module from which run files may name strategies, besides the built-in ones; repeat it.",
        ),
    ] = [],  # noqa: B006
    runs: Annotated[
        Path,
        typer.Option("--runs", metavar="DIR", help="The folder below which runs get new folders, and nowhere else."),
    ] = Path("runs"),
    models: Annotated[
        list[Path],
        typer.Option(
            "--models",
            metavar="DIR",
            help="A folder below which run files may name models, besides built-in ones and those of a hub; repeat it.",
        ),
    ] = [Path("models")],  # noqa: B006
    address: Annotated[
        list[str],
        typer.Option(
            "--address",
            metavar="HOST",
            help="A name or IP address by which nodes reach this machine, for its certificate and for invites; repeat it.",
        ),
    ] = [],  # noqa: B006
    no_announce: Annotated[
        bool,
        typer.Option(
            "--no-announce",
            help="Do not say on the local network where this server is (multicast DNS, for --server auto).",
        ),
    ] = False,
    allow_foreign_apps: Annotated[
        bool,
        typer.Option(
            "--allow-foreign-apps",
            help="Run any Flower App that the operator submits, not only the one installed here.",
        ),
    ] = False,
    insecure: InsecureOption = False,
    offline: OfflineOption = False,
) -> None:
    """Runs the federation's server: Flower's SuperLink, and the data plane's hub. Ctrl-C ends it.

    It speaks TLS, with a certificate authority of its own that it makes at its first start, and lets in only nodes that
    were invited (edgelam invite). With --insecure it speaks plain text and lets in everybody, and warns at every start.
    """
    from edgelam_fl.bounds import operator_bounds
    from edgelam_fl.federation.server import ServerOptions, serve
    from edgelam_fl.files import keep_private

    keep_private()
    options = ServerOptions(
        listen=listen, state=state, data_plane=data_plane, addresses=address, insecure=insecure,
        bounds=operator_bounds(strategies, runs, models), allow_foreign_apps=allow_foreign_apps, announce=not no_announce,
    )  # fmt: skip
    raise typer.Exit(serve(console, options))


def client(
    join_text: Annotated[
        str,
        typer.Option("--join", metavar="TEXT", help="Joins with the text that `edgelam invite` printed; needed once."),
    ] = "",
    server: Annotated[
        str,
        typer.Option(
            "--server",
            metavar="HOST:PORT|auto",
            help="Where `edgelam server` listens, if it is not where the join text says; auto: look for it on this network at each start.",
        ),
    ] = "",
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", metavar="FILE", help="This device's examples (.jsonl, .csv, .txt ...). Without: an edge server."
        ),
    ] = None,
    eval_data: Annotated[
        Path | None,
        typer.Option(
            "--eval-data",
            metavar="FILE",
            help="Examples that this device measures with and never learns; without, a share of --data (data.held_out).",
        ),
    ] = None,
    name: Annotated[
        str, typer.Option("--name", help="The node that starts, if several have joined from this directory.")
    ] = "",
    listen: Annotated[
        str,
        typer.Option(
            "--listen",
            metavar="HOST:PORT",
            help="Where other nodes reach this node; 'relay': nowhere (behind a router), so they come through the server. An edge server without it takes a free port of this machine; a device with it may host layers for others (split.host_on = 'any').",
        ),
    ] = "",
    advertise: Annotated[
        str,
        typer.Option("--advertise", metavar="HOST:PORT", help="Edge server: its address as other nodes see it."),
    ] = "",
    threads: Annotated[int, typer.Option("--threads", min=0, help="CPU threads; 0: all.")] = 0,
    state: Annotated[
        Path | None, typer.Option("--state", metavar="DIR", help="Folder for logs and the node's state.")
    ] = None,
    tag: Annotated[
        list[str],
        typer.Option(
            "--tag",
            metavar="NAME",
            help="A word by which a run may choose this node (strategy.require_tags); repeat it.",
        ),
    ] = [],  # noqa: B006
    metrics: Annotated[
        list[str],
        typer.Option(
            "--metrics",
            metavar="MODULE",
            help="A package or module from which run files may name metrics (task.metrics), besides the built-in ones; repeat it.",
        ),
    ] = [],  # noqa: B006
    trust: Annotated[
        str,
        typer.Option(
            "--trust",
            metavar="hosts|measured:X|none",
            help="What hosts may read of this device's text: all of it (hosts), a measured share of at most X (measured:0.2), or nothing (none: only runs without hosts). A plan that leaks more is refused here, whatever the run file says.",
        ),
    ] = "",
    device: DeviceOption = "",
    wait: Annotated[
        bool,
        typer.Option("--wait/--no-wait", help="Say that no server answers at the address, and try on; or end at once."),
    ] = True,
    insecure: InsecureOption = False,
    offline: OfflineOption = False,
) -> None:
    """Makes this machine a node of a federation: joins with --join the first time, and later starts without options.

    A device has data, whose bytes stay on it: what travels is hidden states, gradients and adapters. Hosts can read content in
    hidden states: --trust limits that, and `edgelam leakage` measures it. Ctrl-C ends the node.
    """
    from edgelam_fl.federation.join import join
    from edgelam_fl.federation.standing import NodeOptions
    from edgelam_fl.files import keep_private
    from edgelam_fl.tasks.named import local_data

    keep_private()
    data, eval_data = (local_data(file) if file else None for file in (data, eval_data))
    options = NodeOptions(
        server, data, listen, advertise, threads, tuple(tag), trust, device, eval_data, tuple(metrics)
    )
    raise typer.Exit(join(console, options, join_text=join_text, name=name, state=state, insecure=insecure, wait=wait))
