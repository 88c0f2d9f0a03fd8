"""A TCP proxy that keeps every byte, and what its recordings say: HTTP/2 frames, and the gRPC messages inside them."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _PADDED = 0, 0x8


@dataclass
class Connection:
    """All bytes of one TCP connection, from the one that dialled (`up`) and to it (`down`)."""

    up: bytearray = field(default_factory=bytearray)
    down: bytearray = field(default_factory=bytearray)


class CountingProxy:
    """Forwards connections to `target` (host:port) and records them."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self.connections: list[Connection] = []
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, name=f"proxy {target}", daemon=True).start()

    def close(self) -> None:
        for opened in [self._listener, *self._sockets]:
            _shut(opened)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(self._target, 10)
                far.settimeout(None)
            except OSError:  # the target is not up (yet): the dialler sees a broken connection, as it would without us
                _shut(near)
                continue
            connection = Connection()
            self.connections.append(connection)
            self._sockets += [near, far]
            for source, sink, record in ((near, far, connection.up), (far, near, connection.down)):
                source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=_pump, args=(source, sink, record), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket, record: bytearray) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            record += data
            sink.sendall(data)
    _shut(source)
    _shut(sink)


def _shut(opened: socket.socket) -> None:
    with contextlib.suppress(OSError):
        opened.shutdown(socket.SHUT_RDWR)
    opened.close()


# ---------------------------------------------------------------- what a recording says


def streams(data: bytes) -> dict[int, bytes]:
    """The bytes of each HTTP/2 stream of one direction, without HTTP/2's own frames and frame headers."""
    position = len(_PREFACE) if data.startswith(_PREFACE) else 0
    found: dict[int, list[bytes]] = defaultdict(list)
    while position + 9 <= len(data):
        length = int.from_bytes(data[position : position + 3], "big")
        kind, flags = data[position + 3], data[position + 4]
        stream = int.from_bytes(data[position + 5 : position + 9], "big") & 0x7FFFFFFF
        payload = data[position + 9 : position + 9 + length]
        position += 9 + length
        if kind == _DATA:
            found[stream].append(payload[1 : len(payload) - payload[0]] if flags & _PADDED else payload)
    assert position >= len(data) - 9 or not found, "this is not HTTP/2"
    return {stream: b"".join(parts) for stream, parts in found.items()}


def grpc_messages(stream: bytes) -> Iterator[tuple[bool, bytes]]:
    """(whether gRPC compressed it, message) of one stream; the last one may be cut where the recording ends."""
    position = 0
    while position + 5 <= len(stream):
        length = int.from_bytes(stream[position + 1 : position + 5], "big")
        yield bool(stream[position]), stream[position + 5 : position + 5 + length]
        position += 5 + length
