"""Rate and round trip of the way to the server's hub, measured with real bytes. Knows no plans.

The rate is of one stream while nothing else moves: several nodes on one medium share it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc

from edgelam_fl.addresses import join_address
from edgelam_fl.errors import EnvironmentProblem
from edgelam_fl.hub.echo import CHUNK_BYTES, MAX_BYTES, MAX_SECONDS, SERVICE

_PINGS = 5
_FIRST_BYTES = 64 << 10
_LONG_ENOUGH_S = 0.4  # for buffers on the way to weigh little; a faster transfer is repeated with more bytes
_ANSWER_S = 10.0
_BUSY_WAIT_S, _BUSY_TRIES = 1.0, 30


@dataclass(frozen=True)
class Link:
    up_bps: float
    down_bps: float
    round_trip_s: float


def measure_link(host: str, port: int) -> Link:
    """Moves at most twice 21 MiB, and stops after about a second on a slow link. EnvironmentProblem where no hub answers."""
    address = join_address(host, port)
    with grpc.insecure_channel(address) as channel:
        try:
            ping = channel.unary_unary(f"/{SERVICE}/Ping")
            ping(b"", timeout=_ANSWER_S, wait_for_ready=True)  # opens the connection
            round_trip_s = statistics.median(_timed(lambda: ping(b"", timeout=_ANSWER_S)) for _ in range(_PINGS))
            return Link(
                _rate(lambda size: _up(channel, size), round_trip_s),
                _rate(lambda size: _down(channel, size), round_trip_s),
                round_trip_s,
            )
        except grpc.RpcError as error:
            raise EnvironmentProblem(
                f"the link to the hub at {address} cannot be measured ({error.code().name.lower()}: {error.details()}); "
                "the hub is started by `edgelam server`, which prints its address (--data-plane HOST:PORT); let the "
                f"server's firewall pass TCP port {port}"
            ) from error


def _rate(move: Callable[[int], None], round_trip_s: float) -> float:
    """Bits a second, of the first size that takes long enough."""
    size = _FIRST_BYTES
    while True:
        seconds = _when_free(move, size)
        if seconds >= _LONG_ENOUGH_S or 4 * size > MAX_BYTES:
            return 8 * size / max(seconds - round_trip_s, seconds / 10)
        size *= 4


def _when_free(move: Callable[[int], None], size: int) -> float:
    """Few may measure at once; others wait for their turn."""
    for attempt in range(_BUSY_TRIES):
        try:
            return _timed(lambda: move(size))
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.RESOURCE_EXHAUSTED or attempt == _BUSY_TRIES - 1:
                raise
        time.sleep(_BUSY_WAIT_S)
    raise AssertionError("the last attempt returns or raises")


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _up(channel: grpc.Channel, size: int) -> None:
    channel.stream_unary(f"/{SERVICE}/Take")(_chunks(size), timeout=MAX_SECONDS)


def _chunks(size: int) -> Iterator[bytes]:
    chunk = bytes(CHUNK_BYTES)
    for _ in range(size // CHUNK_BYTES):
        yield chunk


def _down(channel: grpc.Channel, size: int) -> None:
    for _ in channel.unary_stream(f"/{SERVICE}/Give")(size.to_bytes(8, "big"), timeout=MAX_SECONDS):
        pass
