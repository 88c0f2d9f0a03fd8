"""Commands for the members of a federation: invite, nodes, revoke. They work on the server's machine, by its state folder."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from edgelam_fl.cli.options import JsonOption, console, messages, say
from edgelam_fl.errors import EnvironmentProblem

_StateOption = Annotated[
    Path, typer.Option("--state", metavar="DIR", help="The state folder that `edgelam server` was started with.")
]
_STATE = Path(".edgelam/server")


def invite(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The node's name in the federation.")],
    role: Annotated[
        str, typer.Option("--role", metavar="device|host", help="A device has data; a host lends compute.")
    ] = "device",
    expires: Annotated[
        str, typer.Option("--expires", metavar="TIME", help="How long the command is good: 30m, 1h, 7d.")
    ] = "1h",
    state: _StateOption = _STATE,
    as_json: JsonOption = False,
) -> None:
    """Prints the command that lets one machine join, once, as text and as a QR code. Run it on the server's machine.

    Whoever has the command may join under this name until it is used or expires, so send it by a way that you trust.
    """
    from dataclasses import asdict

    from edgelam_fl.trust.invites import Invitation, parse_duration_s
    from edgelam_fl.trust.members import day
    from edgelam_fl.trust.server import open_trust

    valid_s = parse_duration_s(expires, "--expires")
    trust = open_trust(state)
    token = trust.members.invite(name, role, valid_s)
    invitation = Invitation(trust.address, role, name, token, trust.authority.fingerprint)
    if as_json:
        say(json.dumps({**asdict(invitation), "text": invitation.text, "command": invitation.command}, indent=2))
        return
    say(f"on the machine that is to be {name}, until {day(time.time() + valid_s)}:\n\n{invitation.command}\n")
    if console.is_terminal:
        import segno

        segno.make(invitation.command, error="l").terminal(compact=True)


def nodes(state: _StateOption = _STATE, as_json: JsonOption = False) -> None:
    """Lists the federation's nodes: name, role, since when, until when the certificate lasts, and who was revoked."""
    from rich.table import Table

    from edgelam_fl.trust.members import day
    from edgelam_fl.trust.server import known_nodes, open_trust

    known = known_nodes(open_trust(state).members)
    if as_json:
        say(json.dumps(known, indent=2))
        return
    if not known:
        say("no node has joined yet; edgelam invite NAME prints the command for the first")
        return
    table = Table("node", "role", "since", "last seen", "certificate until", "state")
    for node in known:
        times = (day(node[key]) if node[key] else "" for key in ("since", "seen", "until"))
        table.add_row(
            node["name"], node["role"], *times, f"revoked {day(node['revoked'])}" if node["revoked"] else "member"
        )
    console.print(table)


def revoke(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The node, or an invite that was not used yet.")],
    state: _StateOption = _STATE,
) -> None:
    """Ends a node's membership at once, or withdraws its invite. The node's keys are worth nothing from now on."""
    from edgelam_fl.trust.join import sync
    from edgelam_fl.trust.server import open_trust

    trust = open_trust(state)
    if not trust.members.revoke(name):
        say(f"the invite for {name} is withdrawn")
        return
    try:
        sync(trust.local_address, trust.authority.certificate)
    except EnvironmentProblem as problem:
        messages.print(f"{name} is revoked; Flower forgets it when the server starts ({problem})", soft_wrap=True)
        return
    say(f"{name} is revoked: the server, and every host as soon as it hears of it, refuse its keys")
