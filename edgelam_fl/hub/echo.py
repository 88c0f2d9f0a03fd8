"""The hub's service for measuring a link: takes bytes, gives bytes, answers at once. Knows no runs and keeps nothing.

Bytes and time per call are limited, and so is the number of calls at a time: in all, because measurements disturb each
other, and per member, so that none can keep the others from measuring.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc

from edgelam_fl.hub.places import PlaceLimits, Places
from edgelam_fl.wire.grpc.services import service_handler

ECHO_SERVICE = "Echo"
CHUNK_BYTES = 64 << 10
_LENGTH_BYTES = 8
_PLACES = PlaceLimits(most=4, most_per_member=1, still_s=10.0)


@dataclass(frozen=True, kw_only=True)
class EchoLimits:
    """Limits of one call to the echo, and of all calls."""

    most_bytes: int = 16 << 20
    most_s: float = 30.0
    places: PlaceLimits = _PLACES


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
        self._places = Places(limits.places)

    def ping(self, _: bytes, __: grpc.ServicerContext) -> bytes:
        return b""

    def take(self, chunks: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        """Returns how many bytes came."""
        self._check_deadline(context)
        taken = 0
        with self._places.place(context) as place:
            while True:
                with place.waiting():
                    chunk = next(chunks, None)
                if chunk is None:
                    return write_length(taken)
                taken += len(chunk)
                if taken > self._limits.most_bytes:
                    context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"at most {self._limits.most_bytes} bytes per call")

    def give(self, asked: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        """Sends as many zero bytes as were asked for."""
        left = int.from_bytes(asked, "big")
        if len(asked) != _LENGTH_BYTES or left > self._limits.most_bytes:
            context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, f"an 8-byte number of at most {self._limits.most_bytes} bytes"
            )
        self._check_deadline(context)
        with self._places.place(context) as place:
            while left:
                size = min(left, CHUNK_BYTES)
                with place.waiting():
                    yield bytes(size)
                left -= size

    def _check_deadline(self, context: grpc.ServicerContext) -> None:
        """Aborts a call without a deadline, or with a late one: it could keep its place for long."""
        remaining_s = context.time_remaining()
        if remaining_s is None or remaining_s > self._limits.most_s + 1:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"needs a deadline of at most {self._limits.most_s:.0f} s")
