"""The hub's part for measuring a link: takes bytes, gives bytes, answers at once. Knows nobody and keeps nothing.

Anyone who reaches the port may ask, so a call has a limit of bytes and of time, and few go on at once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import grpc

SERVICE = "edgelam.v1.Echo"
CHUNK_BYTES = 64 << 10
MAX_BYTES = 16 << 20
MAX_SECONDS = 30.0
MAX_CALLS = 4
_LENGTH_BYTES = 8  # of the number that asks for bytes

_calls = threading.BoundedSemaphore(MAX_CALLS)


def handlers() -> list[grpc.GenericRpcHandler]:
    methods = {
        "Ping": grpc.unary_unary_rpc_method_handler(_ping),
        "Take": grpc.stream_unary_rpc_method_handler(_take),
        "Give": grpc.unary_stream_rpc_method_handler(_give),
    }
    return [grpc.method_handlers_generic_handler(SERVICE, methods)]


def _ping(_: bytes, __: grpc.ServicerContext) -> bytes:
    return b""


def _take(chunks: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
    """How many bytes came."""
    _enter(context)
    try:
        taken = 0
        for chunk in chunks:
            taken += len(chunk)
            if taken > MAX_BYTES:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"at most {MAX_BYTES} bytes a call")
        return taken.to_bytes(_LENGTH_BYTES, "big")
    finally:
        _calls.release()


def _give(asked: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
    left = int.from_bytes(asked, "big")
    if len(asked) != _LENGTH_BYTES or left > MAX_BYTES:
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"an 8-byte number of at most {MAX_BYTES} bytes")
    _enter(context)
    try:
        while left:
            size = min(left, CHUNK_BYTES)
            yield bytes(size)
            left -= size
    finally:
        _calls.release()


def _enter(context: grpc.ServicerContext) -> None:
    """A call without an end of its own would keep its place for as long as its caller is silent."""
    remaining = context.time_remaining()
    if remaining is None or remaining > MAX_SECONDS + 1:
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"needs a deadline of at most {MAX_SECONDS:.0f} s")
    if not _calls.acquire(blocking=False):
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_CALLS} nodes are measuring; try again")
