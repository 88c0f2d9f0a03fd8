"""The gRPC services that run are those that edgelam.proto declares: each method answers, and no other way leads to one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from edgelam_fl.hub.daemon import HubServer
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.attendance import LEAD_FOLDER
from edgelam_fl.wire.control import ControlServer
from edgelam_fl.wire.grpc.serve import DataPlaneServer
from edgelam_fl.wire.grpc.services import declared_methods, service_handler, stub

ROOT = Path(__file__).parents[2]
SERVICES = pb.DESCRIPTOR.services_by_name
METHODS = [(service, method) for service in SERVICES for method in declared_methods(service)]


@pytest.fixture(scope="module")
def ports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The addresses of everything that serves gRPC here: a stage host's data plane and control, a server's hub and its lead."""
    state = tmp_path_factory.mktemp("state")
    with ExitStack() as stack:
        servers: list[Any] = [
            DataPlaneServer("127.0.0.1", 0, lambda hello, link: pb.Refuse(reason="nobody is let in")),
            HubServer("127.0.0.1", 0, state / "hub"),
        ]
        control = ControlServer(state, lambda node: {})
        for server in (*servers, control):
            stack.callback(server.stop)
        sockets = [state / "endpoint.json", state / "hub" / LEAD_FOLDER / "endpoint.json"]
        yield [f"127.0.0.1:{server.port}" for server in servers] + [
            json.loads(file.read_text())["address"] for file in sockets
        ]


def code_of(address: str, service: str, name: str) -> grpc.StatusCode:
    """Returns how a call with nothing in it ends, or OK if it lives for a moment."""
    method = SERVICES[service].methods_by_name[name]
    request = b"" if method.input_type.name == "RawBytes" else getattr(pb, method.input_type.name)()
    with grpc.insecure_channel(address) as channel:
        call = stub(channel, service, name)
        try:
            answer = call(iter([request]) if method.client_streaming else request, timeout=10)
            if method.server_streaming:
                list(answer)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


@pytest.mark.parametrize(("service", "name"), METHODS)
def test_each_declared_method_is_served_in_one_place(ports: list[str], service: str, name: str) -> None:
    served = [code_of(address, service, name) != grpc.StatusCode.UNIMPLEMENTED for address in ports]
    assert served.count(True) == 1


def test_the_services_are_declared() -> None:
    assert set(SERVICES) == {
        "Attendance",
        "Control",
        "DataPlane",
        "Echo",
        "Kept",
        "Lead",
        "Membership",
        "Relay",
        "Slices",
    }


@pytest.mark.parametrize("methods", [["Ping", "Take"], ["Ping", "Take", "Give", "Steal"]])
def test_a_service_serves_just_its_declared_methods(methods: list[str]) -> None:
    with pytest.raises(ValueError, match=r"service Echo declares \['Ping', 'Take', 'Give'\]; these are"):
        service_handler("Echo", {name: lambda *_: b"" for name in methods})


def test_what_is_not_declared_cannot_be_called() -> None:
    with grpc.insecure_channel("127.0.0.1:9") as channel:
        for service, method in (("Echo", "Steal"), ("Nothing", "Ping")):
            with pytest.raises(KeyError):
                stub(channel, service, method)


def test_handlers_and_methods_are_made_in_one_place() -> None:
    makers = ("_rpc_method_handler", "method_handlers_generic_handler", "unary_unary(", "unary_stream(", "stream_unary(", "stream_stream(")  # fmt: skip
    files = [file for folder in ("edgelam_fl", "server", "clients") for file in (ROOT / folder).rglob("*.py")]
    found = {str(file.relative_to(ROOT)) for file in files if any(maker in file.read_text("utf-8") for maker in makers)}
    assert found == {"edgelam_fl/wire/grpc/services.py"}
