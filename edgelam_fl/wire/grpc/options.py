"""What both ends of a link over gRPC share: options, errors in words, the link itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import grpc

from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.counters import ByteCounters
from edgelam_fl.wire.link import Link
from edgelam_fl.wire.outbox import Outbox

_METHOD = "/edgelam.v1.DataPlane/Link"
_HELLO_DEADLINE_S = 10.0
_PING_EVERY_S = 2.0
_OPTIONS = [
    ("grpc.max_receive_message_length", 6 << 20),  # a chunk and the largest header
    ("grpc.max_send_message_length", 6 << 20),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),  # the other end is a machine of the federation, never a web address
]


class GrpcLink(Link):
    def __init__(self, name: str, counters: ByteCounters, silent_s: float) -> None:
        super().__init__(name, counters)
        self.outbox = Outbox()
        self.silent_s = silent_s

    def _transmit(self, priority: int, messages: list[bytes], left: Callable[[], None] | None) -> None:
        self.outbox.put(priority, messages, self.pace, left)

    def _shut(self, lost: bool) -> None:
        self.outbox.close(drop_data=lost)

    def start_pulse(self, hang_up: Callable[[], object]) -> None:
        """Starts the pulse: pings, and gives the link up when the other end stays silent."""
        threading.Thread(target=self._pulse, args=(hang_up,), name=f"pulse {self.name}", daemon=True).start()

    def _pulse(self, hang_up: Callable[[], object]) -> None:
        # A thread of its own, because "alive" must not depend on how long a layer computes.
        while not self.closed:
            time.sleep(_PING_EVERY_S)
            if self.closed:
                return
            silent = time.monotonic() - self.last_heard
            if silent > self.silent_s:
                self.lost(f"silent for {silent:.0f} s")
                hang_up()
            else:
                self.send(pb.Header(kind=pb.PING, progress=self.progress))

    def read_from(self, messages: Iterator[bytes], then: Callable[[], object] = lambda: None) -> None:
        """Starts the thread that receives, until there are no more messages; `then` is called at its end."""

        def read() -> None:
            try:
                for message in messages:
                    self.receive(message)
                self.lost("the other end closed the link")
            except grpc.RpcError as error:
                self.lost(grpc_reason(error))
            except Exception as error:  # noqa: BLE001 - grpc raises a bare Exception when the peer vanishes
                self.lost(f"the connection broke ({error or 'the peer vanished'})")
            then()

        threading.Thread(target=read, name=f"read {self.name}", daemon=True).start()


def grpc_reason(error: grpc.RpcError) -> str:
    """The one place that turns gRPC's statuses into words."""
    code = error.code() if hasattr(error, "code") else None
    known = {
        grpc.StatusCode.UNAVAILABLE: "the connection broke",
        grpc.StatusCode.CANCELLED: "the link was given up",
        grpc.StatusCode.DEADLINE_EXCEEDED: "no answer in time",
        grpc.StatusCode.RESOURCE_EXHAUSTED: "a message above the size limit",
        grpc.StatusCode.NOT_FOUND: "it has not dialled the server's relay yet",
        grpc.StatusCode.FAILED_PRECONDITION: "the server's relay is full",
        grpc.StatusCode.PERMISSION_DENIED: "the server's relay does not know this run",
        grpc.StatusCode.UNIMPLEMENTED: "something else than a stage host answers there",
    }
    return known.get(code, f"gRPC {code.name if code else error}")
