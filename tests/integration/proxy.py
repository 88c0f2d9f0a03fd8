"""Proxies: one keeps every byte, one also what is in them under TLS, one stalls. And what recordings say: HTTP/2 frames, and the gRPC messages in them."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import ssl
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from edgelam_fl.trust.identity import peer_of, tls_name

_Result = TypeVar("_Result")

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _PADDED = 0, 0x8


@dataclass
class Connection:
    """All bytes of one TCP connection, from the one that dialled (`up`) and to it (`down`)."""

    up: bytearray = field(default_factory=bytearray)
    down: bytearray = field(default_factory=bytearray)
    peer: str = ""
    """The member that dialled, by its certificate; empty: it showed none."""


class Proxy:
    """Forwards connections to `target` (host:port). `buffer_bytes`: of each of its sockets, both ways (0: the system's)."""

    _source = ""  # the address that it dials from; empty: any

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

    def cut(self) -> None:
        """Closes all connections; new ones are taken."""
        for opened in self._sockets:
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
                if self._source:
                    far.bind((self._source, 0))
                far.connect(self._target)
                far.settimeout(None)
            except OSError:  # the target is not up (yet): the dialler sees a broken connection, as it would without us
                _shut(near)
                _shut(far)
                continue
            self._sockets += [near, far]
            up, down = self._watch()
            for source, sink, passing in ((near, far, up), (far, near, down)):
                with contextlib.suppress(OSError):  # cut meanwhile; the pump then ends at once
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


class DecryptingProxy:
    """Ends the TLS of each connection and begins it again, by means of keys that only a test has; keeps what was inside.

    It plays the member `name` of the federation before `target` (host:port), and each dialler behind it. identities: the
    folders of members' keys, by name.
    """

    def __init__(self, target: str, name: str, identities: Mapping[str, Path]) -> None:
        host, _, port = target.rpartition(":")
        self._target, self._name, self._identities = (host, int(port)), name, identities
        self.connections: list[Connection] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"decrypting proxy {target}", daemon=True)
        self._thread.start()
        self._server = self._run(asyncio.start_server(self._pass_on, "127.0.0.1", 0, ssl=self._played()))
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def close(self) -> None:
        self._run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _end(self) -> None:
        self._server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _played(self) -> ssl.SSLContext:
        folder = self._identities[self._name]
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
        context.load_verify_locations(folder / "authority.pem")
        context.verify_mode = ssl.CERT_OPTIONAL  # Flower's clients show none; gRPC's always do
        context.set_alpn_protocols(["h2", "http/1.1"])
        return context

    def _as(self, peer: str, protocol: str | None) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self._identities[self._name] / "authority.pem")
        if peer:
            context.load_cert_chain(self._identities[peer] / "certificate.pem", self._identities[peer] / "key.pem")
        if protocol:
            context.set_alpn_protocols([protocol])
        return context

    async def _pass_on(self, near_in: asyncio.StreamReader, near_out: asyncio.StreamWriter) -> None:
        tls = near_out.get_extra_info("ssl_object")
        shown = tls.getpeercert(binary_form=True)
        connection = Connection(peer=peer_of(ssl.DER_cert_to_PEM_cert(shown).encode()).name if shown else "")
        self.connections.append(connection)
        context = self._as(connection.peer, tls.selected_alpn_protocol())
        try:
            far_in, far_out = await asyncio.open_connection(
                *self._target, ssl=context, server_hostname=tls_name(self._name)
            )
        except OSError:  # as for the other proxies: the dialler sees a broken connection
            near_out.close()
            return
        await asyncio.gather(_carry(near_in, far_out, connection.up), _carry(far_in, near_out, connection.down))


async def _carry(source: asyncio.StreamReader, sink: asyncio.StreamWriter, kept: bytearray) -> None:
    with contextlib.suppress(OSError):
        while data := await source.read(1 << 16):
            kept.extend(data)
            sink.write(data)
            await sink.drain()
    sink.close()


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


class CuttingProxy(Proxy):
    """Breaks connections: each after so many bytes, either way, as `budgets` says, or all of them when told to.

    `budgets`: for the next connections, in turn; after the last one none breaks by itself.
    """

    def __init__(self, target: str, budgets: Iterable[int] = ()) -> None:
        self._budgets = iter(budgets)
        self.cuts = 0
        self._source = ""
        super().__init__(target)

    def move(self, source: str) -> None:
        """Lets nothing more pass on connections that are open, of which neither end hears; dials later ones from `source`."""
        self._source = source

    def cut(self) -> None:
        """Closes all connections; new ones are taken."""
        self.cuts += 1
        super().cut()

    def _watch(self) -> tuple[Callable[[bytes], object], Callable[[bytes], object]]:
        left, source = next(self._budgets, None), self._source

        def passing(data: bytes) -> None:
            nonlocal left
            if source != self._source:
                threading.Event().wait()
            if left is None:
                return
            left -= len(data)
            if left < 0:
                left = None
                self.cuts += 1
                raise OSError("cut")

        return passing, passing


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
