"""A TCP proxy whose connections can be cut, refused or silenced, those of one process alone if need be. Knows no protocol.

What passes is encrypted, so who has dialled is found by the port: this machine knows which of its processes owns it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

_CONNECT_S = 10.0
_ESTABLISHED = "01"


@dataclass
class _Pair:
    """The two sockets of one connection."""

    near: socket.socket
    far: socket.socket
    port: int
    """Of the dialler."""
    open: threading.Event = field(default_factory=threading.Event)
    """Whether bytes pass."""
    stranded: bool = False
    ended: bool = False

    def end(self) -> None:
        self.ended = True
        self.open.set()
        for side in (self.near, self.far):
            with contextlib.suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)


class Line:
    """Forwards connections from `listen` to `target`, both HOST:PORT; port 0: a free one."""

    def __init__(self, target: str, listen: str = "127.0.0.2:0") -> None:
        self._target = _address(target)
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(_address(listen))
        self._listener.listen(128)
        host, port = self._listener.getsockname()
        self.address = f"{host}:{port}"
        self._pairs: list[_Pair] = []
        self._refused: list[Callable[[int], bool]] = []
        self._silenced: list[Callable[[int], bool]] = []
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, name=f"line to {target}", daemon=True).start()

    def open_to(self, hits: Callable[[int], bool]) -> int:
        """Returns how many connections are open whose dialler's port `hits`."""
        return sum(hits(pair.port) for pair in self._alive())

    def cut(self, hits: Callable[[int], bool]) -> int:
        """Closes the connections whose dialler's port `hits`; returns how many."""
        struck = [pair for pair in self._alive() if hits(pair.port)]
        for pair in struck:
            pair.end()
        return len(struck)

    def refuse(self, hits: Callable[[int], bool]) -> Callable[[], None]:
        """Closes connections and lets none in until the returned function is called."""
        self._refused.append(hits)
        self.cut(hits)
        return lambda: self._refused.remove(hits)

    def silence(self, hits: Callable[[int], bool]) -> Callable[[], None]:
        """Lets nothing pass, on open connections and on new ones, until the returned function is called."""
        self._silenced.append(hits)
        for pair in self._alive():
            if hits(pair.port):
                pair.open.clear()

        def end() -> None:
            self._silenced.remove(hits)
            for pair in self._alive():
                if not pair.stranded and not any(silenced(pair.port) for silenced in self._silenced):
                    pair.open.set()

        return end

    def strand(self, hits: Callable[[int], bool]) -> int:
        """Lets nothing pass on open connections any more, and says so to nobody; new ones are let in. Returns how many are stranded.

        So an address looks that has changed: what was open is dead, and neither end knows.
        """
        struck = [pair for pair in self._alive() if hits(pair.port)]
        for pair in struck:
            pair.stranded = True
            pair.open.clear()
        return len(struck)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut(lambda port: True)

    def _alive(self) -> list[_Pair]:
        with self._lock:
            self._pairs = [pair for pair in self._pairs if not pair.ended]
            return list(self._pairs)

    def _accept(self) -> None:
        while True:
            try:
                near, peer = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(near, peer[1]), daemon=True).start()

    def _serve(self, near: socket.socket, port: int) -> None:
        if any(hits(port) for hits in list(self._refused)):
            near.close()
            return
        try:
            far = socket.create_connection(self._target, _CONNECT_S)
        except OSError:  # the target is not up: the dialler sees a broken connection, as without a proxy
            near.close()
            return
        far.settimeout(None)
        pair = _Pair(near, far, port)
        with self._lock:
            self._pairs.append(pair)
        if not any(hits(port) for hits in list(self._silenced)):
            pair.open.set()
        for source, sink in ((near, far), (far, near)):
            with contextlib.suppress(OSError):  # cut meanwhile; the pump then ends at once
                source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=_pump, args=(pair, source, sink), daemon=True).start()


def _pump(pair: _Pair, source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            pair.open.wait()
            if pair.ended:
                break
            sink.sendall(data)
    pair.end()
    source.close()


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host, int(port)


def owns(pids: Iterable[int], port: int) -> bool:
    """Returns whether one of the processes dialled from `port` of this machine."""
    inodes = _inodes(port)
    return any(inodes & _sockets(pid) for pid in pids)


def _inodes(port: int) -> set[str]:
    """Returns the numbers of the established sockets whose own port is `port`; IPv6 sockets dial IPv4 addresses too."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text(encoding="ascii").splitlines()[1:]:
                fields = line.split()
                if int(fields[1].rpartition(":")[2], 16) == port and fields[3] == _ESTABLISHED:
                    found.add(f"socket:[{fields[9]}]")
    return found


def _sockets(pid: int) -> set[str]:
    found = set()
    with contextlib.suppress(OSError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                found.add(os.readlink(entry.path))
    return found
