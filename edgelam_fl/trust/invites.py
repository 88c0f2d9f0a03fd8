"""The text of a join command: where the server is, how it is recognised, and the one-time token. Knows no members."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from edgelam_fl.addresses import split_address
from edgelam_fl.errors import ConfigError
from edgelam_fl.names import why_no_name
from edgelam_fl.trust.identity import DEVICE, HOST

_MARK = "edgelam1"
_HELP = "paste it whole, as `edgelam invite` printed it"
_UNIT_S = {"m": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(frozen=True)
class Invitation:
    """What a node needs to join: nothing else goes from the server's user to the node's."""

    server: str
    """HOST:PORT."""
    role: str
    name: str
    token: str
    """Good for one node, once."""
    fingerprint: str
    """The authority's: by it the node knows the server before it sends the token."""

    @property
    def text(self) -> str:
        """Returns the invitation as one word."""
        return "/".join((_MARK, self.server, self.role, self.name, self.token, self.fingerprint))

    @property
    def command(self) -> str:
        """Returns the line that is typed on the node."""
        data = " --data FILE" if self.role == DEVICE else ""
        return f"edgelam client --join {shlex.quote(self.text)}{data}"


def parse_invitation(text: str) -> Invitation:
    """Reads an invitation's text. Raises ConfigError if it is none, or not whole."""
    mark, *fields = text.strip().split("/")
    if mark != _MARK or len(fields) != 5:
        raise ConfigError(
            f"--join {text[:40]!r} is no join text, which begins with {_MARK}/ and has six parts; {_HELP}"
        )
    invitation = Invitation(*fields)
    split_address(invitation.server, "--join: the server")
    if invitation.role not in (DEVICE, HOST) or why_no_name(invitation.name):
        raise ConfigError(f"--join: {invitation.role!r} is no role or {invitation.name!r} is no name; {_HELP}")
    if not re.fullmatch(r"[\w-]{22}", invitation.token, re.ASCII) or not re.fullmatch(
        r"[0-9a-f]{64}", invitation.fingerprint
    ):
        raise ConfigError(f"--join: the token or the fingerprint is not whole; {_HELP}")
    return invitation


def parse_duration_s(text: str, option: str) -> float:
    """Returns the seconds of a duration such as 30m, 1h or 7d. ConfigError names the `option`."""
    found = re.fullmatch(r"(\d{1,4})([mhd])", text)
    if not found or not int(found[1]):
        raise ConfigError(f"{option} {text!r} must be a number of minutes, hours or days, as in 30m, 1h or 7d")
    return int(found[1]) * _UNIT_S[found[2]]
