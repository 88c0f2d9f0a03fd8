"""The gRPC services of the program, as edgelam.proto declares them: handlers for a server, methods for a caller.

Names, streams and message types are written in the .proto alone; here they become gRPC's own objects. Knows no service.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grpc

from edgelam_fl.wire import edgelam_pb2 as pb

Send = Callable[[bytes | None], object]  # sends a message of a call; None ends the call
# a request or an iterator of requests, the context -> an answer or an iterator of answers; or a WithoutThread
Method = Callable[..., Any]
_CARDINALITY = {False: "unary", True: "stream"}


class WithoutThread:
    """A handler of a streaming method that keeps no thread of gRPC's: it may return before the call is over.

    `handler` gets the requests, the context, and a function that sends; the call ends when that function gets None.
    """

    experimental_non_blocking = True  # gRPC's own name for such handlers

    def __init__(self, handler: Callable[[Iterator[bytes], grpc.ServicerContext, Send], None]) -> None:
        self._handler = handler

    def __call__(self, requests: Iterator[bytes], context: grpc.ServicerContext, send: Send) -> None:
        self._handler(requests, context, send)


def declared_methods(service: str) -> list[str]:
    """Returns the names of a service's methods. KeyError: the .proto declares no such service."""
    return [method.name for method in pb.DESCRIPTOR.services_by_name[service].methods]


def service_handler(service: str, methods: Mapping[str, Method]) -> grpc.GenericRpcHandler:
    """Returns what a gRPC server needs to serve `methods`. ValueError unless they are just those that are declared."""
    declaration = pb.DESCRIPTOR.services_by_name[service]
    if sorted(methods) != sorted(declared_methods(service)):
        raise ValueError(f"service {service} declares {declared_methods(service)}; these are {sorted(methods)}")
    handlers = {
        method.name: getattr(grpc, f"{_kind_of(method)}_rpc_method_handler")(
            methods[method.name],
            request_deserializer=getattr(_message(method.input_type), "FromString", None),
            response_serializer=getattr(_message(method.output_type), "SerializeToString", None),
        )
        for method in declaration.methods
    }
    return grpc.method_handlers_generic_handler(declaration.full_name, handlers)


def stub(channel: grpc.Channel, service: str, name: str) -> Any:
    """Returns the callable of a declared method on `channel`. KeyError: the .proto declares no such method."""
    declaration = pb.DESCRIPTOR.services_by_name[service]
    method = declaration.methods_by_name[name]
    return getattr(channel, _kind_of(method))(
        f"/{declaration.full_name}/{name}",
        request_serializer=getattr(_message(method.input_type), "SerializeToString", None),
        response_deserializer=getattr(_message(method.output_type), "FromString", None),
    )


def _kind_of(method: Any) -> str:
    return f"{_CARDINALITY[method.client_streaming]}_{_CARDINALITY[method.server_streaming]}"


def _message(descriptor: Any) -> type | None:
    """Returns the class of a method's messages; None: plain bytes."""
    return None if descriptor.name == "RawBytes" else getattr(pb, descriptor.name)
