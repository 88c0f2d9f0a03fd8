"""Every route that this program's own ports serve, and who may call it: a new port or route fails here until it is judged.

Flower's port has the same list in test_flower_routes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from edgelam_fl.hub.daemon import HubServer
from edgelam_fl.trust.authority import Authority, issue
from edgelam_fl.trust.identity import DEVICE, HOST, SERVER, Identity, tls_name
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.attendance import LEAD_FOLDER
from edgelam_fl.wire.control import ControlServer
from edgelam_fl.wire.grpc.secure import Security
from edgelam_fl.wire.grpc.serve import DataPlaneServer
from edgelam_fl.wire.relay import Relay, make_token

ROOT = Path(__file__).parents[2]
DEADLINE_S = 60.0


class Caller(Enum):
    """Who may use a route, by what the route asks for."""

    MEMBER = "any member, by the certificate of its connection"
    MEMBER_WITH_TOKEN = "the member that a token of a run's part names, by its certificate and the token"
    MEMBER_OF_ROUTE = "the member of the plan's route, by its certificate, the route's token and its first frame"
    MEMBER_OF_RUN = "any member, by its certificate and the token of a run that goes on"
    OWNER = "the user who runs the node or the server, by a token in a file that only this user can read"


# Service, method -> who may call it. The hub's port, a stage host's data port, the control ports of a stage host and a hub.
HUB = {
    ("Membership", "Ended"): Caller.MEMBER,
    ("Echo", "Ping"): Caller.MEMBER,
    ("Echo", "Take"): Caller.MEMBER,
    ("Echo", "Give"): Caller.MEMBER,
    ("Relay", "Listen"): Caller.MEMBER_WITH_TOKEN,
    ("Relay", "Dial"): Caller.MEMBER_WITH_TOKEN,
    ("Relay", "Accept"): Caller.MEMBER,  # and only with the number that the hub gave to the host that it dialled
    ("Slices", "Describe"): Caller.MEMBER_OF_RUN,
    ("Slices", "List"): Caller.MEMBER_OF_RUN,
    ("Slices", "Fetch"): Caller.MEMBER_OF_RUN,
    ("Attendance", "Attend"): Caller.MEMBER_WITH_TOKEN,
    ("Kept", "Leave"): Caller.MEMBER_WITH_TOKEN,
}
DATA = {("DataPlane", "Link"): Caller.MEMBER_OF_ROUTE}
CONTROL = {
    ("Control", "GetProfile"): Caller.OWNER,
    ("Control", "Submit"): Caller.OWNER,
    ("Control", "Wait"): Caller.OWNER,
}
LEAD = {("Lead", "Look"): Caller.OWNER}
ROUTES = {**HUB, **DATA, **CONTROL, **LEAD}

# What opens a port that others can reach, and the only files that may do so.
OPENS_A_PORT = re.compile(
    r"grpc\.server\(|grpc\.aio|add_(?:in)?secure_port\(|uvicorn\.|asyncio\.start_server|create_server\("
    r"|(?:import|from) (?:socketserver|http\.server)|\.listen\(|\.bind\("
)
FILES = {
    "edgelam_fl/hub/daemon.py",  # the hub
    "edgelam_fl/wire/grpc/serve.py",  # data port of a stage host
    "edgelam_fl/wire/control.py",  # control port of a stage host
    "edgelam_fl/wire/grpc/secure.py",  # opens the ports of the hub and of stage hosts, with TLS
    "edgelam_fl/federation/superlink_daemon.py",  # Flower's port; its routes: test_flower_routes
    "edgelam_fl/addresses.py",  # asks for a free port and closes it
}


@dataclass
class Ports:
    """One of each port with certificates, and the handlers that it was given."""

    hub: str
    data: str
    control: Path  # the folder of the control port's address and token
    lead: Path  # the same of the hub
    served: dict[str, list[grpc.GenericRpcHandler]]
    member: Identity
    foreign: Identity

    def address(self, service: str) -> str:
        return self.data if service == "DataPlane" else self.hub


@pytest.fixture(scope="module")
def ports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ports]:
    folder = tmp_path_factory.mktemp("ports")
    authority, other = Authority.open(folder / "trust"), Authority.open(folder / "elsewhere")
    served: dict[str, list[grpc.GenericRpcHandler]] = {}
    with pytest.MonkeyPatch.context() as patches:

        def watch(port: str) -> None:
            served[port] = []
            patches.setattr(grpc, "server", partial(collecting, make, served[port]))

        make = grpc.server
        watch("hub")
        hub = HubServer("127.0.0.1", 0, folder / "hub", security=Security(issue(authority, SERVER, SERVER)))
        served["lead"] = [served["hub"].pop()]  # of a port of its own, opened last
        watch("data")
        data = DataPlaneServer(
            "127.0.0.1",
            0,
            lambda hello, link: pb.Refuse(reason="no"),
            security=Security(issue(authority, "edge", HOST)),
        )
        watch("control")
        control = ControlServer(folder / "node", lambda name: {})
    member, foreign = issue(authority, "ann", DEVICE), issue(other, "ann", DEVICE)
    yield Ports(
        f"127.0.0.1:{hub.port}",
        f"127.0.0.1:{data.port}",
        folder / "node",
        folder / "hub" / LEAD_FOLDER,
        served,
        member,
        foreign,
    )
    hub.stop(), data.stop(), control.stop()


def collecting(
    make: Callable[..., grpc.Server], found: list[grpc.GenericRpcHandler], *arguments: Any, **options: Any
) -> grpc.Server:
    """Makes a gRPC server; what it is told to serve is noted in `found`."""
    server = make(*arguments, **options)
    add = server.add_generic_rpc_handlers

    def note(handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        found.extend(handlers)
        add(handlers)

    server.add_generic_rpc_handlers = note
    return server


@dataclass(frozen=True)
class Details(grpc.HandlerCallDetails):
    """A call of a method, as a gRPC server asks its handlers about it."""

    method: str
    invocation_metadata: Sequence[tuple[str, str]] = ()


def ask(
    channel: grpc.Channel, service: str, method: str, metadata: Sequence[tuple[str, str | bytes]] = ()
) -> grpc.StatusCode:
    """Calls a method with an empty request; returns the status."""
    declared = pb.DESCRIPTOR.services_by_name[service].methods_by_name[method]
    request = getattr(pb, declared.input_type.name)().SerializeToString()
    call = getattr(
        channel,
        f"{'stream' if declared.client_streaming else 'unary'}_{'stream' if declared.server_streaming else 'unary'}",
    )
    try:
        answer = call(f"/{pb.DESCRIPTOR.package}.{service}/{method}")(
            iter([request]) if declared.client_streaming else request, timeout=DEADLINE_S, metadata=metadata
        )
        if declared.server_streaming:
            next(answer, None)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def test_every_declared_route_is_judged() -> None:
    declared = {
        (service.name, method.name) for service in pb.DESCRIPTOR.services_by_name.values() for method in service.methods
    }
    assert declared == ROUTES.keys()


@pytest.mark.parametrize(("port", "routes"), [("hub", HUB), ("data", DATA), ("control", CONTROL), ("lead", LEAD)])
def test_each_port_serves_its_own_routes_alone(ports: Ports, port: str, routes: dict[tuple[str, str], Caller]) -> None:
    """All handlers come from `service_handler`, which serves what edgelam.proto declares and nothing else."""
    handlers = ports.served[port]
    assert len(handlers) == len({service for service, _ in routes}), "a handler for each service"
    answered = {
        (service, method)
        for service, method in ROUTES
        if any(handler.service(Details(f"/{pb.DESCRIPTOR.package}.{service}/{method}")) for handler in handlers)
    }
    assert answered == routes.keys()


@pytest.mark.parametrize(("service", "method"), [*HUB, *DATA])
def test_who_has_no_certificate_of_the_federation_reaches_no_route(ports: Ports, service: str, method: str) -> None:
    """In plain text, by TLS without a certificate, and with another federation's."""
    address, node = ports.address(service), "edge" if service == "DataPlane" else SERVER
    named = [("grpc.ssl_target_name_override", tls_name(node))]
    known = grpc.ssl_channel_credentials(ports.member.authority)
    stolen = grpc.ssl_channel_credentials(ports.member.authority, ports.foreign.key, ports.foreign.certificate)
    for channel in (
        grpc.insecure_channel(address), grpc.secure_channel(address, known, named), grpc.secure_channel(address, stolen, named),
    ):  # fmt: skip
        with channel:
            assert ask(channel, service, method) is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("route", [route for route, who in ROUTES.items() if who is Caller.MEMBER_WITH_TOKEN])
