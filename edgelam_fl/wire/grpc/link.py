"""One end of a link over gRPC: its outbox, its streams one after the other, and the pulse by which the ends know each other alive.

A link whose stream breaks is suspended: what it sends waits, and what may not have arrived leaves again on its next stream.
The end that dialled dials again; the other waits for it; both give up at the terms' deadline.
Knows neither what the frames mean nor how to dial. Neighbours: `dial` and `serve`, which make links and streams.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import grpc

from edgelam_fl.errors import EdgelamError, PeerLost
from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.counters import ByteCounters
from edgelam_fl.wire.grpc.options import LinkTiming, grpc_reason
from edgelam_fl.wire.link import CLOSED, NOT_READING, Link, kind_and_payload
from edgelam_fl.wire.outbox import Outbox
from edgelam_fl.wire.terms import OnFrame, OnLost

# link, moment until which it makes sense -> returns once the link has another stream, or has ended; raises if it gets none
DialAgain = Callable[["GrpcLink", float], None]


class Stream:
    """One gRPC call under a link.

    It begins under the link that shakes hands, and moves to an older one if that link's other end has come again.
    """

    def __init__(self, link: GrpcLink, hang_up: Callable[[], object] = lambda: None) -> None:
        """`hang_up` ends the call."""
        self.link, self.hang_up = link, hang_up
        self._first = link
        link.stream = self

    def outgoing(self) -> Iterator[bytes]:
        """Yields what gRPC is to send."""
        yield from self._first.outbox
        if self.link is not self._first:
            yield from self.link.outbox.sender(self)

    def read_from(self, messages: Iterator[bytes], then: Callable[[], object] = lambda: None) -> None:
        """Starts the thread that reads until `messages` ends; it calls `then` at its own end."""

        def read() -> None:
            self.read(messages)
            then()

        threading.Thread(target=read, name=f"read {self.link.name}", daemon=True).start()

    def read(self, messages: Iterator[bytes], most: int | None = None) -> None:
        """Hands the link `most` messages, None: until `messages` ends, and then the end of the stream."""
        clean = False
        try:
            for number, message in enumerate(messages, 1):
                self.link.take(self, message)
                if number == most:
                    return
            clean, reason = True, CLOSED
        except grpc.RpcError as error:
            reason = grpc_reason(error)
        except Exception as error:  # noqa: BLE001 - grpc raises a bare Exception when the peer vanishes
            reason = f"the connection broke ({error or 'the peer vanished'})"
        self.link.stream_ended(self, reason, clean=clean)


class GrpcLink(Link):
    """A link whose messages the sender of its stream takes from `outbox`."""

    def __init__(
        self,
        name: str,
        counters: ByteCounters,
        on_frame: OnFrame,
        on_lost: OnLost,
        timing: LinkTiming,
        barred: Callable[[], bool] = lambda: False,
        certificate: str = "",
    ) -> None:
        """`barred`: whether the other end's membership has ended; asked at every pulse. `certificate`: its number, as shown."""
        super().__init__(name, counters, on_frame, on_lost)
        self.outbox = Outbox()
        self.hello = pb.Hello()  # by which it was opened, or would go on
        self.stream: Stream | None = None  # None: suspended
        self.certificate = certificate
        self._timing, self._barred = timing, barred
        self._dial_again: DialAgain | None = None
        self._taking = threading.RLock()  # a message is taken, or the stream changes; no other lock is held around it
        self._suspended_at, self._suspended_for = 0.0, ""
        self._acknowledged = 0
        self._given_up = False  # lost: nothing that is queued or kept matters any more
        self._woken = threading.Event()  # the pulse has something to look at
        self._over = threading.Event()  # nothing more comes, and nothing more goes

    @property
    def waits_for_stream(self) -> bool:
        """Returns whether the link is suspended, and another stream would be of use."""
        return self.stream is None and self._may_go_on()

    @property
    def received(self) -> int:
        """Counts the messages of the link that have come."""
        return self._arrivals.count

    # ---------------------------------------------------------------- as a transport

    def _transmit(self, priority: int, messages: list[bytes], left: Callable[[], None] | None) -> None:
        if not self.outbox.put(priority, messages, self.terms.pace if self.is_open else None, left):
            self.lost(NOT_READING)

    def _transmit_later(self, priority: int, make: Callable[[], list[bytes]], left: Callable[[], None] | None) -> None:
        self.outbox.put_later(priority, make, self.terms.pace, left)

    def _shut(self, lost: bool) -> None:
        self._given_up = self._given_up or lost
        if not lost and self.is_open:
            with self._send_lock:
                self._enqueue(pb.Header(kind=pb.BYE, job_token=self.terms.job_token), [b""])
        self.outbox.close(drop_data=lost)
        if self.stream is None and not self._may_go_on():
            self._over.set()
        self._woken.set()

    def _acknowledge(self) -> None:
        self._send_sign(pb.ACK)

    def _take_ack(self, received: int) -> bool:
        if received <= self._acknowledged:
            return False
        self.outbox.acknowledge(received)
        self._acknowledged = received
        return True

    # ---------------------------------------------------------------- streams come and go

    def take(self, stream: Stream, message: bytes) -> None:
        """Takes a message of `stream`; drops it if that is no longer the link's: the next stream brings it again."""
        with self._taking:
            if self.stream is stream:
                self.receive(message)

    def stream_ended(self, stream: Stream, reason: str, *, clean: bool) -> None:
        """Suspends the link if `stream` was its own and the link may go on, else ends it.

        `clean`: gRPC knows of no problem. At the dialled end that says nothing: there, a broken connection may look the same.
        """
        with self._taking:
            if self.stream is not stream:
                return
            suspended = self._may_go_on() and not (clean and self.closed)
            if suspended:
                self.stream, self._suspended_at, self._suspended_for = None, time.monotonic(), reason
                self.outbox.pause()
            else:
                self._over.set()
        self._woken.set()
        if not suspended:
            self.lost(reason)
        elif self.terms.on_suspended is not None and not self.closed:
            self.terms.on_suspended(self, reason)

    def continue_on(self, newcomer: Link) -> pb.Ready | None:
        """Goes on with the newcomer's stream if session and certificate are those of this link."""
        if not isinstance(newcomer, GrpcLink) or newcomer.stream is None:
            return None
        same = (newcomer.hello.session, newcomer.certificate) == (self.hello.session, self.certificate)
        if not same or not self.hello.session or not self._may_go_on():
            return None
        terms, received = self.terms, self.go_on(newcomer, newcomer.hello.received)
        return pb.Ready(
            version=PROTOCOL_VERSION,
            window=terms.window,
            activation_codec=terms.activation_codec,
            gradient_codec=terms.gradient_codec,
            job_token=terms.job_token,
            received=received,
        )

    def go_on(self, newcomer: GrpcLink, received: int) -> int:
        """Takes over the newcomer's stream; the other end has `received` messages. Returns how many have come from there.

        Raises ProtocolError for a number that cannot be.
        """
        stream = newcomer.stream
        assert stream is not None  # it has just brought a message
        with self._taking:
            if not self._may_go_on():
                raise PeerLost(f"{self.name} has ended")
            again = self.outbox.restart(stream, received)
            older, self.stream = self.stream, stream
            stream.link = self
            self.last_heard = time.monotonic()
            without_s = 0.0 if older is not None else self.last_heard - self._suspended_at
        for message in again:
            kind, payload_bytes = kind_and_payload(message)
            self.counters.add(self.name, "sent", kind, payload_bytes, len(message))
        if older is not None:
            older.hang_up()
        if self.terms.on_resumed is not None and not self.closed:
            self.terms.on_resumed(self, without_s, sum(map(len, again)))
        self._woken.set()
        return self.received

    def _may_go_on(self) -> bool:
        """Returns whether the link outlives its stream: it is open, or this end has yet to deliver what it said before it closed."""
        if not self.is_open or self._given_up or not self.terms.reconnect_s:
            return False
        return not self.closed or (self._dial_again is not None and self.outbox.has_undelivered)

    # ---------------------------------------------------------------- the pulse

    def start_pulse(self, dial_again: DialAgain | None = None) -> None:
        """Starts the pulse of an open link: pings the other end, gives up a stream on which nothing moves for too long.

        `dial_again`: gets a suspended link another stream; None: the other end dials.
        """
        self._dial_again = dial_again
        threading.Thread(target=self._pulse, name=f"pulse {self.name}", daemon=True).start()

    def _pulse(self) -> None:
        # A thread of its own, because "alive" must not depend on how long a layer computes.
        while not self._over.is_set():
            wait_s = self._timing.farewell_s if self.closed else self._timing.ping_every_s
            woken = self._woken.wait(wait_s)
            self._woken.clear()
            stream = self.stream
            if stream is None:
                self._wait_for_a_stream()
            elif not self.closed:
                self._look_after(stream)
            elif not woken and not self.outbox.has_moved(self._timing.farewell_s):
                stream.hang_up()
                return

    def _look_after(self, stream: Stream) -> None:
        if self._barred():
            self.lost("the other end's membership in the federation has ended")
            stream.hang_up()
            return
        problem = self._problem()
        if problem:
            self.stream_ended(stream, problem, clean=False)
            stream.hang_up()
        else:
            self.ping()

    def _problem(self) -> str:
        """Returns why the stream is to be given up; empty: it is well."""
        limit_s, silent_s, stuck_s = self.terms.silent_s, time.monotonic() - self.last_heard, self.outbox.stuck_s
        if 0 < limit_s < silent_s:
            return f"silent for {silent_s:.0f} s"
        if 0 < limit_s < stuck_s:
            return f"{NOT_READING}: nothing went out for {stuck_s:.0f} s"
        return ""

    def _wait_for_a_stream(self) -> None:
        """Gets a suspended link another stream, or waits until the other end brings one; ends the link at the deadline."""
        reconnect_s = self.terms.reconnect_s
        problem = f"no connection again within {reconnect_s:.0f} s"
        if self._dial_again is not None:
            try:
                self._dial_again(self, self._suspended_at + reconnect_s)
                return  # that stream may be gone already, and the link suspended anew
            except EdgelamError as error:
                problem = str(error)
        while self._dial_again is None and self.waits_for_stream:
            left_s = self._suspended_at + reconnect_s - time.monotonic()  # a stream may have come and gone
            if self._barred():
                problem = "the other end's membership in the federation has ended"
            elif left_s > 0:
                self._woken.wait(min(self._timing.ping_every_s, left_s))
                self._woken.clear()
                continue
            break
        with self._taking:
            if self.stream is not None:
                return
            self._over.set()
        self.lost(f"{self._suspended_for}; then {problem}")
