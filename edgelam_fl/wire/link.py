"""A link: one bidirectional stream of frames between two neighbouring stages of a route.

`send` never waits for the network; received frames go to a callback, on the transport's thread. This module cuts tensors
into chunks, orders them (control before gradients before activations, switched between chunks), puts them together
again under the link's limits, and counts every byte. It does not know what a frame means.
Neighbours: `split.driver` and `split.host` above, `wire.memory` and `wire.grpc_link` below.
"""

from __future__ import annotations

import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from google.protobuf.message import DecodeError

from edgelam_fl.errors import ProtocolError
from edgelam_fl.wire import codec as codecs
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.counters import ByteCounters

MAX_CHUNK_BYTES = 1 << 20
MAX_HEADER_BYTES = 4 << 20  # a TABLE of very many steps is the largest
_GRADIENTS, _ACTIVATIONS = 1, 2
_PRIORITY = {pb.GRAD: _GRADIENTS, pb.GRAD_END: _GRADIENTS, pb.ACT: _ACTIVATIONS}  # all else is control: 0
_UNDERSTOOD = {
    pb.HELLO, pb.READY, pb.NOT_READY, pb.REFUSE, pb.TABLE, pb.TABLE_ALL, pb.ACT, pb.GRAD, pb.GRAD_END,
    pb.STEP_CLOSE, pb.DONE, pb.CANCEL, pb.PING, pb.PONG, pb.ERROR,
}  # fmt: skip


# What a link tells those above: frames, and once that it is lost and why.
Ears = tuple[Callable[["Link", "Frame"], None], Callable[["Link", str], None]]


@dataclass
class _Partial:
    """A tensor of which some chunks have arrived, in order."""

    header: pb.Header
    data: bytearray
    received_bytes: int = 0


@dataclass(frozen=True)
class Frame:
    header: pb.Header
    tensor: torch.Tensor | None = None


class Outbox:
    """The sender's three queues. Iterating over it is the sender: it waits, yields the most urgent message, ends on close."""

    def __init__(self) -> None:
        self._queues: tuple[deque[bytes], ...] = (deque(), deque(), deque())
        self._changed = threading.Condition()
        self._closed = False

    def put(self, priority: int, messages: list[bytes]) -> None:
        with self._changed:
            self._queues[priority].extend(messages)
            self._changed.notify()

    def close(self) -> None:
        """What was put before is still sent."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def __iter__(self) -> Iterator[bytes]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or any(self._queues))
                queue = next((queue for queue in self._queues if queue), None)
                if queue is None:
                    return
                message = queue.popleft()
            yield message


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
        payloads = [b""]
        if tensor is not None:
            header.tensor.CopyFrom(codecs.describe(tensor, self.codec))
            data = codecs.CODECS[self.codec].encode(tensor)
            header.tensor.total_bytes = len(data)
            payloads = [data[start : start + MAX_CHUNK_BYTES] for start in range(0, len(data), MAX_CHUNK_BYTES)] or [
                b""
            ]
        with self._send_lock:  # sequence numbers must leave in the order of a queue
            if not self.closed:
                self._enqueue(header, payloads)

    def close(self) -> None:
        """Ends the link from this side; queued frames are still sent."""
        with self._lost_lock:
            self.closed = True
        self._shut()

    def _enqueue(self, header: pb.Header, payloads: list[bytes]) -> None:
        priority = _PRIORITY.get(header.kind, 0)
        self._transmit(priority, [self._message(header, number, p, payloads) for number, p in enumerate(payloads)])

    # ---- for transports

    def _transmit(self, priority: int, messages: list[bytes]) -> None:
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

    def _message(self, header: pb.Header, number: int, payload: bytes, payloads: list[bytes]) -> bytes:
        self._sent_seq += 1
        header.seq, header.send_ns = self._sent_seq, time.monotonic_ns()
        header.last_chunk = number == len(payloads) - 1
        if header.HasField("tensor"):
            header.tensor.chunk, header.tensor.offset = number, number * MAX_CHUNK_BYTES
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
        if not header.HasField("tensor"):
            return Frame(header)
        return self._assemble(header, payload)

    def _assemble(self, header: pb.Header, payload: memoryview) -> Frame | None:
        priority, meta = _PRIORITY.get(header.kind, 0), header.tensor
        if meta.chunk == 0:
            codecs.check(meta, self.max_tensor_bytes)
            self._partial[priority] = _Partial(header, bytearray(meta.total_bytes))
        partial = self._partial.get(priority)
        if partial is None:
            raise ProtocolError("a tensor's later chunk came before its first")
        if not _same_tensor(partial.header, header):
            raise ProtocolError(f"chunk {meta.chunk} does not belong to the tensor that is open")
        start, total = partial.received_bytes, len(partial.data)
        if (
            meta.offset != start
            or meta.chunk * MAX_CHUNK_BYTES != start
            or len(payload) != min(MAX_CHUNK_BYTES, total - start)
        ):
            raise ProtocolError(
                f"chunk {meta.chunk} has {len(payload)} bytes at {meta.offset}; byte {start} of {total} is next"
            )
        partial.data[start : start + len(payload)] = payload
        partial.received_bytes += len(payload)
        if header.last_chunk != (partial.received_bytes == total):
            raise ProtocolError(f"the tensor of {total} bytes ended after {partial.received_bytes}")
        if not header.last_chunk:
            return None
        del self._partial[priority]
        return Frame(header, codecs.CODECS[meta.codec].decode(partial.data, partial.header.tensor))


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
