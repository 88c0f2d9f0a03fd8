"""Links that are as slow and as far as a benchmark wants them: proxies that hold bytes back, in a process of their own.

Each direction of each proxy is one queue, whatever connections pass through it, as on a device's own line: bytes leave at the rate,
and arrive half a round trip later. Python's timing and its one lock cost a few per cent of a core at 100 Mbit/s.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from benchmarks.compared.workers import Trains, started

_PIECE = 1 << 14  # bytes: at 5 Mbit/s a piece takes 26 ms
_WAITING = 64  # pieces in a queue, before the sender has to wait


@dataclass(frozen=True)
class Shape:
    """A link's rate, the same both ways (0: unlimited), and its round trip."""

    mbps: float
    round_trip_s: float


UNSHAPED = Shape(0, 0)


def shaped_proxies(targets: Sequence[str], shape: Shape) -> tuple[Trains, list[str]]:
    """Makes one proxy per target (host:port). Says their addresses, and makes no steps."""
    ready, addresses = threading.Event(), list[str]()

    async def run() -> None:
        for target in targets:
            line = _Line(target, shape)
            server = await asyncio.start_server(line.connected, "127.0.0.1", 0)
            addresses.append(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
        ready.set()
        await asyncio.Event().wait()

    threading.Thread(target=lambda: asyncio.run(run()), daemon=True).start()
    ready.wait()
    return lambda number: 0, addresses


@contextmanager
def shaped(targets: Sequence[str], shape: Shape) -> Iterator[list[str]]:
    """Yields the addresses that stand for the targets, behind links of the shape."""
    with started(shaped_proxies, targets, shape) as (_worker, addresses):
        yield addresses


class _Line:
    """One device's line to one target."""

    def __init__(self, target: str, shape: Shape) -> None:
        host, _, port = target.rpartition(":")
        self._target, self._shape = (host, int(port)), shape
        self._free_at = {"up": 0.0, "down": 0.0}  # when the line has sent all that it has taken

    async def connected(self, near_in: asyncio.StreamReader, near_out: asyncio.StreamWriter) -> None:
        try:
            far_in, far_out = await asyncio.open_connection(*self._target)
        except OSError:  # the dialler sees a broken connection, as it would without us
            near_out.close()
            return
        ways = (("up", near_in, far_out), ("down", far_in, near_out))
        await asyncio.gather(*[self._carry(*way) for way in ways])

    async def _carry(self, way: str, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_WAITING)
        delivery = asyncio.create_task(_deliver(queue, sink))
        with contextlib.suppress(OSError):
            while data := await source.read(_PIECE):
                sent_at = max(loop.time(), self._free_at[way])
                if self._shape.mbps:
                    sent_at += 8 * len(data) / (self._shape.mbps * 1e6)
                self._free_at[way] = sent_at
                await queue.put((sent_at + self._shape.round_trip_s / 2, data))
        await queue.put((0.0, b""))
        await delivery


async def _deliver(queue: asyncio.Queue[tuple[float, bytes]], sink: asyncio.StreamWriter) -> None:
    loop = asyncio.get_running_loop()
    with contextlib.suppress(OSError):
        while True:
            at, data = await queue.get()
            if not data:
                break
            if (wait_s := at - loop.time()) > 0:
                await asyncio.sleep(wait_s)
            sink.write(data)
            await sink.drain()
    sink.close()
