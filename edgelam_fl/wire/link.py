"""A link: one bidirectional stream of frames between two neighbouring stages of a route.

`send` never waits for the network; received frames go to a callback, on the transport's thread. This module cuts tensors
into chunks, orders them (control before gradients before activations, switched between chunks), holds data back to the
link's pace, puts chunks together again under the link's limits, and counts every byte. It does not know what a frame means.
Neighbours: `split.driver` and `split.host` above, `wire.memory` and `wire.grpc_link` below.
"""

from __future__ import annotations

import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from google.protobuf.message import DecodeError

from edgelam_fl.errors import ProtocolError
from edgelam_fl.wire import codec as codecs
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.counters import GRPC_MESSAGE_FRAME_BYTES, ByteCounters
from edgelam_fl.wire.pace import Pace

MAX_CHUNK_BYTES = 1 << 20
MIN_CHUNK_BYTES = 16 << 10  # of all chunks but a tensor's last: a flood of crumbs costs more time than it has bytes
MAX_HEADER_BYTES = 4 << 20  # a TABLE of very many steps is the largest
_PACED_CHUNK_S = 0.05  # how long a more urgent message waits for the chunk before it
_CONTROL, _GRADIENTS, _ACTIVATIONS = 0, 1, 2
_PRIORITY = {
    pb.GRAD: _GRADIENTS, pb.GRAD_END: _GRADIENTS,
    pb.ACT: _ACTIVATIONS, pb.LABELS: _ACTIVATIONS, pb.KV_STEP: _ACTIVATIONS,
}  # fmt: skip
_UNDERSTOOD = {
    pb.HELLO, pb.READY, pb.NOT_READY, pb.REFUSE, pb.TABLE, pb.TABLE_ALL, pb.ACT, pb.GRAD, pb.GRAD_END,
    pb.STEP_CLOSE, pb.STEP_READY, pb.STEP_APPLY, pb.DONE, pb.CANCEL, pb.PING, pb.PONG, pb.ERROR,
    pb.LABELS, pb.KV_STEP, pb.KV_DROP,
}  # fmt: skip
_WITH_TENSOR = {pb.ACT, pb.GRAD, pb.LABELS, pb.KV_STEP}
_DTYPES = {pb.LABELS: codecs.NUMBERS}  # all else: codecs.HIDDEN
_LOSSLESS = "raw"  # numbers are never rounded, whatever the link's codec


# What a link tells those above: frames, and once that it is lost and why.
Ears = tuple[Callable[["Link", "Frame"], None], Callable[["Link", str], None]]


@dataclass
class _Partial:
    """A tensor of which some chunks have arrived, in order."""

    header: pb.Header
    data: bytearray
    received_bytes: int = 0
    chunks: int = 0

    def take(self, header: pb.Header, payload: memoryview) -> bool:
        """Adds the next chunk; returns whether the tensor is complete."""
        meta, start, total = header.tensor, self.received_bytes, len(self.data)
        least = min(0 if header.last_chunk else MIN_CHUNK_BYTES, total - start)
        most = min(MAX_CHUNK_BYTES, total - start)
        if (meta.chunk, meta.offset) != (self.chunks, start) or not least <= len(payload) <= most:
            raise ProtocolError(
                f"chunk {meta.chunk} has {len(payload)} bytes at {meta.offset}; chunk {self.chunks} is next, at byte "
                f"{start} of {total}, with {least} to {most} bytes"
            )
        self.data[start : start + len(payload)] = payload
        self.received_bytes += len(payload)
        self.chunks += 1
        if header.last_chunk != (self.received_bytes == total):
            raise ProtocolError(f"the tensor of {total} bytes ended after {self.received_bytes}")
        return header.last_chunk


@dataclass(frozen=True)
class Frame:
    header: pb.Header
    tensor: torch.Tensor | None = None


@dataclass
class _Parcel:
    message: bytes
    pace: Pace | None
    left: Callable[[], None] | None = None  # called when the transport has taken the message

    @property
    def cost_bytes(self) -> int:
        return len(self.message) + GRPC_MESSAGE_FRAME_BYTES


