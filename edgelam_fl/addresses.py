"""HOST:PORT addresses: parses and joins them, finds free ports and checks what listens. Knows no protocol."""

from __future__ import annotations

import contextlib
import ipaddress
import random
import re
import socket

from edgelam_fl.errors import ConfigError, EnvironmentProblem

_SERVERS = range(20_000, 32_000)  # below the ports that systems give to outgoing connections: from 32768 or 49152 on
_TRIES = 200
_EVERY_INTERFACE = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def is_every_interface(host: str) -> bool:
    """Returns whether a listen host means all addresses of this machine."""
    return host in _EVERY_INTERFACE


def from_here(host: str) -> str:
    """Returns the address by which this machine itself reaches what listens at `host`."""
    return _EVERY_INTERFACE.get(host, host)


def split_address(address: str, option: str) -> tuple[str, int]:
    """Splits HOST:PORT into (host, port), an IPv6 host without its brackets. ConfigError names the `option`."""
    host, colon, port = address.rpartition(":")
    named = bool(colon and host) and port.isascii() and port.isdigit() and int(port) < 65536
    bracketed = re.fullmatch(r"\[([^\[\]]+)\]", host)
    if not named or (":" in host and not bracketed):
        brackets = f"; an IPv6 address is written in brackets, as in [::1]:{port}" if ":" in host else ""
        raise ConfigError(f"{option} = {address!r} must be HOST:PORT, as in 127.0.0.1:8000{brackets}")
    return bracketed[1] if bracketed else host, int(port)


def join_address(host: str, port: int) -> str:
    """Joins host and port to HOST:PORT, the inverse of `split_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def hub_address(host: str, port: int, data_plane: str = "") -> tuple[str, int]:
    """Returns where the server's hub listens: at `data_plane` (HOST:PORT), or one port after its SuperLink at host:port."""
    if data_plane:
        return split_address(data_plane, "--data-plane")
    if port == 65535:
        raise ConfigError(f"port {port} of {host} leaves none after it for the data plane; give --data-plane HOST:PORT")
    return host, port + 1


def check_plain_text(host: str, option: str, insecure: bool) -> None:
    """Raises ConfigError for an address beyond this machine, unless the user allowed plain text (`insecure`)."""
    if insecure or is_loopback(host):
        return
    raise ConfigError(
        f"{option} = {host} is beyond this machine, and without the operator's keys everything is sent as plain text: whoever is "
        f"on the way can read and change it. Name a copy of the folder that `edgelam server` makes for its operator with "
        f"--operator; or, on a network that you trust, allow plain text with --insecure"
    )


def is_loopback(host: str) -> bool:
    """Returns whether the host is this machine by its loopback address; a name other than localhost is not."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def answers(host: str, port: int, timeout_s: float = 2.0) -> bool:
    """Returns whether something accepts a TCP connection there."""
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout_s):
        return True
    return False


def check_port_free(host: str, port: int, option: str) -> None:
    """Raises EnvironmentProblem if the port cannot be opened; `option` is the one that chooses another."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise EnvironmentProblem(
                f"port {port} on {host} cannot be opened ({error.strerror}); end what uses it or choose another with {option}"
            ) from error


def free_port(host: str = "127.0.0.1", count: int = 1) -> int:
    """Returns a port that was free a moment ago: the first of `count` in a row.

    Systems give outgoing connections none of these, so none takes it before it is used. Raises EnvironmentProblem if none is free.
    """
    tried = random.SystemRandom().sample(range(_SERVERS.start, _SERVERS.stop - count), _TRIES)
    for port in tried:
        with contextlib.ExitStack() as probes, contextlib.suppress(OSError):
            for each in range(port, port + count):
                probes.enter_context(socket.socket()).bind((host, each))
            return port
    raise EnvironmentProblem(
        f"{_TRIES} ports between {_SERVERS.start} and {_SERVERS.stop} on {host} were tried, and none can be opened; end what uses them"
    )
