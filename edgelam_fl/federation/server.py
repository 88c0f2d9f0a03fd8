"""Runs `edgelam server`: Flower's SuperLink and the hub, watched until Ctrl-C. Knows neither runs nor nodes."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from edgelam_fl.addresses import check_port_free, hub_address, split_address
from edgelam_fl.bounds import DEFAULT_BOUNDS, Bounds
from edgelam_fl.errors import INTERRUPTED
from edgelam_fl.federation.child import Child, Restarts, end_all, pause, shorten
from edgelam_fl.federation.discovery import announced, announced_addresses
from edgelam_fl.federation.flower_app import app_folder
from edgelam_fl.federation.hub_process import HubProcess
from edgelam_fl.federation.operator import operator_folder
from edgelam_fl.federation.superlink import start_superlink
from edgelam_fl.telemetry.waiting import waiting
from edgelam_fl.trust.server import ServerTrust, own_addresses, prepare_trust, trust_folder

_WATCH_S = 0.5  # between two looks at logs and the hub


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """What a server is told when it starts."""

    listen: str
    """HOST:PORT of the SuperLink."""
    state: Path
    data_plane: str = ""
    """HOST:PORT of the hub; "": one port after `listen`."""
    addresses: Sequence[str] = ()
    """Host names and IP addresses by which nodes reach this machine; by default those that it finds itself."""
    insecure: bool = False
    """Plain text for everybody, in place of TLS for members."""
    bounds: Bounds = DEFAULT_BOUNDS
    """What run files may name on this machine."""
    announce: bool = True
    """Says on the local network where it is (multicast DNS)."""
    allow_foreign_apps: bool = False
    """Runs may bring any Flower App, which then runs on this machine."""


def serve(console: Console, options: ServerOptions) -> int:
    """Starts SuperLink and hub and watches them until Ctrl-C; returns the exit code.

    A process that ends is started again. Raises UsageError for an address that may not be used, EnvironmentProblem for a port
    that is taken, RunFailed if a process keeps ending.
    """
    host, port = split_address(options.listen, "--listen")
    state = options.state
    hub = HubProcess(*hub_address(host, port, options.data_plane), state / "hub", insecure=options.insecure)
    children: list[Child] = []
    trust = None
    try:
        with waiting(console, "starting Flower's SuperLink"):
            check_port_free(host, port, "--listen")
            if not options.insecure:
                trust = prepare_trust(state, host, port, options.addresses)
                hub.identity, hub.members = trust.identity, trust_folder(state)
            hub.begin()
            children.append(
                start_superlink(
                    host, port, state, beside=hub, trust=trust, bounds=options.bounds, keep=True,
                    allow_foreign_apps=options.allow_foreign_apps,
                )
            )  # fmt: skip
            hub.await_start()
        for line in [*_where(options, hub), *(_next_steps(options) if trust else _plain_steps(options))]:
            console.print(line, highlight=False, soft_wrap=True, markup=False)
        with ExitStack() as stack:
            if options.announce:
                console.print(_announce(stack, options, trust), highlight=False, soft_wrap=True, markup=False)
            return _watch(console, hub, children)
    finally:
        end_all([*children, *([hub.child] if hub.child is not None else [])])


def _announce(stack: ExitStack, options: ServerOptions, trust: ServerTrust | None) -> str:
    """Announces the server until the stack ends; returns what to tell its user."""
    host, port = split_address(options.listen, "--listen")
    addresses = announced_addresses([*options.addresses, *own_addresses(host)])
    if not addresses:
        return "not announced on the network: it listens on this machine alone"
    try:
        stack.enter_context(announced(port, addresses, trust.authority.fingerprint if trust else ""))
    except OSError as error:
        return f"not announced on the network ({error.strerror or error}); nodes need its address"
    return f"announced on the network as {', '.join(addresses)}: there `edgelam client --server auto` finds it; --no-announce leaves that out"


def _where(options: ServerOptions, hub: HubProcess) -> list[str]:
    return [f"SuperLink listens on {options.listen}, the data plane's hub on port {hub.port}; logs in {options.state}"]


def _next_steps(options: ServerOptions) -> list[str]:
    state = shlex.quote(str(options.state))
    operator = shlex.quote(str(operator_folder(options.state).absolute()))
    return [
        f"for each node, here:  edgelam invite NAME --state {state}   (an edge server: --role host); it prints the node's command",
        f"then:                 edgelam run RUN.toml --server {options.listen} --operator {operator}",
        f"for Flower's `flwr`:  export FLWR_HOME={operator}; then, in {shlex.quote(str(app_folder()))}:",
        '                      flwr run . --run-config "federation.rounds=2"; flwr list; flwr log RUN_ID',
    ]


def _plain_steps(options: ServerOptions) -> list[str]:
    """Returns what to do next with a server that speaks plain text, after a warning."""
    _invite, *others = _next_steps(options)
    return [
        "WARNING: --insecure. Everything that is sent is plain text: whoever is on the way reads and changes activations, "
        "gradients and adapters, and anybody who reaches these ports takes part. Without --insecure, members alone do",
        f"next, on each node:   edgelam client --server {options.listen} --data FILE --insecure   (an edge server: without --data)",
        *others,
    ]


def _watch(console: Console, hub: HubProcess, children: list[Child]) -> int:
    """Looks after the processes until Ctrl-C. `children`: the SuperLink alone, which is replaced when it has ended."""
    restarts = Restarts()
    try:
        while True:
            news = [hub.watch()]
            shorten(children[0].log)
            if problem := children[0].ended():
                restarts.note(problem)
                children[0] = children[0].again()
                news.append(f"{problem}; it was started again, and runs in progress go on from their last checkpoints")
            for words in filter(None, news):
                console.print(words, highlight=False, soft_wrap=True, markup=False)
            pause(_WATCH_S, [*children, *([hub.child] if hub.child is not None else [])])
    except KeyboardInterrupt:
        console.print("server ended; runs in progress go on from their last checkpoints when it is started again")
        return INTERRUPTED
