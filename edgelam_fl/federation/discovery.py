"""Finds a federation's server on the local network by multicast DNS (RFC 6762), and announces one there.

What is announced is where the server listens and the fingerprint of its authority. Nobody is trusted for an announcement: a node knows
its server by the fingerprint in its invite, or by the authority that it joined, as it does at an address that was typed. Knows no keys.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from edgelam_fl.addresses import is_loopback, join_address
from edgelam_fl.errors import ConfigError, EnvironmentProblem
from edgelam_fl.federation.server_probe import problem_at
from edgelam_fl.names import printable

AUTO = "auto"
"""The word for --server by which it is looked for."""
SERVICE = "_edgelam._tcp.local."
LOOK_S = 4.0
_AUTHORITY = "authority"


@dataclass(frozen=True)
class FoundServer:
    """A server that announces itself."""

    addresses: tuple[str, ...]
    """HOST:PORT of its SuperLink, in each of its networks: not every one can be reached from here."""
    authority: str
    """Fingerprint of its authority, as hexadecimal digits; "": it speaks plain text."""


# ---------------------------------------------------------------- the server


def announced_addresses(known: Sequence[str]) -> list[str]:
    """Returns the IP addresses among `known` that another machine can use, each once."""
    return [host for host in dict.fromkeys(known) if _is_address(host) and not is_loopback(host)]


@contextmanager
def announced(port: int, addresses: Sequence[str], authority: str, interfaces: Any = None) -> Iterator[None]:
    """Announces a server until the block ends. Raises OSError if this machine cannot send to its network.

    addresses: IP addresses of this machine. authority: as in a FoundServer. interfaces: on which to announce; None: all.
    """
    from zeroconf import Error, InterfaceChoice, ServiceInfo, Zeroconf

    name = socket.gethostname().partition(".")[0]
    service = ServiceInfo(
        SERVICE, f"{name}-{port}.{SERVICE}", port=port, parsed_addresses=list(addresses), server=f"{name}.local.",
        properties={_AUTHORITY: authority},
    )  # fmt: skip
    speaker = Zeroconf(interfaces=interfaces or InterfaceChoice.All)
    try:
        try:
            speaker.register_service(service, allow_name_change=True)
        except Error as error:
            raise OSError(f"{type(error).__name__} {error}".strip()) from error
        yield
    finally:
        speaker.close()  # says goodbye


# ---------------------------------------------------------------- a node


def find_server(
    authority: str = "",
    look_s: float = LOOK_S,
    interfaces: Any = None,
    answers: Callable[[str, bool], bool] = lambda address, tls: problem_at(address, tls=tls) is None,
) -> str:
    """Returns HOST:PORT of the server that announces itself on the local network, at an address where it answers if there is one.

    authority: the fingerprint of the only one that will do; "": there has to be one alone. answers: asks an address, with TLS or
    without. Raises EnvironmentProblem if none is found within `look_s` seconds, ConfigError if several are.
    """
    heard = servers(authority, look_s, interfaces)
    found = list(dict.fromkeys(one for one in heard if authority in ("", one.authority)))
    if not found:
        which = " of this node's federation" if authority else ""
        raise EnvironmentProblem(
            f"no server{which} announces itself on this network (--server auto): give its address, --server HOST:PORT. It announces "
            "itself if `edgelam server` listens on an address of this network, without --no-announce; many wireless networks for "
            "guests pass no announcements on"
        )
    if len({one.authority for one in found}) > 1:
        listed = ", ".join(sorted(one.addresses[0] for one in found))
        raise ConfigError(
            f"--server auto: several servers announce themselves ({listed}); choose one, as --server HOST:PORT"
        )
    addresses = [address for one in found for address in one.addresses]
    return next((address for address in addresses if answers(address, bool(found[0].authority))), addresses[0])


def servers(authority: str, look_s: float, interfaces: Any = None) -> list[FoundServer]:
    """Returns the servers that answer within `look_s` seconds; ends as soon as one with this authority has."""
    from zeroconf import InterfaceChoice, ServiceBrowser, Zeroconf

    asking = Zeroconf(interfaces=interfaces or InterfaceChoice.All)
    found: list[FoundServer] = []
    enough = threading.Event()
    end = time.monotonic() + look_s

    def heard(zeroconf: Any, service_type: str, name: str, state_change: Any) -> None:
        left_ms = int(1000 * max(0.1, end - time.monotonic()))
        info = zeroconf.get_service_info(service_type, name, timeout=left_ms)
        new = _read(info)
        found.extend(new)
        if any(one.authority == authority for one in new):
            enough.set()

    try:
        ServiceBrowser(asking, SERVICE, handlers=[heard])
        enough.wait(look_s)
    finally:
        asking.close()
    return list(found)


def _read(info: Any) -> list[FoundServer]:
    """Reads an announcement, which may come from anybody; one that makes no sense is none."""
    if info is None or not info.port:
        return []
    authority = ""
    with suppress(UnicodeDecodeError, AttributeError):
        authority = printable(info.properties.get(_AUTHORITY.encode(), b"").decode("ascii"), 64)
    hosts = [host.partition("%")[0] for host in info.parsed_addresses()]
    usable = sorted((host for host in hosts if _is_address(host)), key=lambda host: ":" in host)
    return [FoundServer(tuple(join_address(host, info.port) for host in usable), authority)] if usable else []


def _is_address(host: str) -> bool:
    try:
        return not ipaddress.ip_address(host).is_link_local
    except ValueError:
        return False
