"""As whom this machine takes part: by a join text, by the keys of an earlier join, or, in plain text, under any name.

Knows the files in which a node keeps its keys and its options; starts no process.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from edgelam_fl.addresses import split_address
from edgelam_fl.errors import ConfigError, EnvironmentProblem
from edgelam_fl.federation.discovery import AUTO
from edgelam_fl.files import write_private
from edgelam_fl.names import why_no_name
from edgelam_fl.trust.identity import DEVICE, fingerprint, load_identity
from edgelam_fl.trust.invites import Invitation, parse_invitation
from edgelam_fl.trust.join import Membership, has_joined, join

_STATES = Path(".edgelam")
_IDENTITY, _OPTIONS = "identity", "options.json"
_FILES = ("data", "eval_data")  # options that are paths


@dataclass(frozen=True)
class NodeOptions:
    """What a node is told when it starts; a node that joined keeps what it was told then. Empty values say nothing."""

    server: str = ""
    """HOST:PORT; "auto": the one of this node's federation that announces itself."""
    data: Path | None = None
    listen: str = ""
    advertise: str = ""
    threads: int = 0
    tags: Sequence[str] = ()
    trust: str = ""
    """What a device's owner lets hosts read of its text, as split.trust; "": all."""
    device: str = ""
    """What the node computes on, as --device; "": auto."""
    eval_data: Path | None = None
    metrics: Sequence[str] = ()
    """Modules that a run may take metrics of its own from."""

    def over(self, kept: NodeOptions) -> NodeOptions:
        """Returns these options, with those that say nothing filled in from `kept`."""
        return replace(kept, **{name: value for name, value in vars(self).items() if value})


@dataclass(frozen=True)
class Standing:
    """The node that this machine is going to be."""

    name: str
    state: Path
    """Folder for logs and for what the node keeps."""
    identity: Path | None
    """Folder of its keys; None: plain text."""
    options: NodeOptions
    invitation: Invitation | None = None
    """Still to be used, before the node starts."""
    looks_for_server: bool = False
    """Whether later starts look for the server anew, as this one did."""

    @property
    def authority(self) -> str:
        """Returns the fingerprint of the authority by which the node knows its server; "": it knows none."""
        if self.invitation is not None:
            return self.invitation.fingerprint
        return fingerprint(load_identity(self.identity).authority) if self.identity is not None else ""

    def at(self, server: str) -> Standing:
        """Returns the same standing, with the server where it was found."""
        invitation = replace(self.invitation, server=server) if self.invitation is not None else None
        return replace(self, options=replace(self.options, server=server), invitation=invitation, looks_for_server=True)

    def kept_options(self) -> str:
        """Returns what later starts go by, as JSON."""
        files = {name: getattr(self.options, name) for name in _FILES}
        kept = asdict(self.options) | {name: str(file.absolute()) if file else None for name, file in files.items()}
        return json.dumps(kept | ({"server": AUTO} if self.looks_for_server else {}), indent=2)

    def join(self) -> Membership:
        """Has the keys made and signed by the invitation, and keeps the options for later starts."""
        assert self.invitation is not None
        assert self.identity is not None
        membership = join(self.invitation, self.identity)
        write_private(self.state / _OPTIONS, self.kept_options())
        return membership


def find_standing(
    options: NodeOptions, join_text: str, name: str, state: Path | None, insecure: bool, states: Path = _STATES
) -> Standing:
    """Returns as whom this machine takes part. Changes nothing and asks nobody.

    join_text: of `edgelam invite`; empty: the node has joined before. name, state: "" and None find the only node that joined
    from this directory. insecure: whether it may take part without keys, in plain text. states: where nodes keep their state by default.

    Raises ConfigError for options that contradict each other, EnvironmentProblem if there are no keys and no join text.
    """
    if join_text:
        standing = _invited(parse_invitation(join_text), options, name, state, states)
    else:
        state = state or (states / name if name else _only_state(states))
        keys = state / _IDENTITY if state else None
        if state is None or keys is None or not keys.exists():
            return _without_keys(options, name, state, insecure, states)
        standing = _joined_before(state, options, name)
    _check_role(standing)
    return standing


def _invited(invitation: Invitation, options: NodeOptions, name: str, state: Path | None, states: Path) -> Standing:
    if name and name != invitation.name:
        raise ConfigError(
            f"--name {name!r} differs from the name that was invited, {invitation.name!r}; leave --name out"
        )
    state = state or states / invitation.name
    if has_joined(invitation, state / _IDENTITY):
        return _joined_before(state, options, name)
    if options.server == AUTO:
        return Standing(invitation.name, state, state / _IDENTITY, options, invitation)
    if options.server:  # such as a name of the server that this node can resolve
        split_address(options.server, "--server")
        invitation = replace(invitation, server=options.server)
    return Standing(invitation.name, state, state / _IDENTITY, replace(options, server=invitation.server), invitation)


def _joined_before(state: Path, options: NodeOptions, name: str) -> Standing:
    identity = load_identity(state / _IDENTITY)
    if name and name != identity.name:
        raise ConfigError(
            f"--name {name!r}: {state} holds the keys of {identity.name!r}; leave --name out, or give another --state"
        )
    options = options.over(_kept_options(state))
    if not options.server:
        raise ConfigError(f"{state / _OPTIONS} is missing, so --server HOST:PORT must be given")
    return Standing(identity.name, state, state / _IDENTITY, options)


def _kept_options(state: Path) -> NodeOptions:
    try:
        kept = json.loads((state / _OPTIONS).read_text(encoding="utf-8"))
        return NodeOptions(**(kept | {name: Path(kept[name]) if kept.get(name) else None for name in _FILES}))
    except FileNotFoundError:
        return NodeOptions()
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise EnvironmentProblem(
            f"{state / _OPTIONS} cannot be read ({error}); remove it, and give --server and --data again"
        ) from error


def _only_state(states: Path) -> Path | None:
    """Returns the state folder of the only node that joined from this directory; None if there is none."""
    found = sorted(folder.parent for folder in states.glob(f"*/{_IDENTITY}"))
    if len(found) > 1:
        names = ", ".join(folder.name for folder in found)
        raise ConfigError(
            f"several nodes have joined from this directory ({names}); say which one with --state, as in --state {found[0]}"
        )
    return found[0] if found else None


def _without_keys(options: NodeOptions, name: str, state: Path | None, insecure: bool, states: Path) -> Standing:
    if not insecure:
        where = f" in {state / _IDENTITY}" if state else f", at least not below {states.absolute()}"
        raise EnvironmentProblem(
            f"this machine has no keys{where}. To join a federation: on its server, `edgelam invite NAME` prints the command for "
            f"this machine. If this machine has joined: start it in the directory where it did, or with --state"
        )
    if not options.server:
        raise ConfigError("--server HOST:PORT is missing: without keys nothing says where the server is")
    name = name or socket.gethostname()
    if problem := why_no_name(name):
        raise ConfigError(f"--name {name!r} {problem}")
    return Standing(name, state or states / name, None, options)


def _check_role(standing: Standing) -> None:
    """Raises ConfigError if a device has no data, or a host has some."""
    role = standing.invitation.role if standing.invitation else load_identity(standing.identity or Path()).role
    if role == DEVICE and not standing.options.data:
        raise ConfigError(
            f"{standing.name} was invited as a device, so --data FILE is missing: its examples. A node that only lends compute is "
            f"invited with `edgelam invite NAME --role host`"
        )
    if role != DEVICE and standing.options.data:
        raise ConfigError(
            f"{standing.name} was invited as a {role}, which owns no data: leave --data out, or have it invited with --role device"
        )
