"""The hub's service for measuring a link: takes bytes, gives bytes, answers at once. Knows nobody and keeps nothing.

Anyone who reaches the port may ask, so bytes and time per call are limited, and so is the number of calls at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc

from edgelam_fl.wire.grpc.services import service_handler

ECHO_SERVICE = "Echo"
CHUNK_BYTES = 64 << 10
_LENGTH_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class EchoLimits:
    """Limits of one call to the echo, and of the number of calls."""

    most_bytes: int = 16 << 20
    most_s: float = 30.0
    most_calls: int = 4  # at a time


LIMITS = EchoLimits()


def make_service(state: Path, limits: EchoLimits = LIMITS) -> grpc.GenericRpcHandler:
    """Returns the service. It keeps nothing in the hub's state folder."""
    echo = Echo(limits)
    return service_handler(ECHO_SERVICE, {"Ping": echo.ping, "Take": echo.take, "Give": echo.give})


def write_length(count_bytes: int) -> bytes:
    """Returns a number of bytes as the service reads and writes it."""
    return count_bytes.to_bytes(_LENGTH_BYTES, "big")


class Echo:
    """The service's three methods."""

    def __init__(self, limits: EchoLimits) -> None:
        self._limits = limits
        self._places = threading.BoundedSemaphore(limits.most_calls)

    def ping(self, _: bytes, __: grpc.ServicerContext) -> bytes:
        return b""

    def take(self, chunks: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        """Returns how many bytes came."""
        self._enter(context)
        try:
            taken = 0
            for chunk in chunks:
                taken += len(chunk)
                if taken > self._limits.most_bytes:
                    context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"at most {self._limits.most_bytes} bytes per call")
            return write_length(taken)
        finally:
            self._places.release()

    def give(self, asked: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        """Sends as many zero bytes as were asked for."""
        left = int.from_bytes(asked, "big")
        if len(asked) != _LENGTH_BYTES or left > self._limits.most_bytes:
            context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, f"an 8-byte number of at most {self._limits.most_bytes} bytes"
            )
        self._enter(context)
        try:
            while left:
                size = min(left, CHUNK_BYTES)
                yield bytes(size)
                left -= size
        finally:
            self._places.release()

    def _enter(self, context: grpc.ServicerContext) -> None:
        """Takes a place, which a call without a deadline could keep for ever. Aborts the call if it may not have one."""
        remaining_s = context.time_remaining()
        if remaining_s is None or remaining_s > self._limits.most_s + 1:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"needs a deadline of at most {self._limits.most_s:.0f} s")
        if not self._places.acquire(blocking=False):
            context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"{self._limits.most_calls} nodes are measuring; try again"
            )
