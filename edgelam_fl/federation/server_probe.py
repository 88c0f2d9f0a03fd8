"""Says what is at an address where a server should be: one, none, its hub, or another program.

Asks a question that every server answers anybody, over TLS or in plain text; nothing secret is asked and nothing in the answer is
trusted. Knows no run and no node.
"""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

from edgelam_fl.addresses import answers, check_plain_text, join_address, split_address
from edgelam_fl.errors import EnvironmentProblem
from edgelam_fl.federation.operator import Operator
from edgelam_fl.trust.identity import AUTHORITY_FILE

_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})")
_OK, _SILENT = b"200", b"silent"
_BY_THE_CLOCK = (9, 10)  # OpenSSL's numbers: not valid yet, expired


@dataclass(frozen=True)
class ServerProblem:
    """A reason why no server can be used at an address."""

    words: str
    """A sentence without a full stop."""
    is_nobody: bool
    """Whether nothing at all answers there."""


def problem_at(server: str, *, tls: bool, timeout_s: float = 5.0) -> ServerProblem | None:
    """Returns why no server can be used at `server` (HOST:PORT); None if one answers there.

    tls: whether the caller speaks TLS with it. timeout_s: for each of up to four questions; who accepts connections and says nothing
    is asked one.
    """
    host, port = split_address(server, "--server")
    if not answers(host, port):
        return ServerProblem(f"no server answers at {server}", is_nobody=True)
    status = _status(host, port, tls, timeout_s)
    if status == _OK:
        return None
    if status == _SILENT:
        words = f"what is at {server} accepts connections and says nothing: it hangs, or is no EdgeLAM-FL server"
    elif _status(host, port, not tls, timeout_s) == _OK:
        words = _other_way(server, tls)
    elif port > 1 and _OK in (_status(host, port - 1, way, timeout_s) for way in (tls, not tls)):
        at = join_address(host, port - 1)
        words = f"{server} is the hub of a server, which nodes find by themselves; the server itself is at {at}: --server {at}"
    else:
        words = f"what answers at {server} is no EdgeLAM-FL server; `edgelam server` says at its start where it listens"
    return ServerProblem(words, is_nobody=False)


def check_server_answers(operator: Operator, insecure: bool, way_out: str = "") -> None:
    """Raises ConfigError if the operator's server may not be used, EnvironmentProblem if no server answers at its address.

    insecure: whether plain text may leave this machine. way_out: the end of the message if nobody answers, with what to do; by default
    to start a server there or to name another.
    """
    tls, server = operator.identity is not None, operator.server
    host, _ = split_address(server, "--server")
    check_plain_text(host, "--server", insecure or tls)
    problem = problem_at(server, tls=tls)
    if problem is not None:
        way_out = way_out or f"; start one there with `edgelam server --listen {server}`, or give another --server"
        if not problem.is_nobody:
            way_out = (
                "" if operator.folder.is_dir() else f" ({operator.folder}, the operator's folder here, does not exist)"
            )
        raise EnvironmentProblem(problem.words + way_out)
    if operator.identity is not None and not _is_of(server, operator.identity / AUTHORITY_FILE):
        raise EnvironmentProblem(
            f"the server at {server} belongs to another federation than the operator's folder {operator.folder} does; name that server's "
            "own folder with --operator, as it says at its start"
        )


def _is_of(server: str, authority: Path, timeout_s: float = 5.0) -> bool:
    """Returns whether a server's certificate is of this authority (a PEM file); of other problems it says nothing."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(authority)
    try:
        with (
            socket.create_connection(split_address(server, "--server"), timeout_s) as plain,
            context.wrap_socket(plain),
        ):
            return True
    except ssl.SSLCertVerificationError as error:
        return error.verify_code in _BY_THE_CLOCK
    except OSError:  # whoever asks next says what it is
        return True


def is_healthy(host: str, port: int, *, tls: bool, timeout_s: float = 5.0) -> bool:
    """Returns whether a server of HTTP answers there: a process that stands still accepts connections, but says nothing."""
    return _status(host, port, tls, timeout_s) not in (b"", _SILENT)


def _other_way(server: str, tls: bool) -> str:
    if tls:
        return (
            f"the server at {server} speaks plain text (--insecure), and this command TLS: start it without --insecure"
        )
    return (
        f"the server at {server} speaks TLS and lets members alone in: `edgelam invite NAME` there prints the command for a node; a "
        "command of the operator's needs --operator"
    )


def _status(host: str, port: int, tls: bool, timeout_s: float) -> bytes:
    """Returns the HTTP status that a server gives for its health; "silent" if it says nothing in time, empty if it speaks otherwise."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with contextlib.ExitStack() as stack:
            plain = stack.enter_context(socket.create_connection((host, port), timeout_s))
            asking = stack.enter_context(context.wrap_socket(plain)) if tls else plain
            asking.sendall(b"GET /health HTTP/1.1\r\nHost: health\r\nConnection: close\r\n\r\n")
            found = _STATUS.match(asking.recv(64))
            return found[1] if found else b""
    except TimeoutError:
        return _SILENT
    except OSError:  # it hung up, or does not speak TLS
        return b""
