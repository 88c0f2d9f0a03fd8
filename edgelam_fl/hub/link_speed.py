"""Measures the link to the server's hub with real bytes: rate each way, round trip. Knows no plans.

The rate is that of one stream while nothing else moves: several nodes on one medium share it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc

from edgelam_fl.addresses import join_address
from edgelam_fl.errors import EnvironmentProblem
from edgelam_fl.hub.echo import CHUNK_BYTES, ECHO_SERVICE, LIMITS, write_length
from edgelam_fl.trust.identity import SERVER
from edgelam_fl.wire.grpc.secure import PLAIN, Security
from edgelam_fl.wire.grpc.services import stub

HUB_ANSWER_S = 10.0  # patience with a hub that does not answer
_PINGS = 5
_FIRST_BYTES = 64 << 10
_LONG_ENOUGH_S = 0.4  # buffers on the way then weigh little; a faster transfer is repeated with more bytes
_BUSY_WAIT_S, _BUSY_TRIES = 1.0, 30


@dataclass(frozen=True)
class LinkSpeed:
    """A measured link: bits per second from and to this machine, and the round trip in seconds."""

    up_bps: float
    down_bps: float
    round_trip_s: float


def measure_link(host: str, port: int, answer_s: float = HUB_ANSWER_S, security: Security = PLAIN) -> LinkSpeed:
    """Measures the link to the hub at `host` and `port`, with twice 21 MiB at most; a slow link takes about a second.

    Raises EnvironmentProblem if no hub answers within `answer_s` seconds.
    """
    address = join_address(host, port)
    with security.channel(address, SERVER, []) as channel:
        try:
            ping = stub(channel, ECHO_SERVICE, "Ping")
            ping(b"", timeout=answer_s, wait_for_ready=True)  # opens the connection
            round_trip_s = statistics.median(_seconds(lambda: ping(b"", timeout=answer_s)) for _ in range(_PINGS))
            return LinkSpeed(
                rate_bps(lambda size: _seconds_when_free(lambda: _send(channel, size)), round_trip_s),
                rate_bps(lambda size: _seconds_when_free(lambda: _receive(channel, size)), round_trip_s),
                round_trip_s,
            )
        except grpc.RpcError as error:
            raise EnvironmentProblem(
                f"the link to the hub at {address} cannot be measured ({error.code().name.lower()}: {error.details()}); "
                "the hub is started by `edgelam server`, which prints its address (--data-plane HOST:PORT); let the "
                f"server's firewall pass TCP port {port}"
            ) from error


def rate_bps(seconds_for: Callable[[int], float], round_trip_s: float) -> float:
    """Returns bits per second, from the first number of bytes whose transfer takes long enough.

    `seconds_for` moves that many bytes and returns the seconds taken, the round trip included.
    """
    size = _FIRST_BYTES
    while True:
        seconds = seconds_for(size)
        if seconds >= _LONG_ENOUGH_S or 4 * size > LIMITS.most_bytes:
            return 8 * size / max(seconds - round_trip_s, seconds / 10)
        size *= 4


def _seconds_when_free(move: Callable[[], None]) -> float:
    """Times a transfer; waits for its turn if the hub has no place, because few may measure at once."""
    for attempt in range(_BUSY_TRIES):
        try:
            return _seconds(move)
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.RESOURCE_EXHAUSTED or attempt == _BUSY_TRIES - 1:
                raise
        time.sleep(_BUSY_WAIT_S)
    raise AssertionError("the last attempt returns or raises")


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _send(channel: grpc.Channel, size: int) -> None:
    stub(channel, ECHO_SERVICE, "Take")(_chunks(size), timeout=LIMITS.most_s)


def _chunks(size: int) -> Iterator[bytes]:
    chunk = bytes(CHUNK_BYTES)
    for _ in range(size // CHUNK_BYTES):
        yield chunk


def _receive(channel: grpc.Channel, size: int) -> None:
    for _ in stub(channel, ECHO_SERVICE, "Give")(write_length(size), timeout=LIMITS.most_s):
        pass