def test_a_member_without_the_token_is_refused(ports: Ports, route: tuple[str, str]) -> None:
    with Security(ports.member).channel(ports.hub, SERVER, []) as channel:
        assert ask(channel, "Echo", "Ping") is grpc.StatusCode.OK
        assert ask(channel, *route) is grpc.StatusCode.PERMISSION_DENIED
        forged = make_token(bytes(32), route[1], "run/1/1/edge", ports.member.name, 1)
        assert ask(channel, *route, Relay(ports.hub, forged).metadata) is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize("route", [*CONTROL, *LEAD])
def test_only_who_has_the_file_controls_a_stage_host_or_leads_at_a_hub(ports: Ports, route: tuple[str, str]) -> None:
    endpoint = (ports.lead if route in LEAD else ports.control) / "endpoint.json"
    assert endpoint.stat().st_mode & 0o777 == 0o600
    with grpc.insecure_channel(json.loads(endpoint.read_text())["address"]) as channel:
        assert ask(channel, *route) is grpc.StatusCode.UNAUTHENTICATED
        assert ask(channel, *route, metadata=[("token", "00" * 32)]) is grpc.StatusCode.UNAUTHENTICATED


def test_no_other_file_opens_a_port() -> None:
    opening = {
        str(file.relative_to(ROOT))
        for folder in ("edgelam_fl", "server", "clients", "strategies")
        for file in (ROOT / folder).rglob("*.py")
        if OPENS_A_PORT.search(file.read_text(encoding="utf-8"))
    }
    assert opening == FILES
