"""One end of a link over gRPC: its outbox, its reading thread, and the pulse by which the ends know each other alive.

Knows neither who dialled nor what the frames mean. Neighbours: `dial` and `serve`, which make it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import grpc

from edgelam_fl.wire.counters import ByteCounters
from edgelam_fl.wire.grpc.options import LinkTiming, grpc_reason
from edgelam_fl.wire.link import NOT_READING, Link
from edgelam_fl.wire.outbox import Outbox
from edgelam_fl.wire.terms import OnFrame, OnLost


class GrpcLink(Link):
    """A link whose messages gRPC takes from `outbox`."""

    def __init__(
        self,
        name: str,
        counters: ByteCounters,
        on_frame: OnFrame,
        on_lost: OnLost,
        timing: LinkTiming,
        barred: Callable[[], bool] = lambda: False,
    ) -> None:
        """`barred`: whether the other end's membership has ended; asked at every pulse."""
        super().__init__(name, counters, on_frame, on_lost)
        self.outbox = Outbox()
        self._timing, self._barred = timing, barred
        self._over = threading.Event()  # nothing more comes

    def _transmit(self, priority: int, messages: list[bytes], left: Callable[[], None] | None) -> None:
        if not self.outbox.put(priority, messages, self.terms.pace if self.is_open else None, left):
            self.lost(NOT_READING)

    def _shut(self, lost: bool) -> None:
        self.outbox.close(drop_data=lost)

    def start_pulse(self, hang_up: Callable[[], object]) -> None:
        """Starts the pulse of an open link: pings the other end, and gives the link up if nothing moves for too long.

        `hang_up` ends the stream. It is called too if a closed link's stream does not end by itself.
        """
        threading.Thread(target=self._pulse, args=(hang_up,), name=f"pulse {self.name}", daemon=True).start()

    def _pulse(self, hang_up: Callable[[], object]) -> None:
        # A thread of its own, because "alive" must not depend on how long a layer computes.
        while not self.closed and not self._over.wait(self._timing.ping_every_s):
            problem = self._problem()
            if problem:
                self.lost(problem)
                hang_up()
                return
            self.ping()
        while not self._over.wait(self._timing.farewell_s):
            if not self.outbox.has_moved(self._timing.farewell_s):
                hang_up()
                return

    def _problem(self) -> str:
        """Returns why the link is to be given up; empty: it is well."""
        limit_s, silent_s, stuck_s = self.terms.silent_s, time.monotonic() - self.last_heard, self.outbox.stuck_s
        if self._barred():
            return "the other end's membership in the federation has ended"
        if 0 < limit_s < silent_s:
            return f"silent for {silent_s:.0f} s"
        if 0 < limit_s < stuck_s:
            return f"{NOT_READING}: nothing went out for {stuck_s:.0f} s"
        return ""

    def read_from(self, messages: Iterator[bytes], then: Callable[[], object] = lambda: None) -> None:
        """Starts the thread that reads until `messages` ends; it calls `then` at its own end."""

        def read() -> None:
            self.read(messages)
            then()

        threading.Thread(target=read, name=f"read {self.name}", daemon=True).start()

    def read(self, messages: Iterator[bytes], most: int | None = None) -> None:
        """Receives `most` messages, None: until `messages` ends. The link is lost if they end or break before that."""
        try:
            for number, message in enumerate(messages, 1):
                self.receive(message)
                if number == most:
                    return
            self.lost("the other end closed the link")
        except grpc.RpcError as error:
            self.lost(grpc_reason(error))
        except Exception as error:  # noqa: BLE001 - grpc raises a bare Exception when the peer vanishes
            self.lost(f"the connection broke ({error or 'the peer vanished'})")
        self._over.set()
