"""Floods at a data port: streams that are half open, and PINGs. Bounded; each ends by itself.

A client of gRPC keeps the rules of HTTP/2. These speak it by hand: as many streams as they like, and no answer is read.
`python -m tests.floods HOST:PORT STREAMS PINGS` sends both in ten waves, at the lowest priority, and prints what became of them.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable

from edgelam_fl.addresses import split_address
from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _SETTINGS, _PING = 0, 1, 4, 6  # types of HTTP/2's frames
_END_HEADERS = 4
_HELD = 100  # connections that stay open
_PATH = "/edgelam.v1.DataPlane/Link"


def half_open_streams(
    address: str, streams: int, per_connection: int, under_way: Callable[[], bool] = lambda: True
) -> Counter[str]:
    """Opens streams that say nothing, `per_connection` on each connection; keeps the last of them open."""
    tally: Counter[str] = Counter()
    held: list[socket.socket] = []
    while tally["streams"] < streams and under_way():
        connection = half_open(address, per_connection)
        if connection is None:
            tally["connections refused or closed"] += 1
            continue
        tally["connections"] += 1
        tally["streams"] += per_connection
        held.append(connection)
        if len(held) > _HELD:
            held.pop(0).close()
    for connection in held:
        connection.close()
    return tally


def half_open(address: str, streams: int) -> socket.socket | None:
    """Returns a connection with this many streams that say nothing; None if the port does not take or keep it."""
    connection = _connected(address)
    if connection is None:
        return None
    opened = b"".join(_frame(_HEADERS, _END_HEADERS, 1 + 2 * number, _request()) for number in range(streams))
    return connection if _sent(connection, opened) else None


def pings(address: str, most: int, under_way: Callable[[], bool] = lambda: True) -> Counter[str]:
    """Sends PINGs: in HTTP/2's own frames, and in ours without and with a HELLO before. Answers are not read."""
    tally: Counter[str] = Counter()
    hello = pb.Header(kind=pb.HELLO, hello=pb.Hello(version=PROTOCOL_VERSION, job="x/1/1", node="x", codecs=["raw"]))
    own = _message(pb.Header(kind=pb.PING))
    kinds = {
        "HTTP/2": (b"", _frame(_PING, 0, 0, bytes(8))),
        "before HELLO": (b"", _frame(_DATA, 0, 1, own)),
        "after HELLO": (_frame(_DATA, 0, 1, _message(hello)), _frame(_DATA, 0, 1, own)),
    }
    while sum(tally[name] for name in kinds) < most and under_way():
        for name, (first, ping) in kinds.items():
            connection = _connected(address)
            if connection is None:
                tally["connections refused"] += 1
                continue
            tally["connections"] += 1
            _sent(connection, _frame(_HEADERS, _END_HEADERS, 1, _request()) + first)
            for _ in range(20):
                if not _sent(connection, 50 * ping):
                    break
                tally[name] += 50
            connection.close()
    return tally


def _connected(address: str) -> socket.socket | None:
    """Returns a connection that has said it speaks HTTP/2; None if nobody takes it."""
    try:
        connection = socket.create_connection(split_address(address, "the address"), timeout=5.0)
    except OSError:
        time.sleep(0.01)
        return None
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection if _sent(connection, _PREFACE + _frame(_SETTINGS, 0, 0, b"")) else None


def _sent(connection: socket.socket, data: bytes) -> bool:
    try:
        connection.sendall(data)
    except OSError:
        connection.close()
        return False
    return True


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _request() -> bytes:
    """Returns the headers of a call to the data port, as literals that need no table of HPACK's."""
    pairs = {
        ":method": "POST",
        ":scheme": "http",
        ":path": _PATH,
        ":authority": "x",
        "content-type": "application/grpc",
        "te": "trailers",
    }
    return b"".join(
        b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in pairs.items()
    )


def _message(header: pb.Header) -> bytes:
    """Returns a frame of ours as a message of gRPC."""
    encoded = header.SerializeToString()
    message = struct.pack("<I", len(encoded)) + encoded
    return b"\x00" + struct.pack(">I", len(message)) + message


def flood(address: str, streams: int, most_pings: int, waves: int = 10, pause_s: float = 1.0) -> dict[str, float]:
    """Sends both floods in waves; returns the counts and the processor time that they took, in seconds."""
    tally: Counter[str] = Counter()
    began = time.process_time()
    for _ in range(waves):
        tally += half_open_streams(address, streams // waves, 16)
        tally += pings(address, most_pings // waves)
        time.sleep(pause_s)
    return {**tally, "cpu_s": round(time.process_time() - began, 3)}


if __name__ == "__main__":
    os.nice(19)
    print(json.dumps(flood(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