class Outbox:
    """The sender's three queues. Iterating over it is the sender: it waits, yields the most urgent message, ends on close.

    Data waits for its turn at the pace while it is still in its queue, so that what is more urgent never waits behind it.
    """

    def __init__(self) -> None:
        self._queues: tuple[deque[_Parcel], ...] = (deque(), deque(), deque())
        self._changed = threading.Condition()
        self._closed = False
        self._turn: tuple[float, int] | None = None  # when the next data message may leave, and the bytes booked for it

    def put(
        self,
        priority: int,
        messages: list[bytes],
        pace: Pace | None = None,
        left: Callable[[], None] | None = None,
    ) -> None:
        """`left` is called, on the sender's thread, when the last of `messages` has left."""
        parcels = [_Parcel(message, pace) for message in messages]
        parcels[-1].left = left
        with self._changed:
            self._queues[priority].extend(parcels)
            self._changed.notify()

    def close(self) -> None:
        """What was put before is still sent."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def __iter__(self) -> Iterator[bytes]:
        while (parcel := self._next()) is not None:
            yield parcel.message
            if parcel.left is not None:  # asked for the next one: gRPC does so when this one is out of its hands
                parcel.left()

    def _next(self) -> _Parcel | None:
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._closed or any(self._queues))
                priority = next((number for number, queue in enumerate(self._queues) if queue), None)
                if priority is None:
                    return None
                wait_s = self._wait_s(self._queues[priority][0], priority)
                if wait_s <= 0:
                    return self._queues[priority].popleft()
                self._changed.wait(wait_s)

    def _wait_s(self, parcel: _Parcel, priority: int) -> float:
        """Books `parcel`; above 0, it has to wait so long, and what comes meanwhile may take its turn."""
        pace, cost = parcel.pace, parcel.cost_bytes
        if pace is None:
            return 0.0
        if priority == _CONTROL:
            pace.book(cost)
            return 0.0
        if self._turn is None:
            self._turn = pace.book(cost), cost
        moment, booked = self._turn
        wait_s = moment - pace.clock()
        if wait_s <= 0:
            pace.book(cost - booked)  # a gradient may have taken an activation's turn
            self._turn = None
        return wait_s


class Link:
    """One end of a link. Transports subclass it: `_transmit` sends messages, and they call `receive` and `lost`."""

    def __init__(self, name: str, counters: ByteCounters, *, max_tensor_bytes: int = 0, codec: str = "raw") -> None:
        self.name = name
        self.counters = counters
        self.max_tensor_bytes = max_tensor_bytes
        self.codec = codec
        self.silent_s = 0.0  # without a word for longer, the link is given up; 0: never (in memory)
        self.job_token = 0
        self.progress = pb.Progress()  # what our PONGs tell
        # These two are set before data flows. Links may share a pace; without a network (in memory) it limits nothing.
        self.pace: Pace | None = None
        # Called when a tensor has left, with its header, when it was queued and when it left (time.monotonic()).
        self.on_sent: Callable[[pb.Header, float, float], None] | None = None
        self.last_heard = time.monotonic()
        self.closed = False
        self._on_frame: Callable[[Link, Frame], None] = lambda link, frame: None
        self._on_lost: Callable[[Link, str], None] = lambda link, reason: None
        self._sent_seq = 0
        self._send_lock = threading.RLock()
        self._lost_lock = threading.Lock()
        self._partial: dict[int, _Partial] = {}

    # ---- for those above

    def attach(self, on_frame: Callable[[Link, Frame], None], on_lost: Callable[[Link, str], None]) -> None:
        """`on_lost` is called once, with the reason, unless this end closes first."""
        self._on_frame, self._on_lost = on_frame, on_lost

    def send(self, header: pb.Header, tensor: torch.Tensor | None = None) -> None:
        """Queues a frame. On a closed link the frame is dropped: whoever cares was told by `on_lost`."""
        header.job_token = self.job_token
        payloads: list[bytes | memoryview] = [b""]
        left = None
        if tensor is not None:
            codec = _LOSSLESS if header.kind in _DTYPES else self.codec
            header.tensor.CopyFrom(codecs.describe(tensor, codec, _DTYPES.get(header.kind, codecs.HIDDEN)))
            data = memoryview(codecs.CODECS[codec].encode(tensor))
            header.tensor.total_bytes = len(data)
            size = self._chunk_bytes()
            payloads = [data[start : start + size] for start in range(0, max(1, len(data)), size)]
            if self.on_sent is not None:
                left = partial(_tell, self.on_sent, header, time.monotonic())
        with self._send_lock:  # sequence numbers must leave in the order of a queue
            if not self.closed:
                self._enqueue(header, payloads, left)

    def close(self) -> None:
        """Ends the link from this side; queued frames are still sent."""
        with self._lost_lock:
            self.closed = True
        self._shut()

    def _chunk_bytes(self) -> int:
        if self.pace is None:
            return MAX_CHUNK_BYTES
        return int(max(MIN_CHUNK_BYTES, min(MAX_CHUNK_BYTES, self.pace.bytes_per_s * _PACED_CHUNK_S)))

    def _enqueue(
        self, header: pb.Header, payloads: Sequence[bytes | memoryview], left: Callable[[], None] | None = None
    ) -> None:
        messages, offset = [], 0
        for number, payload in enumerate(payloads):
            header.last_chunk = number == len(payloads) - 1
            if header.HasField("tensor"):
                header.tensor.chunk, header.tensor.offset = number, offset
            messages.append(self._message(header, payload))
            offset += len(payload)
        self._transmit(_PRIORITY.get(header.kind, _CONTROL), messages, left)

    # ---- for transports

    def _transmit(self, priority: int, messages: list[bytes], left: Callable[[], None] | None) -> None:
        """Sends them in order, each when its turn comes, and then calls `left`."""
        raise NotImplementedError("a transport sends messages")

    def _shut(self) -> None:
        """Lets the transport go."""

    def receive(self, message: bytes) -> None:
        """One message from the other end. What breaks the protocol ends the link, with the reason told to both ends."""
        if self.closed:
            return
        self.last_heard = time.monotonic()
        try:
            frame = self._parse(message)
        except ProtocolError as error:
            farewell = pb.Header(kind=pb.ERROR, error=pb.Error(code="protocol", scope="route", text=str(error)))
            self.lost(f"the other end broke the protocol: {error}", farewell)
            return
        if frame is None:
            return
        if frame.header.kind == pb.PING:
            self.send(pb.Header(kind=pb.PONG, progress=self.progress))
        elif frame.header.kind == pb.ERROR and frame.header.error.scope != "unit":
            self.lost(f"the other end reports {frame.header.error.code}: {frame.header.error.text}")
        elif frame.header.kind != pb.PONG:
            self._on_frame(self, frame)

    def lost(self, reason: str, farewell: pb.Header | None = None) -> None:
        """Ends the link for `reason`; the other end may be told a `farewell` first."""
        with self._lost_lock:
            if self.closed:
                return
            self.closed = True
        if farewell is not None:
            with self._send_lock:
                self._enqueue(farewell, [b""])
        self._shut()
        self._on_lost(self, reason)

    # ---- framing

    def _message(self, header: pb.Header, payload: bytes | memoryview) -> bytes:
        self._sent_seq += 1
        header.seq, header.send_ns = self._sent_seq, time.monotonic_ns()
        encoded = header.SerializeToString()
        message = b"".join((struct.pack("<I", len(encoded)), encoded, payload))
        self.counters.add(self.name, "sent", header.kind, len(payload), len(message))
        return message

    def _parse(self, message: bytes) -> Frame | None:
        header, payload = _split(message)
        self.counters.add(self.name, "received", header.kind, len(payload), len(message))
        if self.job_token and header.job_token not in (0, self.job_token):
            raise ProtocolError(f"a frame of job {header.job_token} on a link of job {self.job_token}")
        if header.kind not in _UNDERSTOOD:
            if not header.optional:
                text = f"kind {header.kind} is not supported in version 1"
                self.send(pb.Header(kind=pb.ERROR, error=pb.Error(code="unsupported", scope="unit", text=text)))
            return None
        if header.HasField("tensor"):
            return self._assemble(header, payload)
        if payload:
            raise ProtocolError(f"{len(payload)} bytes without a tensor in a frame of kind {header.kind}")
        return Frame(header)

    def _assemble(self, header: pb.Header, payload: memoryview) -> Frame | None:
        """Takes a chunk; the frame with the tensor when it was the last one. The sender chooses the chunks' sizes."""
        if header.kind not in _WITH_TENSOR:
            raise ProtocolError(f"a tensor in a frame of kind {header.kind}")
        priority, meta = _PRIORITY[header.kind], header.tensor
        if meta.chunk == 0:
            if priority in self._partial:
                raise ProtocolError("a tensor began before the one before it was complete")
            codecs.check(meta, self.max_tensor_bytes, _DTYPES.get(header.kind, codecs.HIDDEN))
            self._partial[priority] = _Partial(header, bytearray(meta.total_bytes))
        open_tensor = self._partial.get(priority)
        if open_tensor is None:
            raise ProtocolError("a tensor's later chunk came before its first")
        if not _same_tensor(open_tensor.header, header):
            raise ProtocolError(f"chunk {meta.chunk} does not belong to the tensor that is open")
        if not open_tensor.take(header, payload):
            return None
        del self._partial[priority]
        return Frame(header, codecs.CODECS[meta.codec].decode(open_tensor.data, open_tensor.header.tensor))


def _tell(on_sent: Callable[[pb.Header, float, float], None], header: pb.Header, queued: float) -> None:
    on_sent(header, queued, time.monotonic())


def _split(message: bytes) -> tuple[pb.Header, memoryview]:
    if len(message) < 4:
        raise ProtocolError(f"a message of {len(message)} bytes is shorter than its own length field")
    (length,) = struct.unpack_from("<I", message)
    if length > min(MAX_HEADER_BYTES, len(message) - 4):
        raise ProtocolError(f"a header of {length} bytes in a message of {len(message)}")
    view = memoryview(message)
    try:
        return pb.Header.FromString(view[4 : 4 + length].tobytes()), view[4 + length :]
    except DecodeError as error:
        raise ProtocolError(f"a header that is no header: {error}") from error


def _same_tensor(first: pb.Header, other: pb.Header) -> bool:
    unit = ("kind", "phase", "step", "micro_batch", "try", "device_index")
    described = ("dtype", "shape", "codec", "codec_meta", "total_bytes")
    return all(getattr(first, field) == getattr(other, field) for field in unit) and all(
        getattr(first.tensor, field) == getattr(other.tensor, field) for field in described
    )
