"""TCP proxies: one keeps every byte, one stalls. And what recordings say: HTTP/2 frames, and the gRPC messages in them."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _PADDED = 0, 0x8


@dataclass
class Connection:
    """All bytes of one TCP connection, from the one that dialled (`up`) and to it (`down`)."""

    up: bytearray = field(default_factory=bytearray)
    down: bytearray = field(default_factory=bytearray)


class Proxy:
    """Forwards connections to `target` (host:port). `buffer_bytes`: of each of its sockets, both ways (0: the system's)."""

    def __init__(self, target: str, buffer_bytes: int = 0) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._buffer_bytes = buffer_bytes
        self._sockets: list[socket.socket] = []
        self._listener = self._socket()
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen()
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, name=f"proxy {target}", daemon=True).start()

    def close(self) -> None:
        for opened in [self._listener, *self._sockets]:
            _shut(opened)

    def _watch(self) -> tuple[Callable[[bytes], object], Callable[[bytes], object]]:
        """For a new connection: what is called before each piece goes to the target, and from it."""
        raise NotImplementedError

    def _socket(self) -> socket.socket:
        made = socket.socket()
        if self._buffer_bytes:  # before it is connected or listens: later, TCP's window would be agreed
            for side in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                made.setsockopt(socket.SOL_SOCKET, side, self._buffer_bytes)
        return made

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = self._socket()
            try:
                far.settimeout(10)
                far.connect(self._target)
                far.settimeout(None)
            except OSError:  # the target is not up (yet): the dialler sees a broken connection, as it would without us
                _shut(near)
                _shut(far)
                continue
            self._sockets += [near, far]
            up, down = self._watch()
            for source, sink, passing in ((near, far, up), (far, near, down)):
                source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=_pump, args=(source, sink, passing), daemon=True).start()


class CountingProxy(Proxy):
    """Keeps every byte."""

    def __init__(self, target: str) -> None:
        self.connections: list[Connection] = []
        super().__init__(target)

    def _watch(self) -> tuple[Callable[[bytes], object], Callable[[bytes], object]]:
        connection = Connection()
        self.connections.append(connection)
        return connection.up.extend, connection.down.extend


class StallingProxy(Proxy):
    """Pauses now and then, at random from `seed`: mostly for a moment, sometimes for long."""

    def __init__(self, target: str, buffer_bytes: int, seed: int) -> None:
        self._seeds = random.Random(seed)
        super().__init__(target, buffer_bytes)

    def _watch(self) -> tuple[Callable[[bytes], object], Callable[[bytes], object]]:
        return self._pauses(random.Random(self._seeds.random())), self._pauses(random.Random(self._seeds.random()))

    def _pauses(self, chance: random.Random) -> Callable[[bytes], object]:
        def passing(data: bytes) -> None:
            drawn = chance.random()
            if drawn < 0.03:
                time.sleep(0.3 if drawn < 0.0003 else 0.02 * chance.random())

        return passing


def _pump(source: socket.socket, sink: socket.socket, passing: Callable[[bytes], object]) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            passing(data)
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
