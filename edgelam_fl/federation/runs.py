"""Runs a federation from a run file: on a server, or on this machine as processes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from edgelam_fl.addresses import answers, check_plain_text, split_address
from edgelam_fl.config import RunConfig
from edgelam_fl.errors import ConfigError, EnvironmentProblem, RunFailed
from edgelam_fl.federation.flower_app import app_module
from edgelam_fl.federation.local import await_result, kept, local_federation
from edgelam_fl.federation.node_process import Node
from edgelam_fl.federation.submission import Submission
from edgelam_fl.telemetry.console import RunView
from edgelam_fl.telemetry.events import EventTail
from edgelam_fl.telemetry.summary import summary_table

INTERRUPTED = 130
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}"


def check_run(config: RunConfig, name: str, out: Path | None) -> Path:
    """Everything that can be wrong with a run file is said before anything starts. Returns the run's folder, still absent."""
    app_module("server.checks").check_config(config)
    pattern = str(out) if out else config.run.out
    folder = (
        Path(pattern.replace("{name}", name).replace("{time}", time.strftime("%Y%m%d-%H%M%S"))).expanduser().absolute()
    )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"the run's folder {folder} exists; choose another with --out (nothing is ever overwritten)")
    return folder


def check_server(server: str, insecure: bool, command: str) -> None:
    """Raises ConfigError or EnvironmentProblem where the address may not be used, or nobody answers there."""
    host, port = split_address(server, "--server")
    check_plain_text(host, "--server", insecure)
    _check_answers(host, port, command)


def _check_answers(host: str, port: int, command: str) -> None:
    if not answers(host, port):
        raise EnvironmentProblem(
            f"no server answers at {host}:{port}; start one there with `edgelam server --listen {host}:{port}`, "
            f"or give `{command}` another --server"
        )


# ---------------------------------------------------------------- a run


def run_on_server(console: Console, config: RunConfig, folder: Path, server: str, insecure: bool) -> int:
    _check_server(server, insecure)
    view = RunView(console, config.federation.rounds, config.federation.local_steps)
    return follow(console, view, config, folder, server, [], lambda: None)


def leave_on_server(console: Console, config: RunConfig, folder: Path, server: str, insecure: bool) -> int:
    """Submits the run and says how to follow and to stop it; it goes on without this command."""
    _check_server(server, insecure)
    submission = Submission(server, folder / "flwr")
    with console.status("handing the run to Flower"):
        run_id = submission.submit(config, folder)
    lines = [f"Flower run {run_id}; folder {folder}, on the server's machine", "", *submission.how_to(folder)]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    return 0


def _check_server(server: str, insecure: bool) -> None:
    host, port = split_address(server, "--server")
    check_plain_text(host, "--server", insecure)
    if not answers(host, port):
        raise EnvironmentProblem(
            f"no server answers at {server}. Two ways out: start one with `edgelam server` and let nodes join with "
            f"`edgelam client`, or let this machine play all parts: add --local 3 --data FILE --data FILE --data FILE"
        )


def run_here(console: Console, config: RunConfig, folder: Path, data: Sequence[Path]) -> int:
    """Plays a federation of separate processes on this machine, from start to end of one run. Returns the exit code."""
    view = RunView(console, config.federation.rounds, config.federation.local_steps)

    def watch() -> None:
        for news in here.watch():
            view.say(news)

    try:
        with ExitStack() as stack:
            with console.status("starting Flower's SuperLink"):
                here = stack.enter_context(local_federation(config, data, folder))
            view.say(
                f"started a SuperLink, {len(here.edges)} edge servers and {len(here.devices)} devices as {here.processes} processes"
            )
            return follow(console, view, here.config, folder, here.server, here.nodes, watch)
    except KeyboardInterrupt:
        console.print(kept(folder))
        return INTERRUPTED


def follow(
    console: Console,
    view: RunView,
    config: RunConfig,
    folder: Path,
    server: str,
    nodes: Sequence[Node],
    watch: Callable[[], None],
) -> int:
    """Submits the run and shows its events until it ends. Returns 0; raises RunFailed with the run's own reason."""
    submission = Submission(server, folder / "flwr")
    with console.status("handing the run to Flower"):
        run_id = submission.submit(config, folder)
    view.say(f"Flower run {run_id}; folder {folder}")
    tails = {node.name: EventTail(node.state / "events.jsonl") for node in nodes}

    def meanwhile() -> bool:
        """Shows the nodes' own events and looks after the processes; true if a node was heard."""
        news = [(event, name) for name, tail in tails.items() for event in tail.poll()]
        for event, name in news:
            view.feed(event, name)
        watch()
        return bool(news)

    try:
        with view:
            for event in submission.events(meanwhile=meanwhile, say=view.say):
                view.feed(event)
                if event["event"] == "run_failed":
                    raise RunFailed(f"the run failed: {event['reason']}; {event['kept']}")
    except KeyboardInterrupt:
        console.print(f"stopping the run. {kept(folder)}", soft_wrap=True)
        submission.stop()
        return INTERRUPTED
    _show_result(console, folder)
    return 0


def _show_result(console: Console, folder: Path) -> None:
    await_result(folder)
    console.print(summary_table(json.loads((folder / "summary.json").read_text(encoding="utf-8"))))
    console.print(f"run: {folder}\npage: {folder / 'report.html'}", highlight=False, soft_wrap=True)
