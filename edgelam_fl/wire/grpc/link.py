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
from edgelam_fl.wire.link import Link
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

    def _transmit(self, priority: int, messages: list[bytes], left: Callable[[], None] | None) -> None:
        self.outbox.put(priority, messages, self.terms.pace if self.is_open else None, left)

    def _shut(self, lost: bool) -> None:
        self.outbox.close(drop_data=lost)

    def start_pulse(self, hang_up: Callable[[], object]) -> None:
        """Starts the pulse of an open link: pings the other end, and gives the link up if nothing comes back for too long."""
        threading.Thread(target=self._pulse, args=(hang_up,), name=f"pulse {self.name}", daemon=True).start()

    def _pulse(self, hang_up: Callable[[], object]) -> None:
        # A thread of its own, because "alive" must not depend on how long a layer computes.
        while not self.closed:
            time.sleep(self._timing.ping_every_s)
            if self.closed:
                return
            silent_s = time.monotonic() - self.last_heard
            if self._barred():
                self.lost("the other end's membership in the federation has ended")
                hang_up()
            elif 0 < self.terms.silent_s < silent_s:
                self.lost(f"silent for {silent_s:.0f} s")
                hang_up()
            else:
                self.ping()

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
